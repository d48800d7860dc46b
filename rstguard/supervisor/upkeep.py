"""What the guard looks after while it runs: rules that others removed, and the panic switch.

Other tools rewrite the firewall and think themselves alone.  What is missing is put back, but never
in a fight (`rstguard.supervisor.contention`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rstguard.engine.offers import Offer
from rstguard.engine.service import Service
from rstguard.kernel import KernelError, Undone, owned, standing
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.state.record import Record
from rstguard.supervisor.contention import LOOK_SECONDS, Contention
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

PANIC_SECONDS: Final = 0.25
"""How often the panic file is looked for: a panic that ends a second later is told, too."""
PANIC_NAME: Final = "panic"
"""A file of this name in the runtime directory: nothing is to be diverted."""
_LONGEST_SECONDS: Final = 30.0
_SHARE: Final = 20
"""Looking takes at most one part in so many of the time."""


class Upkeep:
    """Looks after the rules of one guard."""

    def __init__(
        self, kernel: Kernel, guard: Guard, footprint: Footprint, record: Record, directory: Path
    ) -> None:
        self._kernel = kernel
        self._guard = guard
        self._footprint = footprint
        self._record = record
        self._panic_file = directory / PANIC_NAME
        self._contention = Contention(
            guard.events, "rules", "takes rstguard's rules away", "had been taken away"
        )
        self._withdrawn = False
        self._looking: asyncio.Task[None] | None = None
        self._complaints: deque[str] = deque(maxlen=4)
        self._looked_for = 0.0
        """How many seconds the last look took."""

    async def begin(self) -> None:
        """Divert packets for the first time, unless the panic switch is on.

        Raises:
            KernelError: iptables refused.
        """
        if await asyncio.to_thread(owned.exists, self._panic_file):
            await self._switch(panic=True)
        else:
            await asyncio.to_thread(self._footprint.divert, self._guard.ruleset)
        self._guard.diverts = True
        self._guard.unmatched = self._unmatched()

    async def watch_rules(self) -> None:
        """Put back what others take away; does not end by itself."""
        while True:
            # Where there are very many rules looking is dear, and done less often.
            wait = max(LOOK_SECONDS, _SHARE * self._looked_for)
            await asyncio.sleep(min(wait, _LONGEST_SECONDS))
            with self._complaining():
                await self._put_back()

    async def watch_panic(self) -> None:
        """Obey the panic switch; does not end by itself."""
        while True:
            with self._complaining():
                await self.obey_panic()
            await asyncio.sleep(PANIC_SECONDS)

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        """Say what goes wrong, to be tried again: once, not with each try."""
        try:
            yield
        except KernelError as error:
            if str(error) not in self._complaints:
                log.error("%s", error)
                self._complaints.append(str(error))

    async def obey_panic(self) -> None:
        """Look whether the panic switch is on, and do what it says.

        Raises:
            KernelError: the rules could not be taken away or put back.
        """
        wanted = owned.exists(self._panic_file)  # a stat in a directory of ours, in memory
        if wanted != self._withdrawn:
            await self._switch(wanted)

    async def rewrite(self, known: dict[Service, Offer]) -> None:
        """Put the rules in place for what servers were found to offer.

        Nobody may look meanwhile, who would miss the rules that are still to come.

        Raises:
            KernelError: iptables refused, and what was known before still is.
        """
        footprint = self._footprint
        async with self._guard.changing:
            before, footprint.known = footprint.known, known
            if self._guard.panic:
                return
            try:
                await asyncio.to_thread(footprint.divert, self._guard.ruleset)
            except KernelError:
                footprint.known = before
                raise

    async def look(self, seconds: float) -> None:
        """Find anew what is missing, for `status`; what takes longer than `seconds` goes on alone.

        All who ask meanwhile share one look.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._find())
        await asyncio.wait({self._looking}, timeout=seconds)

    async def _find(self) -> None:
        try:
            async with self._guard.changing:
                await self._missing()
        except KernelError as error:
            self._guard.missing = (str(error),)

    async def _missing(self) -> tuple[str, ...]:
        """Note what is not as it should be; `changing` is held."""
        guard, began = self._guard, asyncio.get_running_loop().time()
        lost = [] if guard.panic else await asyncio.to_thread(self._footprint.lost, guard.ruleset)
        if not guard.panic and (bans := await self._bans_lost()):
            lost.append(bans)
        self._looked_for = asyncio.get_running_loop().time() - began
        guard.missing = tuple(lost)
        guard.unmatched = self._unmatched()
        return guard.missing

    async def _bans_lost(self) -> str:
        """Tell in words that others have emptied sets of the banned, or return ""."""
        async with self._record.changing:
            known = await self._record.count()
            held = await asyncio.to_thread(self._kernel.blocked_by_kind) if known else {}
        lacking = known - held.get("ban", 0)
        return f"{lacking} bans that are remembered" if lacking > 0 else ""

    async def _put_back(self) -> None:
        guard = self._guard
        async with guard.changing:
            lost = await self._missing()
            if not lost or not self._contention.due():
                return
            try:
                await asyncio.to_thread(self._footprint.restore, guard.ruleset)
            except Undone:
                self._contention.tell(lost)
                raise
            await self._record.bring_back()
            guard.missing = ()
            self._complaints.clear()
        self._contention.done(lost)

    async def _switch(self, panic: bool) -> None:
        guard = self._guard
        async with guard.changing:
            if panic:
                self._tell(panic)  # at once: the command has taken the rules away already
                guard.missing = ()
                await asyncio.to_thread(self._footprint.withdraw)
            else:
                await asyncio.to_thread(self._footprint.restore, guard.ruleset)
                self._tell(panic)
            self._withdrawn = panic

    def _tell(self, panic: bool) -> None:
        if panic is self._guard.panic:
            return
        self._guard.panic = panic
        if panic:
            log.error("PANIC: all traffic passes until `rstguard panic --end`")
        said = "all traffic passes" if panic else "the guard is at work again"
        self._guard.events.add(Event("panic", "guard", detail=said))

    def _unmatched(self) -> str:
        """Return why no packet can come under the policy, or ""."""
        return standing.unmatched(self._guard.ruleset.scope.interfaces, self._kernel.interfaces())
