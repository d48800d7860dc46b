"""Bans and shuns: noted, counted against the cap, placed and lifted by hand.

Workers and the sweeper place bans by themselves and tell of them.  A policy that bans too many in a
minute is taken for a mistake: it then only observes, and who was banned in that minute is free.
That is tried until it is true, and announced only then.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from itertools import compress
from typing import Final

from rstguard.engine.address import Prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Blocked, Recheck
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.placing import Placed, place
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.policy.load import Loaded
from rstguard.state.record import Record
from rstguard.supervisor.ban_cap import BanCap
from rstguard.supervisor.change import Change
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

MANUAL: Final = "manual"
"""The rule name of a ban that an administrator asked for."""
IMPORTED: Final = "imported"
"""The rule name of a ban that came from a list."""
_AGAIN_SECONDS: Final = 1.0


class Bans:
    """The bans of one guard."""

    def __init__(self, kernel: Kernel, guard: Guard, record: Record, change: Change) -> None:
        self._kernel = kernel
        self._guard = guard
        self._record = record
        self._change = change
        self._cap = BanCap()
        self._over = asyncio.Event()

    def heard(self, message: Blocked) -> None:
        """Note a ban or shun; a ban also ends the source's connections."""
        self._note(message, replaces=False)

    def _note(self, message: Blocked, replaces: bool) -> None:
        guard = self._guard
        element = message.element
        source, rule, detail = str(element.source), element.rule, f"for {element.remaining} s"
        event = Event(element.kind, source, rule, message.reason, detail, message.enforced)
        guard.events.add(event)
        if message.enforced:
            self._record.blocked(message, replaces)
            self._count(message)
            if message.by_worker:
                guard.sweeper.send(message)

    def _count(self, message: Blocked) -> None:
        if message.element.kind != "ban" or message.reason is Reason.KILLED:
            return
        guard = self._guard
        now = asyncio.get_running_loop().time()
        over = self._cap.over(message.element.source, guard.ruleset.bans_per_minute, now)
        if over and guard.ruleset.enforce:
            self._over.set()

    async def add(self, source: Prefix, seconds: int, keep_existing: bool) -> None:
        """Ban a source on an administrator's word.

        Raises:
            KernelError: the kernel refused.
        """
        element = Element(source, "ban", MANUAL, seconds, keep_existing)
        async with self._record.changing:
            try:
                await asyncio.to_thread(self._replace, element)
            except KernelError:
                self._guard.unplaced_at = asyncio.get_running_loop().time()
                raise
            self._note(Blocked(element, Reason.KILLED), replaces=True)

    async def add_list(self, elements: list[Element]) -> None:
        """Ban many sources, with one event for all: who they are is in the list.

        Raises:
            KernelError: the kernel refused some; the others are banned.
        """
        async with self._record.changing:
            there, error = await asyncio.to_thread(self._place, elements)
            banned = list(compress(elements, there))
            for element in banned:
                self._record.blocked_element(element)
        if banned:
            self._guard.events.add(Event("import", f"{len(banned)} sources", IMPORTED))
            self._guard.sweeper.send(Recheck())
        if error:
            self._guard.unplaced_at = asyncio.get_running_loop().time()
            raise KernelError(f"{len(banned)} of {len(elements)} sources are banned: {error}")

    async def remove(self, source: Prefix) -> bool:
        """Lift the ban or shun of exactly this prefix; tell whether there was one.

        Raises:
            KernelError: the kernel refused.
        """
        async with self._record.changing:
            removed = await asyncio.to_thread(self._lift, [source])
            # Others may have emptied the sets: what is remembered would have come back.
            removed = removed or await self._record.holds(str(source))
            self._record.unblocked(str(source))
        if removed:
            self._guard.events.add(Event("unban", str(source), MANUAL))
        return bool(removed)

    async def listed(self) -> list[Element]:
        """Return who is banned and shunned, as the kernel has it."""
        return await asyncio.to_thread(self._listed)

    async def watch(self) -> None:
        """Stop a policy that bans too many; does not end by itself."""
        while True:
            await self._over.wait()
            self._over.clear()
            await self._run_away(self._guard.loaded)

    async def _run_away(self, loaded: Loaded) -> None:
        """Let a policy only observe, and lift the bans of the last minute; try until it is so."""
        guard = self._guard

        def observing(now: RuleSet) -> RuleSet:
            # Whoever applied another policy meanwhile has judged for himself.
            return replace(now, enforce=False) if guard.loaded is loaded else now

        while guard.ruleset.enforce and guard.loaded is loaded:
            try:
                await self._change.rules(observing)
            except ControlError as error:
                log.error("the policy bans too many and cannot be stopped yet: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
        if guard.loaded is not loaded:
            return
        guard.runaway = (
            f"policy {guard.ruleset.name} banned more than {guard.ruleset.bans_per_minute} sources "
            "in a minute and only observes now: see `rstguard events`, fix it, and apply it again"
        )
        log.error("RUNAWAY POLICY: %s", guard.runaway)
        guard.events.add(Event("runaway", guard.ruleset.name, detail=guard.runaway))
        await self._free(self._cap.take())

    async def _free(self, sources: list[Prefix]) -> None:
        while sources:
            try:
                async with self._record.changing:
                    await asyncio.to_thread(self._lift, sources)
                    for source in sources:
                        self._record.unblocked(str(source))
                break
            except KernelError as error:
                log.error("the bans of the last minute cannot be lifted yet: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
        if sources:
            detail = "banned in the minute before the policy ran away"
            self._guard.events.add(Event("unban", f"{len(sources)} sources", detail=detail))

    def _place(self, elements: list[Element]) -> Placed:
        with self._kernel.sets() as sets:
            return place(sets, elements)

    def _replace(self, element: Element) -> None:
        """Place a ban instead of whatever blocks its source by now, also in another set."""
        other = element._replace(keep_existing=not element.keep_existing)
        with self._kernel.sets() as sets:
            sets.add([element], shorten=True)
            sets.take(other.set_name, [element.source])

    def _lift(self, sources: list[Prefix]) -> int:
        with self._kernel.sets() as sets:
            return sum(sets.remove(source) for source in sources)

    def _listed(self) -> list[Element]:
        with self._kernel.sets() as sets:
            return sets.list()
