"""Rules that ban too many are capped, and armed again when it is over.

A rule that bans in more networks a minute than the policy's `bans_per_minute` is a mistake of its
author, or in the hands of an attacker who wants the guard to hit as many as possible.  From then on
it shuns where it would ban; other rules go on, and what is banned stays so.  After some calm
minutes it bans again.  Each change is tried until it is true, and announced only then.  Another
policy begins with no rule capped.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Final

from rstguard.engine.address import Prefix
from rstguard.engine.capping import BanCap
from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.observe.events import Event
from rstguard.supervisor.change import Change
from rstguard.supervisor.guard import Guard

log = logging.getLogger(__name__)

MINUTE: Final = 60.0
CALM: Final = 180.0
"""Seconds without more than half the cap of a minute, after which a rule bans again."""
_AGAIN_SECONDS: Final = 1.0
_LOOK_SECONDS: Final = 10.0


class Capped:
    """Which rules of the policy in force are capped."""

    def __init__(self, guard: Guard, change: Change) -> None:
        """Cap the rules of `guard` by `change`."""
        self._guard = guard
        self._change = change
        self._cap = BanCap(MINUTE)
        self._policy = guard.loaded
        self._over: set[str] = set()
        self._restless: dict[str, float] = {}
        """Of each capped rule, when it last would have banned more than half of what it may."""
        self._wanted = asyncio.Event()

    def note(self, rule: str, source: Prefix) -> None:
        """Note a ban by a rule, or one that it would have placed."""
        guard, now = self._guard, asyncio.get_running_loop().time()
        if self._policy is not guard.loaded:
            self._policy = guard.loaded
            self._cap.forget()
            self._over.clear()
        over = self._cap.over(rule, source, guard.ruleset.bans_per_minute, now)
        if over and rule not in guard.ruleset.capped:
            self._over.add(rule)
            self._wanted.set()

    async def watch(self) -> None:
        """Cap rules and arm them again; does not end by itself."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_SECONDS if self._guard.ruleset.capped else None):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()
            try:
                for rule in sorted(self._over):
                    await self._put(rule, capped=True)
                    self._over.discard(rule)
                for rule in sorted(self._calm()):
                    await self._put(rule, capped=False)
            except ControlError as error:
                log.error("a rule that bans too many cannot be capped, or armed, yet: %s", error)
                await asyncio.sleep(_AGAIN_SECONDS)
                self._wanted.set()

    def _calm(self) -> list[str]:
        """Return the capped rules that have been calm for long enough."""
        guard, now = self._guard, asyncio.get_running_loop().time()
        capped = guard.ruleset.capped
        for rule in capped:
            if self._cap.count(rule, now) > guard.ruleset.bans_per_minute // 2:
                self._restless[rule] = now
        return [rule for rule in capped if now - self._restless.get(rule, now) >= CALM]

    async def _put(self, rule: str, capped: bool) -> None:
        """Cap a rule or arm it again, unless another policy has come meanwhile.

        Raises:
            ControlError: a part of the guard refused; nothing has changed.
        """
        guard, loaded = self._guard, self._policy

        def change(now: RuleSet) -> RuleSet:
            if guard.loaded is not loaded:
                return now
            return replace(now, capped=now.capped | {rule} if capped else now.capped - {rule})

        await self._change.rules(change)
        if guard.loaded is not loaded:
            return
        if capped:
            self._restless[rule] = asyncio.get_running_loop().time()
            detail = (
                f"banned sources of more than {guard.ruleset.bans_per_minute} networks in a "
                "minute: it shuns instead until it is calm; if the policy is wrong, apply another"
            )
            log.error("CAPPED: rule %s %s", rule, detail)
            guard.events.add(Event("capped", rule, rule, detail=detail))
        else:
            del self._restless[rule]
            guard.events.add(Event("rearmed", rule, rule, detail="it bans again"))
