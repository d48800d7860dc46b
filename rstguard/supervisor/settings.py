"""The sysctls that the guard needs: named when it changes them, put back when others do.

A program that "tunes" the machine thinks itself alone as well.  Without accounting a connection
that begins shows no bytes for good, so the value is looked at as often as the rules are.
"""

from __future__ import annotations

import asyncio
from typing import Final

from rstguard.kernel.footprint import Footprint
from rstguard.kernel.sysctl import Change
from rstguard.observe.events import Event
from rstguard.supervisor.contention import LOOK_SECONDS, Contention
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.looking import keep_looking

_WHY: Final = {
    "net.netfilter.nf_conntrack_acct": "bytes of connections are counted",
    "net.netfilter.nf_conntrack_timestamp": "the age of connections is known",
}


class Settings:
    """Looks after the sysctls of one guard."""

    def __init__(self, guard: Guard, footprint: Footprint) -> None:
        self._guard, self._footprint = guard, footprint
        self._contention = Contention(
            guard.events, "sysctls", "sets back sysctls that rstguard needs", "was put back"
        )

    def tell_start(self) -> None:
        """Name the values that the start has changed, each in the log and by an event."""
        for change in self._footprint.changed:
            why = _WHY.get(change.name, "the tracker is exact")
            detail = f"set to {change.now} (was {change.before}) so that {why}; it is given back"
            self._guard.events.add(Event("sysctl", change.name, detail=f"{detail} at the end"))

    async def watch(self) -> None:
        """Put back what others change; does not end by itself."""
        await keep_looking(self._put_back, LOOK_SECONDS)

    async def _put_back(self) -> None:
        guard = self._guard
        async with guard.changing:
            guard.altered = tuple(await asyncio.to_thread(self._footprint.altered))
            if not guard.altered or not self._contention.due():
                return
            await asyncio.to_thread(self._footprint.set_again)
            lost = [_sentence(change) for change in guard.altered]
            guard.altered = ()
        self._contention.done(lost)


def _sentence(change: Change) -> str:
    return f"{change.name} = {change.before} by another program"
