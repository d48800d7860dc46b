"""When to try again what failed: at first at once, then later and later.  Pure: time is given."""

from __future__ import annotations


class Backoff:
    """Counts failures that follow one another, and says how long to wait after each.

    All times are in seconds of one monotonic clock.
    """

    def __init__(
        self, at_once: int, first: float, longest: float, calm: float, weary: float | None = None
    ) -> None:
        """Wait for nothing after `at_once` failures, then twice as long each time.

        Args:
            at_once: failures after which the next try follows at once.
            first: the first wait, which doubles with each further failure.
            longest: the longest wait.
            calm: so long without a failure, and they are counted from one again.
            weary: the wait after a minute without any success, or None for `longest`.
        """
        self._at_once = at_once
        self._first = first
        self._longest = longest
        self._calm = calm
        self._weary = weary
        self._began = self._last = -calm
        self._wait = 0.0
        self.failures = 0

    @property
    def persists(self) -> bool:
        """Whether there were more failures than those after which the next try came at once."""
        return self.failures > self._at_once

    def succeeded(self, now: float) -> None:
        """Note that a try at last succeeded, be it for a moment."""
        self._began = now

    def failed(self, now: float) -> float:
        """Note a failure at `now`; return how long to wait."""
        if now - self._last > self._calm + self._wait:
            self.failures, self._began = 0, now
        self.failures += 1
        self._last = now
        beyond = self.failures - self._at_once
        self._wait = min(self._first * 2.0 ** min(beyond - 1, 32), self._longest) * (beyond > 0)
        if self._weary is not None and now - self._began > 60:
            self._wait = self._weary
        return self._wait
