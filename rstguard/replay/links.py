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
_PPPOE_SESSION = b"\x88\x64"
_PPP_IP = frozenset({b"\x00\x21", b"\x00\x57"})
"""PPP protocol numbers of IPv4 and IPv6 (RFC 1332, RFC 5072)."""
_LLC_SNAP = b"\xaa\xaa\x03\x00\x00\x00"
"""LLC header for SNAP, and the code of those whose protocol is an EtherType (RFC 1042)."""
_LEAST_ETHERTYPE = 0x0600
"""Below it stands the length of an IEEE 802.3 frame."""


def _behind_tags(data: bytes, kind: bytes, start: int, end: int) -> int:
    """Return where IP begins if `kind` is the protocol of what begins at `start`, or -1."""
    kind, start = _payload(data, kind, start)
    if kind == _PPPOE_SESSION:  # version and type, code, session, length, PPP protocol (RFC 2516)
        kind, start = data[start + 6 : start + 8], start + 8
        return start if kind in _PPP_IP and start < end else -1
    return start if kind in _IP and start < end else -1


def _payload(data: bytes, kind: bytes, start: int) -> tuple[bytes, int]:
    """Return the EtherType behind VLAN tags and SNAP, and where what it tells of begins."""
    for _ in range(_MOST_TAGS):
        if kind not in _TAGS:
            break
        kind, start = data[start + 2 : start + 4], start + 4
    if int.from_bytes(kind, "big") < _LEAST_ETHERTYPE and data[start : start + 6] == _LLC_SNAP:
        kind, start = data[start + 6 : start + 8], start + 8
    return kind, start


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


_NAMES: Mapping[int, str] = MappingProxyType(
    {
        0x0806: "ARP",
        0x8035: "RARP",
        0x8100: "VLAN tags one in another",
        0x8809: "LACP",
        0x8847: "MPLS",
        0x8848: "MPLS",
        0x8863: "PPPoE discovery",
        0x8864: "PPPoE sessions that carry no IP",
        0x888E: "802.1X",
        0x88CC: "LLDP",
        0x88E5: "MACsec",
        0x893F: "802.1BR",
    }
)
_LINK_NAMES: Mapping[int, str] = MappingProxyType(
    {
        9: "PPP",
        50: "PPP",
        104: "Cisco HDLC",
        105: "Wi-Fi (802.11)",
        127: "Wi-Fi (802.11 with radiotap)",
        189: "USB",
        220: "USB",
        253: "netlink",
    }
)
_KIND_AT: Mapping[int, int] = MappingProxyType({ETHERNET: 12, 113: 14, 276: 0})
_BEGINS_AT: Mapping[int, int] = MappingProxyType({ETHERNET: 14, 113: 16, 276: 20})


def kind_of(link: int, data: bytes, start: int, end: int) -> str:
    """Say in words what the frame at data[start:end] is, of which no IP packet was found."""
    if link not in LINKS:
        name = f" ({_LINK_NAMES[link]})" if link in _LINK_NAMES else ""
        return f"frames of link type {link}{name}"
    if link not in _KIND_AT:
        return "packets that are neither IPv4 nor IPv6"
    at = start + _KIND_AT[link]
    kind, _ = _payload(data, data[at : at + 2], start + _BEGINS_AT[link])
    number = int.from_bytes(kind, "big")
    if end - start < _BEGINS_AT[link] or not kind:
        return "frames that were cut off"
    if number < _LEAST_ETHERTYPE:
        return "LLC, such as spanning tree"
    return _NAMES.get(number, f"EtherType 0x{number:04x}")


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
