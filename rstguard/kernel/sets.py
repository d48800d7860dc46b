"""The hot path from a decision to the kernel: add, remove and look up elements of sets.

Three ways to add an element were measured on Linux 6.18, one core:

==================  ============  ===============
way                 one element   5,000 elements
==================  ============  ===============
pyroute2 ``IPSet``       0.19 ms          960 ms
``ipset restore``         1.4 ms           25 ms
this module             0.006 ms           11 ms
==================  ============  ===============

Hence a few lines of netlink here, for adding, removing, asking and listing only; sets are made and
filled with the `ipset` command, in `rstguard.kernel.ipset`.  The message layout is that of
include/uapi/linux/netfilter/ipset/ip_set.h: one message carries a list of elements
(IPSET_ATTR_ADT), and the answer names the element that failed by its line number.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Self

from rstguard.engine.address import Prefix, is_v6, packed
from rstguard.kernel import Full, KernelError, NotPermitted, NotThere
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.kernel.members import entries, members
from rstguard.kernel.names import BLOCK_SETS, set_name
from rstguard.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    PATIENCE,
    Netlink,
    Request,
    attribute,
    encode,
    nest,
)
from rstguard.kernel.seam import Counted

_SUBSYSTEM = 6
_ADD, _DELETE, _TEST = 9, 10, 11
_EXCLUSIVE = 0x200
"""NLM_F_EXCL: say so if an element to add is there already, or one to remove is not."""
_NETWORK_ORDER = 0x4000
_ATTR_PROTOCOL, _ATTR_SETNAME, _ATTR_DATA, _ATTR_ADT, _ATTR_LINE = 1, 2, 7, 8, 9
_ATTR_IP, _ATTR_CIDR, _ATTR_PORT, _ATTR_TIMEOUT, _ATTR_PROTO, _ATTR_COMMENT = 1, 3, 4, 6, 7, 26
_ATTR_PACKETS = 25
_PROTOCOL = 6
"""Oldest ipset protocol version that every supported kernel still speaks."""
_EXISTS = 4103
"""IPSET_ERR_EXIST: on adding "is there already", on removing and asking "is not there"."""
_FULL = 4352
"""IPSET_ERR_HASH_FULL."""
_ANSWER = struct.Struct("=IIi")
_BATCH = 500
"""Elements a message: an attribute holds 64 KiB at most, an IPv6 element takes 104 bytes."""

_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        errno.EPERM: "changing it needs root (CAP_NET_ADMIN): run the command with sudo",
        errno.ENOENT: "it does not exist in this network namespace: start rstguard again",
        errno.ENOMEM: "the kernel has no memory left for it: shorten the bans or add memory",
        errno.EINVAL: "the kernel does not understand the request: run `rstguard doctor`",
        4104: "a prefix of length 0 would ban everybody: name a narrower one",
        _FULL: "it is full: shorten the bans, or ban by a wider prefix (`per` in the policy)",
    }
)
_KINDS: Mapping[int, type[KernelError]] = MappingProxyType(
    {errno.EPERM: NotPermitted, errno.ENOENT: NotThere, _FULL: Full}
)


class Sets:
    """Adds, removes and looks up elements in the sets of the namespace it was made in.

    The sets must exist (`rstguard.kernel.ipset.apply`).  Every method raises `KernelError` with a
    sentence if the kernel refuses.
    """

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        self._socket.connect((0, 0))  # nobody but the kernel may send to it
        self._socket.settimeout(PATIENCE)
        self._sequence = 0
        self._lists = Netlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back; the sets stay."""
        self._socket.close()
        self._lists.close()

    def add(self, elements: Iterable[Element], shorten: bool = False) -> None:
        """Put elements into their sets, or renew them there.

        An element that would last longer as it stands keeps its time and its comment, unless
        `shorten` is true.  Of several elements for one source the longest counts.

        Raises:
            ValueError: a rule's name or a time out of range.
            KernelError: the kernel refused.
        """
        wanted: dict[str, dict[Prefix, Element]] = {}
        for element in elements:
            of_set = wanted.setdefault(element.set_name, {})
            other = of_set.get(element.source)
            if other is None or element.lasts > other.lasts:
                of_set[element.source] = element
        for name, of_set in wanted.items():
            self._add_to(name, list(of_set.values()), shorten)

    def remove(self, source: Prefix) -> bool:
        """Take exactly this prefix out of the banned and the shunned; tell whether it was there."""
        found = False
        data = nest(_ATTR_DATA, _entry(source))
        for name in _names(source.network):
            error = self._ask(_DELETE, name, data, _EXCLUSIVE)
            if error not in (0, _EXISTS):
                raise refusal(name, error)
            found = found or not error
        return found

    def put(self, name: str, prefixes: Iterable[Prefix], seconds: int) -> None:
        """Put prefixes into a set that has times but no comments, or renew them there."""
        for prefix in prefixes:
            timeout = attribute(_ATTR_TIMEOUT | _NETWORK_ORDER, seconds.to_bytes(4, "big"))
            error = self._ask(_ADD, name, nest(_ATTR_DATA, _entry(prefix) + timeout))
            if error:
                raise refusal(name, error)

    def count(self, name: str, elements: Iterable[Counted], seconds: int) -> None:
        """Put elements into a set with times and counters, or change what they count there."""
        timeout = attribute(_ATTR_TIMEOUT | _NETWORK_ORDER, seconds.to_bytes(4, "big"))
        parts = []
        for address, port, packets in elements:
            element = _whole(address) + (_port(port) if port >= 0 else b"")
            counter = attribute(_ATTR_PACKETS | _NETWORK_ORDER, packets.to_bytes(8, "big"))
            parts.append(nest(_ATTR_DATA, element + timeout + counter))
        for start in range(0, len(parts), _BATCH):
            error = self._ask(_ADD, name, nest(_ATTR_ADT, *parts[start : start + _BATCH]))
            if error:
                raise refusal(name, error)

    def take(self, name: str, prefixes: Iterable[Prefix]) -> None:
        """Take prefixes out of a set; those that are not there do not matter."""
        for prefix in prefixes:
            error = self._ask(_DELETE, name, nest(_ATTR_DATA, _entry(prefix)))
            if error not in (0, _EXISTS):
                raise refusal(name, error)

    def entries(self, name: str) -> int:
        """Return how many elements a set holds, of any type."""
        with _refusing(name):
            return entries(self._lists, name)

    def _members(self, name: str, of: Collection[Prefix] | None = None) -> list[Element]:
        with _refusing(name):
            return members(self._lists, name, of)

    def list(self) -> list[Element]:
        """Return all elements, bans first, as the kernel holds them now (5,000 in about 40 ms)."""
        found: list[Element] = []
        for name in BLOCK_SETS:
            found += self._members(name)
        return found

    def contains(self, address: int) -> bool:
        """Tell whether a tagged address is banned or shunned, itself or in a wider prefix."""
        return any(self._holds(name, address) for name in _names(address))

    def proven(self, address: int) -> bool:
        """Tell whether the kernel has lately seen the source of a tagged address prove itself."""
        return self._holds(set_name("proven", 6 if is_v6(address) else 4), address)

    def one_sided(self, address: int, port: int) -> bool:
        """Tell whether only one side is seen of a service (`rstguard.kernel.oneway`)."""
        name = set_name("oneway", 6 if is_v6(address) else 4)
        error = self._ask(_TEST, name, nest(_ATTR_DATA, _whole(address) + _port(port)))
        if error not in (0, _EXISTS):
            raise refusal(name, error)
        return not error

    def _holds(self, name: str, address: int) -> bool:
        error = self._ask(_TEST, name, nest(_ATTR_DATA, _whole(address)))
        if error not in (0, _EXISTS):
            raise refusal(name, error)
        return not error

    def _add_to(self, name: str, elements: Sequence[Element], shorten: bool) -> None:
        held: dict[Prefix, float] | None = {} if shorten else None
        for start in range(0, len(elements), _BATCH):
            batch = elements[start : start + _BATCH]
            if held is None:
                error = self._ask(_ADD, name, _list_of(batch), _EXCLUSIVE)
                if error == _EXISTS:
                    # Only now is it worth the listing: a source is seldom blocked twice at a
                    # time, as the kernel drops what would make the engine ask again.
                    sources = {element.source for element in elements}
                    held = {
                        element.source: element.lasts for element in self._members(name, sources)
                    }
            if held is not None:
                longer = [e for e in batch if e.lasts > held.get(e.source, 0)]
                error = self._ask(_ADD, name, _list_of(longer)) if longer else 0
            if error:
                raise refusal(name, error)

    def _ask(self, kind: int, name: str, data: bytes, flags: int = 0) -> int:
        """Send one request and return the kernel's error number, 0 for done."""
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        attributes = (
            attribute(_ATTR_PROTOCOL, bytes((_PROTOCOL,)))
            + attribute(_ATTR_SETNAME, name.encode() + b"\0")
            + attribute(_ATTR_LINE | _NETWORK_ORDER, bytes(4))
            + data
        )
        request = Request(_SUBSYSTEM << 8 | kind, socket.AF_INET, attributes)
        try:
            self._socket.send(encode(request, NLM_F_ACK | flags, self._sequence))
            while True:
                # An error's answer repeats the whole request.
                answer = self._socket.recv(len(attributes) + 256)
                sequence, _, error = _ANSWER.unpack_from(answer, 8)
                if sequence == self._sequence:
                    return int(-error)
        except TimeoutError as problem:
            raise KernelError(
                f"the set {name} could not be used: the kernel gave no answer within "
                f"{self._socket.gettimeout():g} s; see `dmesg` for what holds it up"
            ) from problem
        except OSError as problem:
            raise refusal(name, problem.errno or 0) from problem


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Say of a set what the kernel's refusal to list it means."""
    try:
        yield
    except KernelError as problem:
        if isinstance(problem.__cause__, OSError):
            raise refusal(name, problem.__cause__.errno or 0) from problem
        raise


