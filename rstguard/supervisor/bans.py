"""Bans and shuns: noted, counted against the cap, placed and lifted by hand.

Workers and the sweeper place bans by themselves and tell of them.  What follows from their number:

- A rule that bans in too many networks a minute is capped (`rstguard.supervisor.capped`).
- A network with too many banned members is gated: its other SYNs are dropped as well.
"""

from __future__ import annotations

import asyncio
import logging
import math
from itertools import compress
from typing import Final

from rstguard.engine.address import Prefix, is_v6
from rstguard.engine.capping import MOST_MEMBERS, Members
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Blocked, Recheck
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.names import BLOCK_SETS
from rstguard.kernel.placing import Placed, place
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.state.record import Record
from rstguard.supervisor.capped import Capped
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

MANUAL: Final = "manual"
"""The rule name of a ban that an administrator asked for."""
IMPORTED: Final = "imported"
"""The rule name of a ban that came from a list."""
_AGAIN_SECONDS: Final = 1.0
_MOST_GATES: Final = 4_096
"""Networks that wait to be gated while the kernel refuses."""


class Bans:
    """The bans of one guard."""

    def __init__(self, kernel: Kernel, guard: Guard, record: Record, capped: Capped) -> None:
        """Place and lift by `kernel`, remember in `record`, and have rules capped by `capped`."""
        self._kernel = kernel
        self._guard = guard
        self._record = record
        self._capped = capped
        self._members = Members()
        self._gates: dict[Prefix, tuple[Blocked, float]] = {}
        """Networks that are to be gated, each with the ban that was one too many, and till when."""
        self._wanted = asyncio.Event()

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
        element = message.element
        if message.reason is Reason.KILLED:
            return
        if element.kind == "ban" or message.withheld:
            self._capped.note(element.rule, element.source)
        if element.kind == "ban" and element.remaining is not None:
            now = asyncio.get_running_loop().time()
            gate = self._members.gate(element.source, now + element.remaining, now)
            if gate is not None and len(self._gates) < _MOST_GATES:
                self._gates[gate[0]] = message, gate[1]
                self._wanted.set()

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
            removed = await asyncio.to_thread(self._lift, source)
            # Others may have emptied the sets: what is remembered would have come back.
            removed = removed or await self._record.holds(str(source))
            self._record.unblocked(str(source))
            self._members.freed(source)
            self._gates.pop(source, None)
        if removed:
            self._guard.events.add(Event("unban", str(source), MANUAL))
        return bool(removed)

    async def listed(self) -> list[Element]:
        """Return who is banned and shunned, as the kernel has it."""
        return await asyncio.to_thread(self._listed)

    async def gate(self) -> None:
        """Gate the networks of which too many are banned; does not end by itself."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._gate()
            except KernelError as error:
                self._guard.unplaced_at = asyncio.get_running_loop().time()
                log.error("a network of which many are banned cannot be gated yet: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
                self._wanted.set()

    async def _gate(self) -> None:
        """Gate all at once: what one set refuses must not keep others waiting.

        Raises:
            KernelError: some were refused; they are kept.
        """
        now = asyncio.get_running_loop().time()
        wanted = {
            Element(network, "shun", ban.element.rule, math.ceil(until - now), True): ban.reason
            for network, (ban, until) in self._gates.items()
            if until > now
        }
        self._gates = {one: gate for one, gate in self._gates.items() if gate[1] > now}
        async with self._record.changing:
            there, error = await asyncio.to_thread(self._place, list(wanted))
            placed = list(compress(wanted, there))
            for element in placed:
                self._record.blocked_element(element)
        for element in placed:
            self._gates.pop(element.source, None)
            detail = f"for {element.remaining} s: more than {MOST_MEMBERS} sources of it are banned"
            network, why = str(element.source), wanted[element]
            self._guard.events.add(Event("gated", network, element.rule, why, detail))
        if error:
            raise KernelError(error)

    def _place(self, elements: list[Element]) -> Placed:
        with self._kernel.sets() as sets:
            return place(sets, elements)

    def _replace(self, element: Element) -> None:
        """Place a ban instead of whatever blocks its source by now, also in another set."""
        mine = BLOCK_SETS[is_v6(element.source.network) :: 2]
        with self._kernel.sets() as sets:
            sets.add([element], shorten=True)
            for name in mine:
                if name != element.set_name:
                    sets.take(name, [element.source])

    def _lift(self, source: Prefix) -> bool:
        with self._kernel.sets() as sets:
            return sets.remove(source)

    def _listed(self) -> list[Element]:
        with self._kernel.sets() as sets:
            return sets.list()
