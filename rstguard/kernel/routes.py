"""Where the way to an address leads: the interface that the routing table names.

Own netlink code because the general-purpose library takes a tenth of a second to be loaded, and
whoever asks is a process that others wait for.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence
from typing import Final

from rstguard.engine.address import is_v6, packed
from rstguard.kernel.netlink import (
    HEADER,
    NETLINK_ROUTE,
    Netlink,
    Request,
    attribute,
    attributes,
)

# linux/rtnetlink.h
_GET_ROUTE: Final = 26
_DESTINATION, _INTERFACE = 1, 4
_MESSAGE: Final = 12
"""Bytes of struct rtmsg.  Its first is the family, as in every request; in a question the rest
may be zero (inet_rtm_valid_getroute_req, net/ipv4/route.c)."""
_REST: Final = bytes(8)


def ways(addresses: Sequence[int]) -> list[str]:
    """Return the interface by which packets to each (tagged) address leave; "" if there is none.

    Raises:
        KernelError: the kernel could not be asked.
    """
    netlink = Netlink(NETLINK_ROUTE)
    try:
        answers = netlink.transact(
            [
                Request(
                    _GET_ROUTE,
                    socket.AF_INET6 if is_v6(address) else socket.AF_INET,
                    _REST + attribute(_DESTINATION, packed(address)),
                )
                for address in addresses
            ]
        )
    finally:
        netlink.close()
    names = {0: ""}
    return [_name(_interface(answer.message), names) for answer in answers]


def _interface(message: bytes) -> int:
    """Return the index of the interface that a route names, or 0."""
    found = attributes(message[HEADER.size + _MESSAGE :])
    return int.from_bytes(found.get(_INTERFACE, b""), sys.byteorder)


def _name(index: int, names: dict[int, str]) -> str:
    if index not in names:
        names[index] = ""
        with contextlib.suppress(OSError):  # it may have gone meanwhile
            names[index] = socket.if_indextoname(index)
    return names[index]
