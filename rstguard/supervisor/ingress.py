"""What is dropped before the tracker: counted, told, and when spoofed segments begin to be dropped.

So is what the tracker does not know: dropped beyond a valve or a rule, or adopted.

Whatever seems to be spoofed is counted for some time first, so that who has routes that nobody
thought of can read of it before it hurts.  No number of such segments keeps them from being dropped
when that time is over: anybody can send them, and would so switch the measure off.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from typing import Final

from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.verdict import Reason
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.kernel.seam import Kernel
from rstguard.kernel.untracked import (
    ADOPTED,
    LIMITED,
    LOW_TTL,
    SPOOFED,
    SPOOFED_PASSED,
    STRAYS,
    Hits,
)
from rstguard.observe.events import Event
from rstguard.supervisor.change import Change
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
CALM_SECONDS: Final = 60.0
"""After so long without any, the next ones are told of."""
_REASONS: Final = {
    LOW_TTL: Reason.LOW_TTL,
    SPOOFED: Reason.SPOOFED,
    SPOOFED_PASSED: Reason.SPOOFED,
    STRAYS: Reason.STRAYS,
    **{name: Reason[name.upper()] for name in LIMITED},
}


class Ingress:
    """Looks after what the rules of `rstguard.kernel.ingress` drop."""

    def __init__(self, kernel: Kernel, guard: Guard, change: Change, hits: Hits) -> None:
        """Drop spoofed segments by `change`, when it is time; `hits` counts."""
        self._kernel, self._guard, self._change = kernel, guard, change
        self._hits = hits
        self._came: dict[str, float] = {}
        """When something was last counted, in seconds of the event loop's clock."""
        self._counts_for = self._settings(guard.ruleset)
        self._since = guard.started

    @property
    def counts(self) -> Counter[str]:
        """How many segments were dropped, and how many only counted, since the guard began."""
        return self._hits.total

    @property
    def drops_in(self) -> float | None:
        """Seconds until spoofed segments are dropped, or None: they are already, or never are."""
        ruleset = self._guard.ruleset
        if ruleset.drops_spoofed or ruleset.spoofed_after is None or not ruleset.enforce:
            return None
        now = asyncio.get_running_loop().time()
        return max(self._since + ruleset.spoofed_after / SECOND - now, 0.0)

    async def watch(self) -> None:
        """Count, tell, and drop when it is time; does not end by itself."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._tell(await asyncio.to_thread(self._hits.news, self._kernel))
                await self._drop_when_due()
            except (KernelError, ControlError) as error:
                log.error("what is dropped before the tracker: %s", error)

    def _tell(self, news: Counter[str]) -> None:
        now = asyncio.get_running_loop().time()
        for what, packets in news.items():
            if not packets:
                continue
            if now - self._came.get(what, -CALM_SECONDS) >= CALM_SECONDS:
                reason = _REASONS.get(what)
                event = Event(
                    "limited" if what in LIMITED else reason.code if reason else what,
                    "outside",
                    reason=reason,
                    detail=_detail(what, packets),
                    enforced=what != SPOOFED_PASSED,
                )
                self._guard.events.add(event)
            self._came[what] = now

    async def _drop_when_due(self) -> None:
        settings = self._settings(self._guard.ruleset)
        if settings != self._counts_for:  # what was seen so far was seen under another policy
            self._counts_for = settings
            self._since = asyncio.get_running_loop().time()
        if self.drops_in == 0:
            await self._change.rules(self._dropping)
            detail = "from now on such segments are dropped"
            self._guard.events.add(Event("spoofed", "outside", detail=detail))

    def _dropping(self, ruleset: RuleSet) -> RuleSet:
        if self._settings(ruleset) != self._counts_for:
            return ruleset
        return replace(ruleset, drops_spoofed=True)

    @staticmethod
    def _settings(ruleset: RuleSet) -> tuple[object, ...]:
        scope = ruleset.scope
        return ruleset.enforce, ruleset.spoofed_after, scope.interfaces, scope.destinations


def _detail(what: str, packets: int) -> str:
    if what == ADOPTED:
        return f"{packets} connection{'s' * (packets != 1)}: age and window scale are not known"
    count = f"{packets} segment" + "s" * (packets != 1)
    if what == STRAYS or what in LIMITED:
        return f"{count} dropped"
    if what == SPOOFED_PASSED:
        return f"{count}, only counted so far"
    return f"{count} dropped before the connection tracker"
