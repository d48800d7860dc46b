"""Ages against a clock that is set: the kernel stamps connections with the clock on the wall.

Somebody sets that clock (`date -s`, NTP after a boot), and every connection seems to be hours
older.  So it is noted how far the wall's clock is ahead of the monotonic one, and when that changed
by more than clocks drift: what began before a step is measured by what was so then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

SMALLEST_STEP: Final = 500_000_000
"""Nanoseconds; a clock that is slewed is changed by less between two looks (adjtimex(2))."""
_MOST_STEPS: Final = 64


class _Era(NamedTuple):
    """For how long the wall's clock was so far ahead; its times are monotonic nanoseconds."""

    ahead: int
    began: int
    ended: int


class Ages:
    """Tells how long ago something began, by a time stamp of the wall's clock.

    What began before this object was made is measured by the clock as it was then.
    """

    def __init__(
        self,
        wall: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`wall` and `monotonic` tell nanoseconds."""
        self._wall, self._monotonic = wall, monotonic
        self._eras: deque[_Era] = deque(maxlen=_MOST_STEPS)
        self._looked_at = monotonic()
        self._ahead = wall() - self._looked_at
        self._since = 0
        self._now = self._looked_at

    def look(self) -> None:
        """Look at both clocks: it is to be done often, and before ages are asked for."""
        now = self._monotonic()
        ahead = self._wall() - now
        if abs(ahead - self._ahead) > SMALLEST_STEP:
            self._eras.append(_Era(self._ahead, self._since, now))
            self._since = self._looked_at  # the step was some time since then
        self._ahead = ahead
        self._now = self._looked_at = now

    @property
    def unset(self) -> int | None:
        """What to take a time stamp from, if the clock was never set: it gives the age, or below 0.

        None: ask `of` for each.
        """
        return None if self._eras else self._now + self._ahead

    def of(self, began: int) -> int:
        """Return how many nanoseconds ago, at the last look, the wall's clock showed `began`.

        If that was so twice, as the clock was put back, the later time is meant.
        """
        at = began - self._ahead
        if self._eras and not self._since <= at <= self._now:
            for era in reversed(self._eras):
                then = began - era.ahead
                if era.began <= then <= era.ended:
                    at = then
                    break
        return max(self._now - at, 0)
