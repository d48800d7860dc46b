"""The mark bits that rstguard owns, on connections and on packets.

Eight adjacent high bits; everything below belongs to other software and is never changed.  A bit
means one thing on the connection (connmark) and another on a packet on its way into the queue,
where it tells the engine what the kernel knows (`rstguard.engine.wire`: KNOWN, PROVEN, …).
"""

from __future__ import annotations

from rstguard.engine import wire
from rstguard.engine.verdict import Ends

BASE = 24
"""Number of the lowest of the eight bits."""

MASK = 0xFF << BASE

# On the connection.
GUARDED = 1 << BASE
"""Began with a SYN that came in on a protected interface to a protected target."""
PROVEN = 2 << BASE
"""The kernel saw the handshake completed, so the source address is real."""
TRUSTED = 4 << BASE
"""Nothing of it needs to pass through the queue any more."""
CONDEMNED_SOURCE = 8 << BASE
"""Every further segment of the client is answered with a RST."""
CONDEMNED_DESTINATION = 16 << BASE
"""Every further segment of the server is answered with a RST."""
CONDEMNED = CONDEMNED_SOURCE | CONDEMNED_DESTINATION
TOLD_SOURCE = 64 << BASE
"""The client has been sent a RST: set by the rule in front of the one that sends it."""
TOLD_DESTINATION = 128 << BASE
"""The server has been sent a RST: likewise."""
TOLD = TOLD_SOURCE | TOLD_DESTINATION

# On a packet coming back from the queue: TRUSTED, CONDEMNED_SOURCE, CONDEMNED_DESTINATION as above.
VERDICT = TRUSTED | CONDEMNED

# On a packet on its way into the queue.  None of these is a verdict bit: a packet that passes
# because nobody reads the queue must not condemn its connection.
_APART = 32 << BASE
TO_QUEUE_KNOWN = 1 << BASE
TO_QUEUE_PROVEN = 2 << BASE
TO_QUEUE_OUTBOUND = TO_QUEUE_KNOWN | TO_QUEUE_PROVEN | _APART
TO_QUEUE_STRAY = _APART
TO_QUEUE_OVER = 64 << BASE


def _state(bits: int) -> int:
    known = bool(bits & TO_QUEUE_KNOWN)
    proven = bool(bits & TO_QUEUE_PROVEN)
    apart = bool(bits & _APART)
    return (
        wire.KNOWN * known
        | wire.PROVEN * proven
        | wire.OUTBOUND * (apart and known)
        | wire.STRAY * (apart and not known)
        | wire.OVER * bool(bits & TO_QUEUE_OVER)
    )


STATES = tuple(_state(bits << BASE) for bits in range(128))
"""The state bits of `rstguard.engine.wire` for ``mark >> BASE & 127`` of a queued packet."""

# On a packet that rstguard itself sends to provoke a silent end.
PROBE = MASK

CONDEMNED_FOR = {
    Ends.BOTH: CONDEMNED,
    Ends.SOURCE: CONDEMNED_SOURCE,
    Ends.DESTINATION: CONDEMNED_DESTINATION,
}
"""The bits that reset the named ends of a connection."""