def _names(address: int) -> tuple[str, ...]:
    """Return the sets of the blocked of the address's family."""
    return BLOCK_SETS[is_v6(address) :: 2]


def _list_of(elements: Sequence[Element]) -> bytes:
    """Return the IPSET_ATTR_ADT attribute of elements to add."""
    parts = []
    for line, element in enumerate(elements, 1):
        seconds = element.remaining or 0
        if element.remaining is not None and not 1 <= seconds <= MAX_SECONDS:
            raise ValueError(f"an element lasts 1 to {MAX_SECONDS} seconds, not {seconds}")
        parts.append(
            nest(
                _ATTR_DATA,
                _entry(element.source)
                + attribute(_ATTR_TIMEOUT | _NETWORK_ORDER, seconds.to_bytes(4, "big"))
                + attribute(_ATTR_COMMENT, element.comment.encode() + b"\0")
                + attribute(_ATTR_LINE | _NETWORK_ORDER, line.to_bytes(4, "big")),
            )
        )
    return nest(_ATTR_ADT, b"".join(parts))


def _whole(address: int) -> bytes:
    return _entry(Prefix(address, 128 if is_v6(address) else 32))


def _port(port: int) -> bytes:
    """Return the attributes of a TCP port, which stand behind those of an address."""
    number = attribute(_ATTR_PORT | _NETWORK_ORDER, port.to_bytes(2, "big"))
    return number + attribute(_ATTR_PROTO, bytes((socket.IPPROTO_TCP,)))


def _entry(source: Prefix) -> bytes:
    family = 2 if is_v6(source.network) else 1
    address = attribute(family | _NETWORK_ORDER, packed(source.network))
    return nest(_ATTR_IP, address) + attribute(_ATTR_CIDR, bytes((source.length,)))


def refusal(name: str, error: int) -> KernelError:
    """Return what to raise for a set and the error number that the kernel gave for it."""
    known = _ERRORS.get(error)
    if known is None:
        known = f"the kernel said: {os.strerror(error) if error < 4096 else f'ipset error {error}'}"
    kind = _KINDS.get(error, KernelError)
    return kind(f"the set {name} could not be used: {known}")
