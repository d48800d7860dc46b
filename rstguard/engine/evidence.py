"""What a segment tells of a RST that is held back, whose sender was asked.  Pure.

A probe carries one byte and a sequence number that is far from the connection's, so that the byte
gets into no stream, and an acknowledgement number that nobody else knows.  Then

- an end that holds the connection answers with an ACK, and reports the byte that it has received
  before as a duplicate: a DSACK block equal to the probe's range (RFC 2883, 4; `tcp_send_dupack` in
  net/ipv4/tcp_input.c).  Without SACK it answers with a bare ACK, which anybody can forge who
  knows the connection's numbers, and which may have been on its way already;
- an end that does not know the connection answers with a RST whose sequence number is the probe's
  acknowledgement number (RFC 9293, 3.10.7.1).

A second RST or "some ACK" is no evidence: whoever forged the first can send those as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet

_MODULUS = 1 << 32
_OPTION_SACK = 5  # RFC 2018, 3
_BLOCK = 8


class Evidence(Enum):
    """What one segment of an end tells."""

    ALIVE = auto()
    """It has seen our probe and holds the connection."""
    DEAD = auto()
    """It has seen our probe and knows no such connection."""
    BARE = auto()
    """It speaks with the number that it would have; it may have seen a probe."""
    NOTHING = auto()


@dataclass(slots=True)
class Asked:
    """What one end of a connection was asked, and what it has told."""

    probes: list[int] = field(default_factory=list)
    """Sequence numbers of the probes' bytes."""
    nonces: list[int] = field(default_factory=list)
    """Their acknowledgement numbers."""

    def weigh(
        self, packet: Packet, block: tuple[int, int] | None, following: int | None
    ) -> Evidence:
        """Return what a segment of this end tells.

        Args:
            packet: the segment.
            block: the first SACK block that it carries (`first_block`).
            following: the sequence number that the end must go on with, if it is known.
        """
        kind = packet.flags & (FIN | SYN | RST | ACK)
        if kind & RST:
            return Evidence.DEAD if packet.sequence in self.nonces else Evidence.NOTHING
        if kind != ACK or not self.probes:
            return Evidence.NOTHING
        if block is not None:
            start, end = block
            whole = start in self.probes and (end - start) % _MODULUS == 1
            return Evidence.ALIVE if whole else Evidence.NOTHING
        if packet.payload_length or following not in (None, packet.sequence):
            return Evidence.NOTHING
        return Evidence.BARE


def first_block(options: dict[int, bytes]) -> tuple[int, int] | None:
    """Return the first SACK block of a segment's options: a DSACK comes first (RFC 2883, 4)."""
    blocks = options.get(_OPTION_SACK, b"")
    if len(blocks) < _BLOCK:
        return None
    return int.from_bytes(blocks[:4], "big"), int.from_bytes(blocks[4:8], "big")
