"""The network interfaces as the kernel tells of them, and which of them no rule can ever match."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple

from rstguard.kernel.netlink import NETLINK_ROUTE, Netlink, Request, attributes

# linux/rtnetlink.h, linux/if_link.h, linux/if.h
_GET_LINK: Final = 18
_NETLINK_HEADER: Final = 16
_LINK: Final = Struct("=BxHiII")  # struct ifinfomsg
_REST: Final = bytes(_LINK.size - 4)
_NAME, _MASTER, _INFORMATION, _STATISTICS, _XDP = 3, 10, 18, 23, 43
_KIND, _ATTACHED = 1, 2
_RECEIVED_BYTES_AT: Final = 16
_UP: Final = 1

_MASTERS: Final = {
    "bridge": "a port of the bridge {}",
    "bond": "a part of the bond {}",
    "team": "a part of the team {}",
}


class Link(NamedTuple):
    """One interface; `received` are bytes since it was made.

    `master` is the interface that it is a part of, or "", and `master_kind` what that is ("bridge",
    "bond", …); `xdp` tells that an XDP program sees its packets first.
    """

    name: str
    up: bool
    master: str = ""
    master_kind: str = ""
    received: int = 0
    xdp: bool = False


def links() -> list[Link]:
    """Return the interfaces of this network namespace.

    Raises:
        KernelError: the kernel could not be asked.
    """
    netlink = Netlink(NETLINK_ROUTE)
    found: dict[int, tuple[bool, dict[int, bytes]]] = {}
    try:
        for chunk, spans in netlink.dump(Request(_GET_LINK, 0, _REST)):
            for start, end in spans:
                _, _, index, flags, _ = _LINK.unpack_from(chunk, start + _NETLINK_HEADER)
                at = start + _NETLINK_HEADER + _LINK.size
                found[index] = bool(flags & _UP), attributes(chunk[at:end])
    finally:
        netlink.close()
    return [_link(up, of, found) for up, of in found.values()]


def _link(
    up: bool, of: dict[int, bytes], everyone: dict[int, tuple[bool, dict[int, bytes]]]
) -> Link:
    master = everyone.get(_number(of.get(_MASTER, b"")), (False, {}))[1]
    statistics = of.get(_STATISTICS, b"")[_RECEIVED_BYTES_AT : _RECEIVED_BYTES_AT + 8]
    return Link(
        _text(of.get(_NAME, b"")),
        up,
        _text(master.get(_NAME, b"")),
        _text(attributes(master.get(_INFORMATION, b"")).get(_KIND, b"")),
        _number(statistics),
        bool(_number(attributes(of.get(_XDP, b"")).get(_ATTACHED, b""))),
    )


def _number(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


def complaint(link: Link) -> str:
    """Return why no packet can be seen to come in by an interface, and what to do, or ""."""
    if kind := _MASTERS.get(link.master_kind):
        whole = kind.format(link.master)
        return f"{link.name} is {whole}, whose name every packet of it bears: name {link.master}"
    if link.master_kind == "openvswitch":
        return (
            f"{link.name} belongs to Open vSwitch, which forwards its packets beside Netfilter: "
            "name the switch's internal port"
        )
    if not link.up:
        return f"{link.name} is down: `ip link set {link.name} up`, or name another"
    return ""


def protected(patterns: Iterable[str], here: Sequence[Link]) -> list[Link]:
    """Return the interfaces that a policy's patterns ("wan*") match."""
    patterns = list(patterns)
    return [
        link
        for link in here
        if any(fnmatch.fnmatchcase(link.name, pattern) for pattern in patterns)
    ]
