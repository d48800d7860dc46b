"""Where the IP packet begins in a captured frame, for each link type that captures commonly have.

Numbers of link types and their headers: https://www.tcpdump.org/linktypes.html.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

ETHERNET = 1

Locate = Callable[[bytes, int, int], int]
"""Return where the IP packet of the frame at data[start:end] begins, or -1 if it holds none."""

_IP = frozenset({b"\x08\x00", b"\x86\xdd"})
_TAGS = frozenset({b"\x81\x00", b"\x88\xa8", b"\x91\x00"})
"""802.1Q, 802.1ad, and what was used for stacked tags before that."""
_MOST_TAGS = 4


def _behind_tags(data: bytes, kind: bytes, start: int, end: int) -> int:
    """Return where IP begins if `kind` is the protocol of what begins at `start`, or -1."""
    for _ in range(_MOST_TAGS):
        if kind not in _TAGS:
            break
        kind = data[start + 2 : start + 4]
        start += 4
    return start if kind in _IP and start < end else -1


def ethernet(data: bytes, start: int, end: int) -> int:
    """Ethernet II, with or without VLAN tags."""
    return _behind_tags(data, data[start + 12 : start + 14], start + 14, end)


def _raw(data: bytes, start: int, end: int) -> int:
    return start if start < end else -1


def _loopback(data: bytes, start: int, end: int) -> int:
    """Four bytes tell the family, in the byte order and numbers of whoever wrote them."""
    return start + 4 if start + 4 < end and data[start + 4] >> 4 in (4, 6) else -1


def _cooked(data: bytes, start: int, end: int) -> int:
    return _behind_tags(data, data[start + 14 : start + 16], start + 16, end)


def _cooked_2(data: bytes, start: int, end: int) -> int:
    return _behind_tags(data, data[start : start + 2], start + 20, end)


LINKS: Mapping[int, Locate] = MappingProxyType(
    {
        0: _loopback,  # BSD loopback, here in host order
        ETHERNET: ethernet,
        12: _raw,  # what some systems write for raw IP
        14: _raw,
        101: _raw,
        108: _loopback,
        113: _cooked,  # Linux "any", version 1
        228: _raw,  # IPv4 alone
        229: _raw,  # IPv6 alone
        276: _cooked_2,
    }
)
