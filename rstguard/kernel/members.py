"""List what a set of the blocked holds, by netlink alone: a confined process can start no `ipset`.

Requests and answers are those of include/uapi/linux/netfilter/ipset/ip_set.h (IPSET_CMD_LIST); an
element begins with its address and the length of its prefix (hash_net4_data_list and
hash_net6_data_list in ip_set_hash_net.c).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from rstguard.engine.address import V6, Prefix, packed
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element, Kind
from rstguard.kernel.names import BAN_SETS, GATE_SETS
from rstguard.kernel.netlink import (
    ATTRIBUTE,
    HEADER,
    NFGEN,
    NLA_TYPE_MASK,
    Netlink,
    Request,
    attribute,
)

_LIST: Final = 6 << 8 | 7
_PROTOCOL, _SETNAME, _ADT = 1, 2, 8
_FLAGS, _DATA = 6, 7
_HEADER_ALONE: Final = 1 << 2
"""IPSET_FLAG_LIST_HEADER."""
_TIMEOUT, _COMMENT = 6, 26
_ENTRIES: Final = 24
_VERSION: Final = 6
_NETWORK_ORDER: Final = 0x4000
_HEAD: Final = HEADER.size + NFGEN.size
_SIZE: Final = ATTRIBUTE.size
_V6_LENGTH: Final = 17


def members(netlink: Netlink, name: str, of: Collection[Prefix] | None = None) -> list[Element]:
    """Return the elements of a set of the blocked, or those of them that `of` names.

    Raises:
        KernelError: there is no such set, or it may not be read; its cause is the OSError.
    """
    wanted = None if of is None else {packed(p.network) + bytes((p.length,)) for p in of}
    found = []
    try:
        for chunk, spans in netlink.dump(Request(_LIST, socket.AF_INET, _of(name))):
            for start, end in spans:
                for prefix, rest, after in _elements(chunk, start + _HEAD, end):
                    if wanted is None or prefix in wanted:
                        values = {k: chunk[a:b] for k, a, b in _nests(chunk, rest, after)}
                        found.append(_element(prefix, values, name))
    except (IndexError, struct.error) as error:
        raise KernelError(f"the kernel's list of the set {name} cannot be read: {error}") from None
    return found


def entries(netlink: Netlink, name: str) -> int:
    """Return how many elements a set of any type holds whose time is not over.

    Raises:
        KernelError: there is no such set, or it may not be read; its cause is the OSError.
    """
    flags = attribute(_FLAGS | _NETWORK_ORDER, _HEADER_ALONE.to_bytes(4, "big"))
    for chunk, spans in netlink.dump(Request(_LIST, socket.AF_INET, _of(name) + flags)):
        for start, end in spans:
            for kind, at, last in _nests(chunk, start + _HEAD, end):
                if kind == _DATA:
                    values = {k: chunk[a:b] for k, a, b in _nests(chunk, at, last)}
                    return int.from_bytes(values.get(_ENTRIES, b""), "big")
    return 0


def _of(name: str) -> bytes:
    return attribute(_PROTOCOL, bytes((_VERSION,))) + attribute(_SETNAME, name.encode() + b"\0")


def _elements(chunk: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the elements of a message: address and length of the prefix, and where the rest is."""
    for kind, at, last in _nests(chunk, start, end):
        if kind != _ADT:
            continue
        for _, element, after in _nests(chunk, at, last):
            first = element + 2 * _SIZE
            place = element + _SIZE + ATTRIBUTE.unpack_from(chunk, element + _SIZE)[0]
            yield chunk[first:place] + chunk[place + _SIZE : place + _SIZE + 1], place, after


def _nests(chunk: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, start and end of the values that follow each other."""
    while start + _SIZE <= end:
        length, kind = ATTRIBUTE.unpack_from(chunk, start)
        yield kind & NLA_TYPE_MASK, start + _SIZE, min(start + length, end)
        start += max(length, _SIZE) + 3 & ~3


def _element(prefix: bytes, values: Mapping[int, bytes], set_name: str) -> Element:
    number = int.from_bytes(prefix[:-1], "big") | (V6 if len(prefix) == _V6_LENGTH else 0)
    comment = values.get(_COMMENT, b"").rstrip(b"\0").decode(errors="replace")
    kind, _, rule = comment.partition(" ")
    if kind not in ("ban", "shun"):  # somebody added it by hand
        kind, rule = ("ban" if set_name in BAN_SETS else "shun"), ""
    seconds = int.from_bytes(values.get(_TIMEOUT, b""), "big")
    named: Kind = "ban" if kind == "ban" else "shun"
    keeps = set_name in GATE_SETS
    return Element(Prefix(number, prefix[-1]), named, rule, seconds or None, keeps)
