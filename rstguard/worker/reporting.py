"""What a worker tells of its packets: counts twice a second, and some decisions one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from rstguard.engine.ruleset import SECOND
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import Counts

_EVERY: Final = SECOND // 2
_MOST: Final = 50
"""Refused SYNs and observations of one rule that are told one by one between two counts."""


class Reporting:
    """Counts, and tells the supervisor."""

    def __init__(self, channel: ChildEnd) -> None:
        """Tell it by `channel`."""
        self._channel = channel
        self.send = channel.send
        self.counts: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._due_at = 0

    def worth_telling(self, rule: str) -> bool:
        """Let some reports of a rule through between two counts; those tell of a flood."""
        told = self._told[rule] = self._told.get(rule, 0) + 1
        self.counts["reports_left_out"] += told > _MOST
        return told <= _MOST

    def due(self, now: int) -> bool:
        """Tell whether counts are to be told again (`now` in monotonic nanoseconds)."""
        return now >= self._due_at

    def tell(self, now: int, more: Mapping[str, int]) -> None:
        """Tell the counts, with `more` that others count.

        Raises:
            Closed: the supervisor is gone.
        """
        self._due_at = now + _EVERY
        self._told.clear()
        extra = {**more, "lost_reports": self._channel.lost}
        self._channel.send(Counts(self.counts | extra))
