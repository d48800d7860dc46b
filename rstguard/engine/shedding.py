"""Load shedding: what a worker leaves undone while its queue fills, in a fixed order.

1. **Strays**: segments of no connection and with impossible flags pass without being judged.  No
   honest client waits for them, and the server refuses them itself.
2. **Newcomers**: the first SYN of a source passes, or is dropped, unjudged, as `on_failure` says.
3. **SYNs**: so do all SYNs but those of sources that have proven their address lately.

What belongs to a connection is judged at every level.  From the first level on the sources of SYNs
are watched for heavy hitters: those that hold the worker up are shunned for a few seconds (a shun
needs no proof of address and passes by itself; nobody is banned on an estimate).
"""

from __future__ import annotations

from enum import IntEnum

from rstguard.engine.ruleset import SECOND


class Level(IntEnum):
    """How much is left undone; each level includes those before it."""

    NOTHING = 0
    STRAYS = 1
    NEWCOMERS = 2
    SYNS = 3


UNDONE = {
    Level.NOTHING: "everything is judged again",
    Level.STRAYS: "segments of no connection are not judged",
    Level.NEWCOMERS: "first SYNs of new sources are not judged either",
    Level.SYNS: "only SYNs of sources that have proven their address are judged",
}
"""What a worker leaves undone at each level of overload."""

_HOLD = SECOND
"""A level is left when the queue has been shorter than half of what it begins at for so long."""


class Shedding:
    """The level, from a queue's length and losses.  Pure: call `look` as often as is convenient.

    Level 1 begins with the queue a quarter full, 2 with half, 3 with three quarters or a packet
    lost.  Levels are left one by one, each after a second below half of its beginning.

    Args:
        length: packets that the queue can hold.
    """

    def __init__(self, length: int) -> None:
        self.level = Level.NOTHING
        self._quarter = length // 4
        self._lost = 0
        self._calm_since: int | None = None

    def look(self, waiting: int, lost: int, now: int) -> Level:
        """Return the level for `waiting` packets and `lost` ones so far, at `now` (nanoseconds)."""
        wanted = min(Level.SYNS, waiting // self._quarter)
        if lost > self._lost:
            wanted = Level.SYNS
        self._lost = lost
        if wanted >= self.level:
            self.level, self._calm_since = Level(wanted), None
        elif waiting * 2 >= self._quarter * self.level:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= _HOLD:
            self.level = Level(self.level - 1)
            self._calm_since = now
        return self.level
