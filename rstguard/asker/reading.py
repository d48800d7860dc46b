"""What the asker reads of segments, and the segments that it asks by.  Pure."""

from __future__ import annotations

from rstguard.engine import wire
from rstguard.engine.address import is_v6
from rstguard.engine.questions import Probe
from rstguard.engine.segment import opening, probe
from rstguard.engine.wire import Packet

Read = tuple[Packet, dict[int, bytes], int]
"""A segment, its options by kind, and the hops that it has left (-1: not known)."""


def segment_of(asked: Probe) -> bytes:
    """Return the segment that asks a question."""
    if asked.opens or asked.acknowledgement is None:
        return opening(asked.path, asked.sequence, asked.acknowledgement)
    return probe(asked.path, asked.sequence, asked.acknowledgement)


def read_segment(data: Packet | bytes) -> Read | None:
    """Return a segment, its options and its remaining hops, or None if it cannot be read."""
    if isinstance(data, Packet):
        return data, {}, -1
    packet = wire.parse(data)
    if not isinstance(packet, Packet):
        return None
    hops = data[7] if is_v6(packet.source) else data[8]
    return packet, wire.options(data), hops
