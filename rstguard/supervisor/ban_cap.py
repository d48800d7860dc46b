"""A cap on bans: a policy that bans too many a minute is taken for a mistake.  Pure."""

from __future__ import annotations

from collections import deque

from rstguard.engine.address import Prefix

MINUTE = 60.0


class BanCap:
    """Counts the bans of the last minute, and knows whom they hit."""

    def __init__(self) -> None:
        self._bans: deque[tuple[float, Prefix]] = deque()

    def over(self, source: Prefix, most: int, now: float) -> bool:
        """Note a ban at `now` (seconds); tell whether there were more than `most` in a minute."""
        self._bans.append((now, source))
        while self._bans[0][0] <= now - MINUTE:
            self._bans.popleft()
        return len(self._bans) > most

    def take(self) -> list[Prefix]:
        """Return whom the bans of the last minute hit, and begin anew."""
        sources = list(dict.fromkeys(source for _, source in self._bans))
        self._bans.clear()
        return sources
