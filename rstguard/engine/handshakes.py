"""Which packets belong to one handshake: ports are used again, by a client that resets at once."""

from __future__ import annotations

from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import SYN, Packet

SAME_HANDSHAKE = 5 * SECOND
"""How long a first ACK may come once more: a client that closed by a RST uses its port at once."""
_SAME_NUMBERS = 1 << 12
"""Less than this is between the numbers that one server acknowledges before it has said much; what
a server draws for a new connection is further away a quarter of a millisecond later (RFC 6528;
Linux counts in 64 ns), and no client chooses it."""


def number_of(packet: Packet) -> int:
    """Return what tells a handshake from another one of the same ports.

    The SYN that the kernel opens for a returned cookie bears only the client's number.
    """
    return packet.sequence if packet.flags & SYN else packet.acknowledgement


def is_same_handshake(apart: int, elapsed: int) -> bool:
    """Tell whether two first ACKs of the same ports belong together.

    `apart` is the difference of their numbers, `elapsed` that of their times in nanoseconds.
    """
    return elapsed < SAME_HANDSHAKE and apart & 0xFFFFFFFF < _SAME_NUMBERS
