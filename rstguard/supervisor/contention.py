"""Puts back what other programs change, but never in a fight.

What is missing is put back at once the first times; if it goes on, the guard waits longer and
longer, and says loudly who might be at work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from rstguard.observe.events import Event, EventLog
from rstguard.supervisor.backoff import Backoff

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
"""How often it is looked whether everything is still there."""


def contention() -> Backoff:
    """Return when to put things back: three times at once, then at most every five minutes."""
    return Backoff(at_once=3, first=2 * LOOK_SECONDS, longest=300.0, calm=60.0)


class Contention:
    """When one kind of thing may be put back, and what is told of it."""

    def __init__(self, events: EventLog, subject: str, whose: str, how: str) -> None:
        """Tell of `subject` in events; the log says who `whose` things `how`, if it goes on.

        Args:
            events: where it is told.
            subject: of the events, "rules" or "sysctls".
            whose: the words of the log for it, such as "takes rstguard's rules away".
            how: the words of the event, such as "had been taken away".
        """
        self._events, self._subject = events, subject
        self._whose, self._how = whose, how
        self._backoff = contention()
        self._not_before = 0.0
        self._told = False

    def due(self) -> bool:
        """Tell whether to put back now; counts as a try if so."""
        now = asyncio.get_running_loop().time()
        if now < self._not_before:
            return False
        self._not_before = now + self._backoff.failed(now)
        return True

    def done(self, lost: Sequence[str]) -> None:
        """Tell that what was `lost`, in words, has been put back."""
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        detail = f"{lost[0]}{more} {self._how}"
        self._events.add(Event("restored", self._subject, detail=detail))
        self.tell(lost)

    def tell(self, lost: Sequence[str]) -> None:
        """Tell of a fight if there is one; what is `lost` may or may not have been put back."""
        if not self._backoff.persists:
            self._told = False
        elif not self._told:
            self._told = True
            log.error(
                "another program %s again and again (%s): find it, such as a firewall or a "
                "configuration that is loaded by a timer, or stop one of the two; they are put "
                "back less and less often",
                self._whose,
                lost[0],
            )
            self._events.add(Event("conflict", self._subject, detail=lost[0]))
