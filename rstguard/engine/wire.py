"""Bytes to `Packet`: TCP over IPv4 and IPv6, as far as decisions need it.

Hostile input is a value, never an exception: whatever arrives, `parse` returns a `Packet` or a
`Malformed`.  The usual IPv4 header is read with one unpack; everything else (options, IPv6,
extension headers) walks the headers step by step.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from rstguard.engine.address import V6

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
HANDSHAKE = FIN | SYN | RST | ACK
"""The flags that tell a segment's part in a connection: of a SYN only SYN is set of these."""

KNOWN = 1
"""State bit: the tracker calls the connection established, or its SYN comes with a SYN cookie."""
PROVEN = 2
"""State bit: of a connection (with `KNOWN`), that an outsider cannot have forged it; of a SYN or a
segment of no connection, that its source lately had a connection on which the server sent data."""
OVER = 4
"""State bit: by the kernel's count the SYN is one too many (`Rule.in_kernel`), or the segment of no
connection (`rstguard.kernel.limiting`); of a RST, that the handshake of its connection was not
over."""
OUTBOUND = 8
"""State bit: sent by the protected side."""
STRAY = 16
"""State bit: the tracker knows no connection that the segment fits."""

_VALID_FLAGS = frozenset(
    {SYN, SYN | URG, SYN | ACK, RST, RST | ACK, FIN | ACK, FIN | ACK | URG, ACK, ACK | URG}
)
# PSH, ECE and CWR say nothing about validity: nf_conntrack_proto_tcp.c, tcp_valid_flags.
BAD_FLAGS: tuple[bool, ...] = tuple(
    flags & (FIN | SYN | RST | ACK | URG) not in _VALID_FLAGS for flags in range(256)
)
"""For each value of the flag byte, whether no sane stack sends it (null, xmas, SYN+FIN, …)."""

_TCP = 6
_FRAGMENT = 44
_AUTHENTICATION = 51
# Extension headers whose second byte is a length in 8-byte units (RFC 8200, 4.2; RFC 7045).
_EXTENSIONS = frozenset({0, 43, 60, 135, 139, 140})
_MOST_EXTENSIONS = 16
_OPTION_END, _OPTION_NOP, _OPTION_SCALE = 0, 1, 3
_LARGEST_SCALE = 14  # RFC 7323, 2.3


class Packet(NamedTuple):
    """One TCP segment.

    Addresses are tagged integers (`rstguard.engine.address`), ports, numbers and window are as on
    the wire, `payload_length` is in bytes.  `state` holds what the kernel knows (`KNOWN`, `PROVEN`,
    `OUTBOUND`, `STRAY`).  `window_scale` is the SYN's shift count, or -1 if it offers none or
    nobody asked for it.

    What runs for every packet reads fields by their indices, which takes half the time: source 0,
    destination 1, source port 2, destination port 3, flags 6, state 9.
    """

    source: int  # 0
    destination: int  # 1
    source_port: int  # 2
    destination_port: int  # 3
    sequence: int  # 4
    acknowledgement: int  # 5
    flags: int  # 6
    window: int  # 7
    payload_length: int  # 8
    state: int = 0  # 9
    window_scale: int = -1  # 10

    def turned(self) -> Packet:
        """Return the segment with its ends exchanged: an outbound one as its client sees it."""
        return self._replace(
            source=self.destination,
            destination=self.source,
            source_port=self.destination_port,
            destination_port=self.source_port,
        )


class Malformed(NamedTuple):
    """Bytes that are no readable TCP segment, and why."""

    problem: str


_IPV4_TCP = Struct(">BxHxxHxBxxIIHHIIBBH")
_PORTS_ON = Struct(">HHIIBBH")
_IPV4 = Struct(">BxHxxHxBxxII")
_IPV6 = Struct(">IHBx")
_new = tuple.__new__


def parse(data: bytes, state: int = 0, want_scale: bool = False) -> Packet | Malformed:
    """Read an IP packet that begins at its first header byte.

    The data may be cut off after the TCP header: lengths come from the headers.  `state` is passed
    through.  With `want_scale` a SYN's options are searched for its window scale (RFC 7323, 2.2).
    """
    if len(data) >= 40 and data[0] == 0x45:
        (
            _, total, fragment, protocol, source, destination, source_port, destination_port,
            sequence, acknowledgement, offset, flags, window,
        ) = _IPV4_TCP.unpack_from(data)  # fmt: skip
        payload = (total or len(data)) - 20 - (offset >> 4 << 2)
        if protocol == _TCP and not fragment & 0x1FFF and offset >= 0x50 and payload >= 0:
            scale = _window_scale(data, 20) if want_scale and flags & SYN else -1
            fields = (
                source, destination, source_port, destination_port, sequence, acknowledgement,
                flags, window, payload, state, scale,
            )  # fmt: skip
            return _new(Packet, fields)
    return _parse_slowly(data, state, want_scale)


