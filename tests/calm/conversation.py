"""One connection of a kind of client, segment by segment, as a gateway near the server sees it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import chain, repeat
from struct import Struct
from typing import Final

from rstguard.engine.address import is_v6, packed
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN
from tests.calm.kinds import LOST, LOST_AGAIN, ROUND_TRIPS, End, Kind, Range, Turn

Segment = tuple[float, bytes]
"""When it passes (seconds from the beginning), and the IP packet without its payload."""

_MOST: Final = 60_000
"""Bytes in one packet at most: so the kernel hands them on where cards put segments together."""
_NEAR: Final = 0.0004
"""Seconds from the gateway to the server and back."""
_PROBE_FIRST, _PROBE_LONGEST = 0.5, 60.0
"""Seconds between two probes of a closed window, growing twofold (RFC 9293, 3.8.6.1)."""
_FIN_AGAIN: Final = 5
"""How often a server sends its FIN to a client that is gone."""

_OPTIONS: Final = bytes((1, 1, 8, 10)) + bytes(8)
"""Time stamps, which nearly every stack sends."""
_SYN_OPTIONS: Final = bytes((2, 4, 5, 180, 4, 2, 8, 10)) + bytes(8) + bytes((1, 3, 3, 7))
_HEADER4: Final = Struct(">2sH20sIIBBHI")
_HEADER6: Final = Struct(">4sH38sIIBBHI")


def drawn(draw: random.Random, span: Range) -> float:
    """Return a number of a range, even by its logarithm; from 0 on evenly by itself."""
    low, high = span
    if low <= 0 or low == high:
        return draw.uniform(low, high)
    return math.exp(draw.uniform(math.log(low), math.log(high)))


class Wire:
    """Lays out the segments of one connection, with the numbers of both ends.

    Args:
        client, server: tagged addresses of one family.
        client_port, server_port: 1 to 65535.
        draw: initial sequence numbers.
    """

    __slots__ = ("_ends", "_header", "_numbers", "window")

    def __init__(
        self, client: int, server: int, client_port: int, server_port: int, draw: random.Random
    ) -> None:
        here, there = packed(client), packed(server)
        ports = client_port.to_bytes(2, "big"), server_port.to_bytes(2, "big")
        first = b"\x06\x40" if is_v6(client) else b"\0\1\x40\0\x40\6\0\0"
        self._ends = (
            first + there + here + ports[1] + ports[0],
            first + here + there + ports[0] + ports[1],
        )
        self._header = (_HEADER6, b"\x60\0\0\0", 0) if is_v6(client) else (_HEADER4, b"E\0", 20)
        self._numbers = [draw.getrandbits(31), draw.getrandbits(31)]
        self.window = 64240

    def send(self, by_client: bool, flags: int = ACK, size: int = 0) -> bytes:
        """Return a segment with `size` bytes (0 to `_MOST`), and count what it takes."""
        options = _SYN_OPTIONS if flags & SYN else _OPTIONS
        header, start, length = self._header
        numbers = self._numbers
        own, other = numbers[by_client], numbers[not by_client]
        numbers[by_client] = own + size + (1 if flags & (SYN | FIN) else 0)
        return (
            header.pack(
                start,
                length + 20 + len(options) + size,
                self._ends[by_client],
                own & 0xFFFFFFFF,
                other & 0xFFFFFFFF if flags & ACK else 0,
                20 + len(options) << 2,
                flags,
                self.window if by_client else 64240,
                0,
            )
            + options
        )

    def repeat_syn(self) -> bytes:
        """Return the client's SYN once more."""
        self._numbers[True] -= 1
        return self.send(True, SYN)


def conversation(
    kind: Kind, wire: Wire, draw: random.Random, at: float, until: float, cut: bool
) -> Iterator[Segment]:
    """Yield the segments of one connection that begins at `at` and ends at about `until`.

    With `cut` the server ends it, whatever the kind says.
    """
    trip = drawn(draw, ROUND_TRIPS)
    yield at, wire.send(True, SYN)
    if draw.random() < LOST:
        at += LOST_AGAIN
        yield at, wire.repeat_syn()
    if kind.ends is End.REFUSED:
        yield at + _NEAR, wire.send(False, RST | ACK)
        return
    yield at + _NEAR, wire.send(False, SYN | ACK)
    at += trip
    yield at, wire.send(True)
    turns = chain(kind.opening, repeat(kind.going) if kind.going else ())
    for number, turn in enumerate(turns):
        assert turn is not None
        pause = drawn(draw, turn.pause)
        if number >= len(kind.opening) and at + pause >= until:
            break
        for one in _turn(turn, wire, draw, at + pause, trip):
            yield one
            at = one[0]
    if not kind.window:
        for one in _unread(wire, at, until, trip):
            yield one
            at = one[0]
    yield from _end(End.SERVER if cut else kind.ends, wire, max(at, until), trip)


def _turn(turn: Turn, wire: Wire, draw: random.Random, at: float, trip: float) -> Iterator[Segment]:
    says, answers = int(drawn(draw, turn.says)), int(drawn(draw, turn.answers))
    for by_client, size in ((True, says), (False, answers)):
        if not by_client and size:
            at += drawn(draw, turn.wait)
        for left in range(size, 0, -_MOST):
            yield at, wire.send(by_client, ACK | PSH, min(left, _MOST))
            if by_client and not answers and left <= _MOST:
                at += _NEAR
                yield at, wire.send(False)
            elif not by_client:
                at += trip
                yield at, wire.send(True)
    yield at, b""


def _unread(wire: Wire, at: float, until: float, trip: float) -> Iterator[Segment]:
    """The client's window is full: the server asks again and again until it reads on."""
    wire.window, pause = 0, _PROBE_FIRST
    yield at, wire.send(True)
    while at + pause < until:
        at += pause
        yield at, wire.send(False)
        at += trip
        yield at, wire.send(True)
        pause = min(2 * pause, _PROBE_LONGEST)
    wire.window = 64240
    yield max(at, until), wire.send(True)


def _end(end: End, wire: Wire, at: float, trip: float) -> Iterator[Segment]:
    if end is End.ABORT:
        yield at, wire.send(True, RST | ACK)
        return
    if end is End.VANISH:
        for number in range(_FIN_AGAIN):
            yield at + 2.0**number, wire.send(False, FIN | ACK)
        return
    first = end is End.CLIENT
    yield at, wire.send(first, FIN | ACK)
    at += _NEAR if first else trip
    yield at, wire.send(not first, FIN | ACK)
    yield at + (trip if first else _NEAR), wire.send(first)
