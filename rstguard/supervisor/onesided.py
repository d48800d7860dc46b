"""Tells of services of which only one side is seen."""

from __future__ import annotations

import asyncio
from typing import Final

from rstguard.engine.onesided import Told
from rstguard.engine.ruleset import SECOND
from rstguard.engine.service import Service
from rstguard.kernel import oneway
from rstguard.kernel.seam import Kernel
from rstguard.kernel.untracked import Hits
from rstguard.observe.events import Event
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

LOOK_SECONDS: Final = 2.0


class OneSided:
    """Looks at the sets of `rstguard.kernel.oneway`, and keeps `guard.one_sided`.

    At rest it asks for no set: the rules that fill them count, and these counters are read anyway.
    """

    def __init__(self, kernel: Kernel, guard: Guard, hits: Hits) -> None:
        """`hits` reads the rules and their counters, again and again, for `Ingress`."""
        self._kernel, self._guard, self._hits = kernel, guard, hits
        self._told = Told()
        self._noted: int | None = None
        self._found = False
        """Whether the last look at the sets found any service."""

    async def watch(self) -> None:
        """Look, and tell what has changed; does not end by itself."""
        await keep_looking(self._look, LOOK_SECONDS, "services seen from one side: %s")

    async def _look(self) -> None:
        noted, before = oneway.noted_so_far(self._hits.printed), self._noted
        self._noted = noted
        if noted == before and not self._found and not self._told.services:
            return
        there = await asyncio.to_thread(oneway.services, self._kernel)
        self._found = bool(there)
        answers: set[Service] = set()
        if there or self._told.services:  # a set that may be large, and is hardly ever asked for
            answers |= set(await asyncio.to_thread(oneway.services, self._kernel, oneway.ANSWERS))
        now = int(asyncio.get_running_loop().time() * SECOND)
        began, ended = self._told.look(there, answers, now)
        self._guard.one_sided = self._told.services
        for service in began:
            detail = "only one side is seen of it: its clients go on, and no answer passes here"
            self._guard.events.add(Event("one_sided", str(service), detail=detail))
        for service in ended:
            detail = "it has answered, or nobody has asked for ten minutes"
            self._guard.events.add(Event("one_sided", str(service), detail=f"no more: {detail}"))
