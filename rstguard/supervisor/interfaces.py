"""Looks whether the protected interfaces are such that rules can see their traffic."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from rstguard.kernel import bypass
from rstguard.kernel.links import amiss, protected
from rstguard.kernel.seam import Kernel
from rstguard.kernel.untracked import Hits
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0


class Interfaces:
    """Keeps `guard.unseen`: what of the protected interfaces the rules do not see."""

    def __init__(self, kernel: Kernel, guard: Guard, hits: Hits) -> None:
        """`hits` reads the rules and their counters, again and again, for `Ingress`."""
        self._kernel, self._guard, self._hits = kernel, guard, hits
        self._rules: list[str] = []
        """As they were at the last look; the same are not compared twice."""
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
        rules, self._rules = self._rules, self._hits.printed
        if guard.diverts and not guard.panic and self._rules is not rules:
            here = protected(patterns, links)
            if self._taken.look(bypass.count(self._rules, here)):
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
