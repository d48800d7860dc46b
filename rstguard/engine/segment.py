"""Build TCP segments: the emit side of `rstguard.engine.wire`.

A `Tuple` says who seems to send to whom.  Options are never sent: a segment without a timestamp is
not judged by PAWS (RFC 7323, 5.2), and a RST needs none (RFC 7323, 3.2).
"""

from __future__ import annotations

from struct import Struct

from rstguard.engine.address import is_v6, packed
from rstguard.engine.flow import Tuple
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet

_IPV4 = Struct(">BBHHHBBH4s4s")
_IPV6 = Struct(">IHBB16s16s")
_TCP = Struct(">HHIIBBHHH")
_LENGTH = Struct(">I")

_PROTOCOL = 6
_HOPS = 64
_DONT_FRAGMENT = 0x4000
_WINDOW = 512
"""Advertised by probes; should one fit the connection by chance, it must not stall the peer."""
_MODULUS = 1 << 32


def emit(packet: Packet) -> bytes:
    """Return an IP packet with the header fields of `packet`; its payload is zeros.

    Checksums are right, also the IPv4 header's.

    Raises:
        ValueError: the addresses are of different families, or a field is out of its range.
    """
    v6 = is_v6(packet.source)
    if v6 != is_v6(packet.destination):
        raise ValueError("source and destination are of different address families")
    source, destination = packed(packet.source), packed(packet.destination)
    head = (
        packet.source_port,
        packet.destination_port,
        packet.sequence,
        packet.acknowledgement,
        _TCP.size // 4 << 4,
        packet.flags,
        packet.window,
    )
    try:
        payload = bytes(packet.payload_length)
        blank = _TCP.pack(*head, 0, 0) + payload
        # The pseudo header of RFC 8200 (8.1) and that of RFC 9293 (3.1) have the same sum.
        pseudo = source + destination + _LENGTH.pack(len(blank)) + _LENGTH.pack(_PROTOCOL)
        even = blank + bytes(len(blank) % 2)
        segment = _TCP.pack(*head, checksum(pseudo + even), 0) + payload
    except Exception as error:
        raise ValueError(f"a header field is out of its range: {error}") from error
    if v6:
        return _IPV6.pack(6 << 28, len(segment), _PROTOCOL, _HOPS, source, destination) + segment
    fields = (0x45, 0, 20 + len(segment), 0, _DONT_FRAGMENT, _HOPS, _PROTOCOL)
    header = _IPV4.pack(*fields, 0, source, destination)
    return _IPV4.pack(*fields, checksum(header), source, destination) + segment


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of an even number of bytes.

    The one's complement sum of 16-bit words is the whole number modulo 65535.
    """
    return -int.from_bytes(data, "big") % 0xFFFF


def probe(path: Tuple, sequence: int, acknowledgement: int) -> bytes:
    """Return an ACK with one byte that makes the receiver speak.

    With a sequence number outside the receiver's window it must answer with an ACK that carries its
    own numbers (RFC 9293, 3.10.7.4, first step).  Linux answers each: only segments without data
    have to share one answer in 500 ms per socket, which an attacker could use up
    (tcp_oow_rate_limited in net/ipv4/tcp_input.c).

    No number of the connection need be known: take random ones.  The byte would get into the stream
    of a connection that is about to be reset if both fitted by chance, the sequence number into
    the receive window (tcp_sequence) and the other into what was sent lately (tcp_ack): two times
    1 in 65,536 for windows of 64 KiB, two times 1 in 1,024 for 4 MiB.
    """
    return emit(_packet(path, sequence, acknowledgement, ACK, _WINDOW)._replace(payload_length=1))


def opening(path: Tuple, sequence: int, acknowledgement: int | None = None) -> bytes:
    """Return a SYN, or with an acknowledgement number a SYN+ACK, of a connection that is there.

    Its receiver answers any with an ACK of its own numbers (RFC 5961, 4.2), if not more than once
    in 500 ms per socket.  Unlike a segment of random numbers it passes trackers that drop what does
    not fit: a SYN towards the end that was connected to, a SYN+ACK towards the one that connected
    (sIG in the tables of net/netfilter/nf_conntrack_proto_tcp.c).
    """
    flags = SYN if acknowledgement is None else SYN | ACK
    return emit(_packet(path, sequence, acknowledgement or 0, flags, _WINDOW))


def rst(path: Tuple, sequence: int) -> bytes:
    """Return a RST with the given sequence number, in [0, 2**32).

    A synchronized receiver obeys only the very number it expects next; another inside its window
    draws a challenge ACK (RFC 5961, 3.2; RFC 9293, 3.10.7.4).
    """
    return emit(_packet(path, sequence, 0, RST, 0))


def answer(offending: Packet) -> bytes | None:
    """Return the RST a closed port sends for a segment, or None for a RST (RFC 9293, 3.10.7.1).

    If the segment has an ACK, the RST takes its sequence number from it.  If not (a first SYN), the
    RST has sequence number 0 and acknowledges all that the segment occupies.
    """
    if offending.flags & RST:
        return None
    path = Tuple(
        offending.destination,
        offending.source,
        offending.destination_port,
        offending.source_port,
    )
    if offending.flags & ACK:
        return rst(path, offending.acknowledgement)
    occupied = offending.payload_length + bool(offending.flags & SYN) + bool(offending.flags & FIN)
    accepted = (offending.sequence + occupied) % _MODULUS
    return emit(_packet(path, 0, accepted, RST | ACK, 0))


def cookie_rst(opening: Packet) -> bytes:
    """Return the RST for a client whose connection is refused after it has returned a SYN cookie.

    It believes to be connected and would wait for ever.  The sequence number that it expects is
    known: `opening`, the SYN that SYNPROXY sends to the server in its name, keeps the cookie in the
    acknowledgement field (synproxy_send_server_syn in net/netfilter/nf_synproxy_core.c).
    """
    back = opening.turned()
    return rst(Tuple(*back[:4]), (opening.acknowledgement + 1) % _MODULUS)


def cookie_reminder(asking: Packet) -> bytes:
    """Return what has a client send the ACK of its SYN cookie once more, which was lost.

    The window of a cookie is zero until its ACK has come, so that whoever has data to send asks
    whether that has changed, again and again (RFC 9293, 3.8.6.1).  `asking` is such a segment: it
    bears the number before the first, so that SYNPROXY does not know it for the ACK of a cookie
    (tcp_xmit_probe_skb in net/ipv4/tcp_output.c).  To a bare ACK whose number was acknowledged
    already the client answers with what it would send next (RFC 9293, 3.10.7.4, first step).  If
    SYNPROXY took it for the ACK all the same, `asking` is the SYN that it sends to the server.
    """
    back, opening = asking.turned(), bool(asking.flags & SYN)
    before = asking.acknowledgement - (not opening)
    expects = asking.sequence + 1 + opening
    path = Tuple(*back[:4])
    return emit(_packet(path, before % _MODULUS, expects % _MODULUS, ACK, 0))


def _packet(path: Tuple, sequence: int, acknowledgement: int, flags: int, window: int) -> Packet:
    return Packet(
        path.source,
        path.destination,
        path.source_port,
        path.destination_port,
        sequence,
        acknowledgement,
        flags,
        window,
        0,
    )
