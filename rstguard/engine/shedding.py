"""Load shedding: what a worker leaves undone while its queue fills, in a fixed order.

1. **Strays**: segments of no connection and with impossible flags pass without being judged.  No
   honest client waits for them, and the server refuses them itself.  What is beyond a rule the
   kernel has dropped before (`rstguard.kernel.limiting`), or has marked so: that is judged at every
   level, as is what the kernel cannot count.
2. **Newcomers**: the first SYN of a source passes, or is dropped, unjudged, as `on_failure` says.
3. **SYNs**: so do all SYNs but those of sources that have proven their address lately.
4. **Thinned**: the kernel does the same before the queue, so that nobody waits there behind a
   flood; one in sixteen still comes, by which the worker sees what goes on.

What belongs to a connection is judged at every level, and what a service may get at all (`syn_rate`
per service) holds at every level.  From the first level on the sources of SYNs
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
    THINNED = 4


SAMPLE = 16
"""Of SYNs without proof of address and of strays one in so many still comes to a thinned queue."""

SHED = {
    Level.NOTHING: "everything is judged again",
    Level.STRAYS: "segments of no connection within their limits are not judged",
    Level.NEWCOMERS: "first SYNs of new sources are not judged either",
    Level.SYNS: "only SYNs of sources that have proven their address are judged",
    Level.THINNED: f"of all other SYNs one in {SAMPLE} is looked at, the rest spare the queue",
}
"""What a worker leaves undone at each level of overload."""

_HOLD = SECOND
"""A level is left when the queue has been shorter than half of what it begins at for so long."""
_PRESSED = SECOND // 50
"""A queue that stays a quarter full for so long is thinned: longer than this clients wait."""
_WINDOW = SECOND // 2
"""Over which the arrivals at a thinned queue are counted."""
_LONGEST = 10 * SECOND
"""A thinned queue is opened after so long in any case, to see what then comes."""


class Shedding:
    """The level, from a queue's length and losses.  Pure: call `look` as often as is convenient.

    Level 1 begins with the queue a quarter full, 2 with half, 3 with three quarters or a packet
    lost, 4 when it stays a quarter full for 20 ms, in which as much was taken out.  Levels are left
    one by one: 4 when for a second less than half of what the worker could take seems to arrive, or
    after ten seconds, the others after a second below half of their beginning.  Where thinning
    leaves the queue as long as it was, it is not tried again for ten seconds.

    Args:
        length: packets that the queue can hold.
    """

    def __init__(self, length: int) -> None:
        self.level = Level.NOTHING
        self._quarter = length // 4
        self._lost = 0
        self._calm_since: int | None = None
        self._busy: tuple[int, int] | None = None
        """Since when the queue has been a quarter full, and what had been taken by then."""
        self._capacity = 0
        self._window = (0, 0)
        self._few = 0
        self._open_at = 0
        self._not_before = 0

    def look(self, waiting: int, lost: int, now: int, taken: int) -> Level:
        """Return the level for a queue at `now` (nanoseconds).

        `waiting` packets are in it; `lost` it could not hold and `taken` came out of it so far.
        """
        losing, self._lost = lost > self._lost, lost
        if self.level is Level.THINNED:
            self._look_at_sample(waiting, now, taken)
            return self.level
        wanted = Level.SYNS if losing else Level(min(Level.SYNS, waiting // self._quarter))
        self._step(wanted, waiting, now)
        if wanted is Level.NOTHING:
            self._busy = None
        elif self._busy is None:
            self._busy = now, taken
        elif self._is_pressed(*self._busy, now, taken) and now >= self._not_before:
            self._thin(*self._busy, now, taken)
        return self.level

    def _is_pressed(self, since: int, before: int, now: int, taken: int) -> bool:
        """Tell whether the worker is behind though it works: a pause of its own is made up for."""
        return now - since >= _PRESSED and taken - before >= self._quarter

    def _step(self, wanted: Level, waiting: int, now: int) -> None:
        """Go up at once, and down by one when the queue has been short for long enough."""
        if wanted >= self.level:
            self.level, self._calm_since = wanted, None
        elif waiting * 2 >= self._quarter * self.level:
            self._calm_since = None
        elif self._calm_since is None:
            self._calm_since = now
        elif now - self._calm_since >= _HOLD:
            self.level = Level(self.level - 1)
            self._calm_since = now

    def _thin(self, since: int, before: int, now: int, taken: int) -> None:
        self._capacity = (taken - before) * SECOND // (now - since)
        self.level, self._open_at = Level.THINNED, now + _LONGEST
        self._window, self._few = (now, taken), 0

    def _look_at_sample(self, waiting: int, now: int, taken: int) -> None:
        began, before = self._window
        if now - began >= _WINDOW:
            arriving = (taken - before) * SAMPLE * SECOND // (now - began)
            self._few = self._few + 1 if arriving * 2 < self._capacity else 0
            self._window = now, taken
            if waiting >= self._quarter:  # it is something else that comes
                self._open_at, self._not_before = now, now + _LONGEST
        if self._few * _WINDOW >= _HOLD or now >= self._open_at:
            self.level = Level.SYNS
            self._busy = self._calm_since = None
