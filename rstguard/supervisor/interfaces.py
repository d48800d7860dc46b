"""Looks whether the protected interfaces are such that rules can see their traffic."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from rstguard.kernel import bypass
from rstguard.kernel.links import amiss, protected
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0


class Interfaces:
    """Keeps `guard.unseen`: what of the protected interfaces the rules do not see."""

    def __init__(self, kernel: Kernel, guard: Guard) -> None:
        self._kernel, self._guard = kernel, guard
        self._taken = bypass.Taken()
        self._by_name: tuple[str, ...] = ()
        self._by_counters: tuple[str, ...] = ()

    async def look(self) -> None:
        """Look once, and tell what is new.

        Raises:
            KernelError: the kernel could not be asked.
        """
        guard, before = self._guard, self._guard.unseen
        patterns = guard.ruleset.scope.interfaces
        links = await asyncio.to_thread(self._kernel.links)
        self._by_name = amiss(patterns, links)
        if guard.diverts and not guard.panic:
            here = protected(patterns, links)
            counted = await asyncio.to_thread(bypass.count, self._kernel, here)
            if self._taken.look(counted):
                self._by_counters = ()
                if where := self._taken.told:
                    found = await asyncio.to_thread(bypass.suspects, self._kernel, here)
                    names = [link.name for link in here]
                    self._by_counters = (bypass.sentence(where, names, found),)
        guard.unseen = (*self._by_name, *self._by_counters)
        for problem in guard.unseen:
            if problem not in before:
                log.warning("%s", problem)
                guard.events.add(Event("unseen", "interfaces", detail=problem))

    async def watch(self) -> None:
        """Look every few seconds; does not end by itself."""
        await keep_looking(self.look, LOOK_SECONDS, "the protected interfaces: %s", at_once=True)
