"""Looks whether traffic can come under the policy: interfaces, destinations, and what is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from rstguard.engine.ruleset import Scope
from rstguard.kernel import bypass, place
from rstguard.kernel.links import Link, protected
from rstguard.kernel.seam import Kernel
from rstguard.kernel.standing import amiss, unmatched
from rstguard.kernel.untracked import Hits
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 5.0
AROUND_SECONDS: Final = 30.0
"""How often addresses, routes and translations are looked at, or after another policy has come."""
_SHARE: Final = 20
"""Looking at those takes at most one part in so many of the time: rules may be very many."""


class Interfaces:
    """Keeps `guard.unseen`: what of the protected targets the rules do not see."""

    def __init__(self, kernel: Kernel, guard: Guard, hits: Hits) -> None:
        """`hits` reads the rules and their counters, again and again, for `Ingress`."""
        self._kernel, self._guard, self._hits = kernel, guard, hits
        self._rules: list[str] = []
        """As they were at the last look; the same are not compared twice."""
        self._taken = bypass.Taken()
        self._by_counters: tuple[str, ...] = ()
        self._place = place.Place()
        self._of: tuple[object, ...] = ()
        """For which destinations and ports that place was looked at."""
        self._again_at = 0.0

    async def look(self) -> None:
        """Look once, and tell what is new.

        Raises:
            KernelError: the kernel could not be asked.
        """
        guard, before = self._guard, self._guard.unseen
        scope = guard.ruleset.scope
        links = await asyncio.to_thread(self._kernel.links)
        await self._look_around(scope)
        here = self._place._replace(links=tuple(links))
        # That not one of the interfaces is here is told elsewhere: nothing is filtered then.
        gone = unmatched(scope.interfaces, (link.name for link in links))
        by_place = () if gone else tuple(one.sentence for one in amiss(scope, here))
        await self._compare(protected(scope.interfaces, links))
        guard.unseen = (*by_place, *self._by_counters)
        for problem in guard.unseen:
            if problem not in before:
                log.warning("%s", problem)
                guard.events.add(Event("unseen", "interfaces", detail=problem))

    async def _look_around(self, scope: Scope) -> None:
        """Look at what a policy that names destinations or ports depends on."""
        of, now = (scope.destinations, scope.ports), asyncio.get_running_loop().time()
        if of == self._of and now < self._again_at:
            return
        if not scope.destinations and scope.ports is None:
            self._place = place.Place()
        else:
            self._place = await asyncio.to_thread(place.look, self._kernel, scope.destinations)
        took = asyncio.get_running_loop().time() - now
        self._of, self._again_at = of, now + max(AROUND_SECONDS, _SHARE * took)

    async def _compare(self, here: list[Link]) -> None:
        """Compare what these interfaces received with what the rules have seen."""
        guard = self._guard
        rules, self._rules = self._rules, self._hits.printed
        if not guard.diverts or guard.panic or self._rules is rules:
            return
        if self._taken.look(bypass.count(self._rules, here), self._hits.replaced):
            self._by_counters = ()
            if where := self._taken.told:
                found = await asyncio.to_thread(bypass.suspects, self._kernel, here)
                names = [link.name for link in here]
                self._by_counters = (bypass.sentence(where, names, found),)

    async def watch(self) -> None:
        """Look every few seconds; does not end by itself."""
        await keep_looking(self.look, LOOK_SECONDS, "the protected interfaces: %s", at_once=True)
