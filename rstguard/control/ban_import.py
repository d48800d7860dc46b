"""Many bans at once: what `rstguard ban import` sends, thousands at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rstguard.engine.address import Networks, Prefix, parse_prefix
from rstguard.ipc.messages import Recheck
from rstguard.ipc.requests import ControlError, Request
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.kernel.sets import Sets
from rstguard.observe.events import Event

if TYPE_CHECKING:
    from rstguard.supervisor.supervisor import Supervisor

IMPORTED = "imported"
"""The rule name of a ban that came from a list."""
MOST_AT_ONCE = 25_000
"""A request of so many stays below the 2 MiB that the socket takes."""


class Imports:
    """Takes lists of bans for a guard."""

    def __init__(self, guard: Supervisor) -> None:
        self._guard = guard

    async def take(self, request: Request) -> object:
        """Ban all sources of the request, less whom the policy trusts and the guard spares."""
        rows = request.get("bans")
        if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_AT_ONCE:
            raise ControlError(f'"bans" is a list of 1 to {MOST_AT_ONCE} pairs')
        elements, refused = await asyncio.to_thread(self._judge, rows)
        await asyncio.to_thread(_add, elements)
        for element in elements:
            self._guard.record.blocked_element(element)
        if elements:
            # One event for all: who they are is in the list, and in `ban list`.
            event = Event("import", f"{len(elements)} sources", IMPORTED)
            self._guard.events.add(event)
            self._guard.sweeper.send(Recheck())
        return {"banned": len(elements), "refused": refused}

    def _judge(self, rows: list[Any]) -> tuple[list[Element], list[dict[str, str]]]:
        """Return whom to ban, and whom not and why."""
        trusted = Networks(self._guard.ruleset.scope.trusted)
        lifelines = dict(self._guard.upkeep.lifelines)
        elements, refused = [], []
        for row in rows:
            source, seconds = _pair(row)
            why = ""
            if found := trusted.meets(source):
                why = f"it meets the trusted network {found} of the policy"
            elif source in lifelines:
                why = f"it is {lifelines[source]}"
            if why:
                refused.append({"source": str(source), "why": why})
            else:
                elements.append(Element(source, "ban", IMPORTED, seconds))
        return elements, refused


def _add(elements: list[Element]) -> None:
    with Sets() as sets:
        sets.add(elements)


def _pair(row: Any) -> tuple[Prefix, int]:
    match row:
        case [str(text), int(seconds)] if 1 <= seconds <= MAX_SECONDS:
            try:
                prefix = parse_prefix(text)
            except ValueError as error:
                raise ControlError(f"{text!r} is no address or network ({error})") from None
            if prefix.length > 0:
                return prefix, seconds
    raise ControlError(f"a ban is a source and 1 to {MAX_SECONDS} seconds, not {str(row)[:60]}")
