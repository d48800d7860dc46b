"""The addresses that no policy bans, shuns or resets: found, kept up to date, told.

Own addresses, next hops, name servers, and administrators (`rstguard.kernel.protected`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from rstguard.engine.address import Networks, Prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.kernel.protected import ProtectedAddress, is_address
from rstguard.kernel.seam import Kernel
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

Within = Callable[[RuleSet], RuleSet]

LOOK_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 60.0
SHARE: Final = 20
"""Looking takes at most one part in so many of the time: routes may be very many."""
_MOST_ADMINISTRATORS: Final = 16


class Protected:
    """Knows which addresses are protected."""

    def __init__(self, kernel: Kernel, guard: Guard) -> None:
        self._kernel = kernel
        self._guard = guard
        self._administrators: list[str] = []
        self._found: tuple[ProtectedAddress, ...] = ()
        self.addresses: tuple[ProtectedAddress, ...] = ()
        """Those that the policy in force protects."""

    def within(self, ruleset: RuleSet) -> RuleSet:
        """Return a policy that protects the addresses that were found last."""
        protected = tuple(line.address for line in self._found)
        return replace(ruleset, scope=replace(ruleset.scope, protected=protected))

    async def look(self) -> None:
        """Find them anew; takes some milliseconds, and longer with many routes."""
        try:
            self._found = await asyncio.to_thread(self._kernel.protected, self._administrators)
        except KernelError as error:
            log.error("own addresses and next hops could not be read: %s", error)

    async def follow(self, _old: RuleSet, new: RuleSet) -> None:
        """Note that this policy is in force: only now are its addresses told to anybody."""
        protected = set(new.scope.protected)
        self.addresses = tuple(line for line in self._found if line.address in protected)

    def administrator(self, address: object) -> None:
        """Protect from now on who gives a command over SSH; the latest few are remembered."""
        if isinstance(address, str) and is_address(address):
            if address in self._administrators:
                self._administrators.remove(address)
            self._administrators.append(address)
            del self._administrators[:-_MOST_ADMINISTRATORS]

    def refusal(self) -> Callable[[Prefix], str]:
        """Return what tells why a prefix may not be banned, or "": the one test of all bans."""
        trusted = Networks(self._guard.ruleset.scope.trusted)
        addresses = dict(self.addresses)

        def why(source: Prefix) -> str:
            if found := trusted.meets(source):
                return f"it meets the trusted network {found} of the policy"
            if what := addresses.get(source):
                return f"it is {what}, which is never banned"
            return ""

        return why

    async def watch(
        self, change: Callable[[Callable[[RuleSet], RuleSet]], Awaitable[None]]
    ) -> None:
        """Protect who has come, and no longer who has gone; does not end by itself.

        `change` puts the compiled policy in force that it is given a function for.
        """
        loop = asyncio.get_running_loop()
        wait = LOOK_SECONDS
        while True:
            await asyncio.sleep(wait)
            began = loop.time()
            await self.look()
            # Not what follows: a change may have to wait for another one.
            wait = min(max(LOOK_SECONDS, SHARE * (loop.time() - began)), LONGEST_SECONDS)
            ruleset = self._guard.ruleset
            try:
                if self.within(ruleset) != ruleset:
                    await change(self.within)
                else:
                    await self.follow(ruleset, ruleset)  # what an address is may have changed
            except ControlError as error:
                log.error("%s", error)
