"""Many bans at once: what `rstguard ban import` sends, thousands at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from rstguard.engine.address import Prefix, parse_prefix
from rstguard.ipc.requests import ControlError, Request
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.supervisor.bans import IMPORTED, Bans
from rstguard.supervisor.protected import Protected

MOST_AT_ONCE = 25_000
"""A request of so many stays below the 2 MiB that the socket takes."""


class Imports:
    """Takes lists of bans for a guard."""

    def __init__(self, protected: Protected, bans: Bans) -> None:
        self._protected = protected
        self._bans = bans

    async def take(self, request: Request) -> object:
        """Ban all sources of the request, less those that are trusted or protected."""
        rows = request.get("bans")
        if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_AT_ONCE:
            raise ControlError(f'"bans" is a list of 1 to {MOST_AT_ONCE} pairs')
        elements, refused = await asyncio.to_thread(self._judge, rows)
        await self._bans.add_list(elements)
        return {"banned": len(elements), "refused": refused}

    def _judge(self, rows: list[Any]) -> tuple[list[Element], list[dict[str, str]]]:
        """Return whom to ban, and whom not and why."""
        refusal = self._protected.refusal()
        elements, refused = [], []
        for row in rows:
            source, seconds = _pair(row)
            if why := refusal(source):
                refused.append({"source": str(source), "why": why})
            else:
                elements.append(Element(source, "ban", IMPORTED, seconds))
        return elements, refused


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
