"""Looks whether other programs use the guard's bits of marks, and tells of it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from rstguard.kernel import foreign
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 30.0
_FIRST_SECONDS: Final = 2.0


class ForeignMarks:
    """Looks at the start, soon again, and then every half a minute.

    `problems` and `counts` are of the last look.
    """

    def __init__(self, kernel: Kernel, guard: Guard) -> None:
        """Ask `kernel`, and tell by the events of `guard`."""
        self._kernel, self._guard = kernel, guard
        self._seen: Counter[str] = Counter()
        self._told: set[str] = set()
        self.problems: tuple[str, ...] = ()
        self.counts: Counter[str] = Counter()
        """By `foreign.CLEARED` and `SPARED`, since the guard began."""

    async def watch(self) -> None:
        """Look again and again; does not end by itself."""
        wait = _FIRST_SECONDS
        while True:
            await self.look()
            await asyncio.sleep(wait)
            wait = min(2 * wait, LOOK_SECONDS)

    async def look(self) -> None:
        """Look once, and tell what was not told before."""
        found = await asyncio.to_thread(foreign.look, self._kernel)
        for what, count in found.counts.items():
            last = self._seen[what]  # the kernel begins anew when the rules are replaced
            self.counts[what] += count - last if count >= last else count
        self._seen = found.counts
        self.problems = tuple(foreign.told(found, self._guard.ruleset.marks))
        for problem in self.problems:
            if problem not in self._told:
                log.warning("%s", problem)
                self._guard.events.add(Event("foreign_marks", "marks", detail=problem))
        self._told = set(self.problems)