def _parse_slowly(data: bytes, state: int, want_scale: bool) -> Packet | Malformed:
    if not data:
        return Malformed("empty")
    version = data[0] >> 4
    if version == 4:
        found = _walk_ipv4(data)
    elif version == 6:
        found = _walk_ipv6(data)
    else:
        return Malformed(f"IP version {version}")
    if isinstance(found, Malformed):
        return found
    source, destination, start, end = found
    if len(data) < start + 20:
        return Malformed("TCP header cut off")
    ports_on = _PORTS_ON.unpack_from(data, start)
    source_port, destination_port, sequence, acknowledgement, offset, flags, window = ports_on
    payload = end - start - (offset >> 4 << 2)
    if offset < 0x50:
        return Malformed("TCP data offset below 5")
    if payload < 0:
        return Malformed("TCP header longer than the packet")
    scale = _window_scale(data, start) if want_scale and flags & SYN else -1
    return Packet(
        source, destination, source_port, destination_port, sequence, acknowledgement,
        flags, window, payload, state, scale,
    )  # fmt: skip


def _walk_ipv4(data: bytes) -> tuple[int, int, int, int] | Malformed:
    """Return source, destination, start of the TCP header, end of the packet."""
    if len(data) < 20:
        return Malformed("IPv4 header cut off")
    first, total, fragment, protocol, source, destination = _IPV4.unpack_from(data)
    length = (first & 15) << 2
    if length < 20:
        return Malformed("IPv4 header length below 5")
    if fragment & 0x1FFF:
        return Malformed("later fragment")
    if protocol != _TCP:
        return Malformed(f"protocol {protocol}")
    # A length of 0 is a segmentation-offload packet over 64 KiB (BIG TCP).
    return source, destination, length, total or len(data)


def _walk_ipv6(data: bytes) -> tuple[int, int, int, int] | Malformed:
    """Return source, destination, start of the TCP header, end of the packet."""
    if len(data) < 40:
        return Malformed("IPv6 header cut off")
    _, payload, following = _IPV6.unpack_from(data)
    source = int.from_bytes(data[8:24], "big") | V6
    destination = int.from_bytes(data[24:40], "big") | V6
    # A length of 0 is a jumbogram or a segmentation-offload packet over 64 KiB.
    end = 40 + payload if payload else len(data)
    start = 40
    for _ in range(_MOST_EXTENSIONS + 1):
        if following == _TCP:
            return source, destination, start, end
        if len(data) < start + 8:
            return Malformed("IPv6 extension header cut off")
        if following in _EXTENSIONS:
            length = (data[start + 1] + 1) << 3
        elif following == _AUTHENTICATION:
            length = (data[start + 1] + 2) << 2
        elif following == _FRAGMENT:
            if (data[start + 2] << 8 | data[start + 3]) & 0xFFF8:
                return Malformed("later fragment")
            length = 8
        else:
            return Malformed(f"protocol {following}")
        following = data[start]
        start += length
    return Malformed("too many IPv6 extension headers")


def options(data: bytes) -> dict[int, bytes]:
    """Return the TCP options of an IP packet by kind, each with its value (RFC 9293, 3.1).

    Reading ends at the first option that is cut off or has an impossible length; what is no TCP
    segment has no options.
    """
    version = data[0] >> 4 if data else 0
    found = _walk_ipv4(data) if version == 4 else _walk_ipv6(data) if version == 6 else None
    if found is None or isinstance(found, Malformed) or len(data) < found[2] + 20:
        return {}
    start = found[2]
    at, end = start + 20, min(start + (data[start + 12] >> 4 << 2), len(data))
    values: dict[int, bytes] = {}
    while at < end and data[at] != _OPTION_END:
        if data[at] == _OPTION_NOP:
            at += 1
            continue
        length = data[at + 1] if at + 1 < end else 0
        if length < 2 or at + length > end:
            break
        values[data[at]] = data[at + 2 : at + length]
        at += length
    return values


def _window_scale(data: bytes, start: int) -> int:
    """Return the window scale of a SYN whose TCP header begins at `start`, or -1."""
    at = start + 20
    end = min(start + (data[start + 12] >> 4 << 2), len(data))
    while at < end:
        kind = data[at]
        if kind == _OPTION_END:
            break
        if kind == _OPTION_NOP:
            at += 1
            continue
        if at + 1 >= end or data[at + 1] < 2:
            break
        if kind == _OPTION_SCALE and data[at + 1] == 3 and at + 2 < end:
            return min(data[at + 2], _LARGEST_SCALE)
        at += data[at + 1]
    return -1
