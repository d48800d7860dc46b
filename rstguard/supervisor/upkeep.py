"""What the guard looks after while it runs: rules that others removed, lifelines, the panic switch.

Other tools rewrite the firewall and think themselves alone.  What is missing is put back, but never
in a fight: if it goes on, the guard waits longer and longer, and says loudly who might be at work.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rstguard.engine.ruleset import RuleSet
from rstguard.kernel import KernelError, lifelines, owned
from rstguard.kernel.lifelines import Lifeline
from rstguard.observe.events import Event

if TYPE_CHECKING:
    from rstguard.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
LIFELINES_SECONDS: Final = 5.0
PANIC_NAME: Final = "panic"
"""A file of this name in the runtime directory: nothing is to be diverted."""
_CALM: Final = 60.0
"""Seconds without a loss after which the next one is mended at once again."""
_AT_ONCE: Final = 3
"""Losses that are mended at once; before each further one the guard waits twice as long."""
_LONGEST_WAIT: Final = 300.0
_MOST_ADMINISTRATORS: Final = 16
_SHARE: Final = 20
"""Looking takes at most one part in so many of the time."""


class BackOff:
    """When to mend: the first losses at once, then later and later.  Pure: time is given."""

    def __init__(self) -> None:
        self._losses = 0
        self._last = -_CALM
        self.not_before = 0.0

    def lost(self, now: float) -> bool:
        """Note a loss that is mended now; tell whether it looks like a fight."""
        if now - self._last > _CALM + self._wait:
            self._losses = 0
        self._losses += 1
        self._last = now
        self.not_before = now + self._wait
        return self._losses > _AT_ONCE

    @property
    def _wait(self) -> float:
        beyond = self._losses - _AT_ONCE
        return min(LOOK_SECONDS * 2.0**beyond, _LONGEST_WAIT) if beyond >= 0 else 0.0


class Upkeep:
    """Looks after one guard; `watch` runs until it is cancelled."""

    def __init__(self, guard: Supervisor) -> None:
        self._guard = guard
        self._back_off = BackOff()
        self._contested = False
        self._panic_file = guard.options.directory / PANIC_NAME
        self._administrators: list[str] = []
        self._found: tuple[Lifeline, ...] = ()
        self.lifelines: tuple[Lifeline, ...] = ()
        """Those that the policy in force spares."""
        self.panic = False
        """Whether all traffic passes because somebody said `rstguard panic`."""

    def spare(self, ruleset: RuleSet) -> RuleSet:
        """Return a policy that spares the lifelines that were found last."""
        spared = tuple(line.address for line in self._found)
        return replace(ruleset, scope=replace(ruleset.scope, spared=spared))

    def look_for_lifelines(self) -> None:
        """Find them anew; takes some milliseconds, and longer with many routes."""
        try:
            self._found = lifelines.find(self._administrators)
        except (KernelError, OSError) as error:
            log.error("own addresses and next hops could not be read: %s", error)

    def spares(self, ruleset: RuleSet) -> None:
        """Note that this policy is in force: only now are its lifelines told to anybody."""
        spared = set(ruleset.scope.spared)
        self.lifelines = tuple(line for line in self._found if line.address in spared)

    def administrator(self, address: object) -> None:
        """Spare from now on who gives a command over SSH; the latest few are remembered."""
        if isinstance(address, str) and lifelines.is_address(address):
            if address in self._administrators:
                self._administrators.remove(address)
            self._administrators.append(address)
            del self._administrators[:-_MOST_ADMINISTRATORS]

    async def begin(self) -> None:
        """Divert packets for the first time, unless the panic switch is on.

        Raises:
            KernelError: iptables refused.
        """
        if await asyncio.to_thread(owned.exists, self._panic_file):
            await self._switch(panic=True)
        else:
            await asyncio.to_thread(self._guard.footprint.divert, self._guard.ruleset)

    async def watch(self) -> None:
        """Look after the guard; does not end by itself."""
        wait, lifelines_at = LOOK_SECONDS, time.monotonic() + LIFELINES_SECONDS
        while True:
            await asyncio.sleep(wait)
            began = time.monotonic()
            try:
                await self.look()
                looked = time.monotonic()
                # Where there are very many rules or routes, looking is dear and done less often.
                wait = max(LOOK_SECONDS, _SHARE * (looked - began))
                if looked >= lifelines_at:
                    await self.refresh_lifelines()
                    took = time.monotonic() - looked
                    lifelines_at = looked + max(LIFELINES_SECONDS, _SHARE * took)
            except KernelError as error:
                log.error("%s", error)
            except Exception:
                log.exception("looking after the rules failed; it is tried again")

    async def refresh_lifelines(self) -> None:
        """Spare who has come, and no longer who has gone.

        Raises:
            KernelError: the sets refused.
        """
        await asyncio.to_thread(self.look_for_lifelines)
        if self.spare(self._guard.ruleset) != self._guard.ruleset:
            await self._guard.change_ruleset(self.spare)
        else:
            self.spares(self._guard.ruleset)  # what an address is may have changed

    async def look(self) -> None:
        """Obey the panic switch, or put back what others took away.

        Raises:
            KernelError: it could not be put back.
        """
        guard = self._guard
        wanted = await asyncio.to_thread(owned.exists, self._panic_file)
        if wanted != self.panic:
            await self._switch(wanted)
        if self.panic:
            return
        async with guard.changing:
            lost = await asyncio.to_thread(guard.footprint.lost, guard.ruleset)
            now = time.monotonic()
            if not lost or now < self._back_off.not_before:
                return
            fight = self._back_off.lost(now)
            await asyncio.to_thread(guard.footprint.mend, guard.ruleset)
            await asyncio.to_thread(guard.record.bring_back)
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        guard.events.add(Event("mended", "rules", detail=f"{lost[0]}{more} had been taken away"))
        if not fight:
            self._contested = False
        elif not self._contested:
            self._contested = True
            log.error(
                "another program takes rstguard's rules away again and again (%s): find it, such "
                "as a firewall that is reloaded by a timer, or stop one of the two; they are put "
                "back less and less often",
                lost[0],
            )
            guard.events.add(Event("contested", "rules", detail=lost[0]))

    async def _switch(self, panic: bool) -> None:
        guard = self._guard
        async with guard.changing:
            self.panic = panic
            if panic:
                await asyncio.to_thread(guard.footprint.withdraw)
            else:
                await asyncio.to_thread(guard.footprint.mend, guard.ruleset)
        if panic:
            log.error("PANIC: all traffic passes until `rstguard panic --end`")
        said = "all traffic passes" if panic else "the guard is at work again"
        guard.events.add(Event("panic", "guard", detail=said))
