"""Looks whether the connection table has room: without it nobody gets a connection."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from rstguard.kernel import tracker
from rstguard.kernel.seam import Kernel, Lost
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0
TOLD_SECONDS: Final = 60.0
"""For how long it is told that connections were dropped."""


class Fullness:
    """Keeps `guard.crowded`: why connections find no room in the table, or ""."""

    def __init__(self, kernel: Kernel, guard: Guard) -> None:
        self._kernel, self._guard = kernel, guard
        self._room = tracker.Room()
        self._until = 0.0

    async def watch(self) -> None:
        """Look every few seconds; does not end by itself."""
        await keep_looking(self.look, LOOK_SECONDS, "the connection table: %s", at_once=True)

    async def look(self) -> None:
        """Look once, and tell what is new.

        Raises:
            KernelError: the kernel could not be asked.
        """
        guard, now = self._guard, asyncio.get_running_loop().time()
        count, most, lost = await asyncio.to_thread(self._read)
        said = self._room.look(count, most, lost)
        if said:
            self._until = now + TOLD_SECONDS
            if not guard.crowded:
                log.warning("%s", said)
                guard.events.add(Event("table_full", "connections", detail=said))
        if said or now >= self._until:
            guard.crowded = said

    def _read(self) -> tuple[int, int, Lost]:
        with self._kernel.table() as table:
            return table.count(), tracker.look(self._kernel).most, table.lost()
