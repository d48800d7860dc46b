"""Segments that a socket must answer, but for its limit on such answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Tuple
from rstguard.engine.segment import emit
from rstguard.engine.wire import ACK, Packet
from rstguard.lab.forging import numbers, raw_socket
from tests.support.beside import beside
from tests.support.network import ThreeHosts


@contextmanager
def odd_segments(lab: ThreeHosts, client: socket.socket) -> Iterator[None]:
    """Send 500 segments a second that the server answers with an ACK, as often as it may."""
    sends, expects = numbers(client)
    (own, port), (there, service) = client.getsockname()[:2], client.getpeername()[:2]
    path = Tuple(parse_address(own), parse_address(there), port, service)
    # Just behind what was sent already: the tracker takes it, the server has to answer.
    old = emit(Packet(*path, (sends - 20) & 0xFFFFFFFF, expects, ACK, 512, 0))
    with lab.inside("client"):
        raw = raw_socket(":" in there)
    with raw, beside(lambda: raw.sendto(old, (there, 0)), 0.002):
        yield
