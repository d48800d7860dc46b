"""Segments in somebody else's name, many of them fast: an attacker who sees no answers."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from struct import pack, pack_into

from rstguard.engine.wire import ACK, SYN
from tests.support.network import ThreeHosts

STEP = 65_000
"""How far apart guesses of an ACK number may be: the tracker takes one up to 66,000 too low."""
GUESSES = -(-(1 << 32) // STEP)
_SEQUENCE = 1_000_000


class Forger:
    """Sends from the client's host in the name of `source`, to one service."""

    def __init__(self, lab: ThreeHosts, source: str, target: str, port: int) -> None:
        self.v6 = ":" in target
        family = socket.AF_INET6 if self.v6 else socket.AF_INET
        with lab.inside("client"):
            self._raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self._raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._target, self._port = target, port
        self._ends = b"".join(socket.inet_pton(family, one) for one in (source, target))

    def __enter__(self) -> Forger:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def syns(self, ports: Iterable[int]) -> None:
        """Send a SYN from each of these ports."""
        for port in ports:
            self._raw.sendto(self._segment(port, SYN, _SEQUENCE), (self._target, 0))

    def acks(self, port: int, numbers: Iterable[int]) -> None:
        """Send what may be the first ACK after the SYN from this port, once for each number."""
        packet = self._segment(port, ACK, _SEQUENCE + 1)
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
        """Complete a handshake by trying: one of the ACKs is near enough for the tracker."""
        self.syns([port])
        self.acks(port, range(0, 1 << 32, STEP))

    def _segment(self, port: int, flags: int, sequence: int) -> bytearray:
        tcp = pack(">HHIIBBHHH", port, self._port, sequence, 0, 0x50, flags, 64240, 0, 0)
        total = sum(self._ends[n] << 8 | self._ends[n + 1] for n in range(0, len(self._ends), 2))
        total += 6 + len(tcp) + sum(tcp[n] << 8 | tcp[n + 1] for n in range(0, len(tcp), 2))
        total = (total & 0xFFFF) + (total >> 16)
        tcp = tcp[:16] + pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + tcp[18:]
        if self.v6:
            return bytearray(pack(">IHBB", 6 << 28, len(tcp), 6, 64) + self._ends + tcp)
        header = pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0)
        return bytearray(header + self._ends + tcp)
