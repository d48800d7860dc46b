"""A change of policy: every part that must follow is named, and undone in reverse order.

A change is whole or it has not been: if one part refuses, those that had followed go back, and the
policy that was in force stays.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.observe.events import Event
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import Loaded
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.protected import Protected

log = logging.getLogger(__name__)

Follow = Callable[[RuleSet, RuleSet], Awaitable[None]]
"""Goes from the first policy to the second; raises KernelError or TimeoutError if it cannot."""


class Follower(NamedTuple):
    """One part that must follow a policy, and its name."""

    name: str
    follow: Follow


class Change:
    """Changes the policy of a guard, everywhere."""

    def __init__(self, guard: Guard, protected: Protected, followers: Sequence[Follower]) -> None:
        """`followers` are told in this order, and go back in the reverse one."""
        self._guard = guard
        self._protected = protected
        self._followers = followers

    async def apply(self, loaded: Loaded, file: str) -> None:
        """Put a policy in force; unchanged rules keep their counts, no packet is lost.

        Raises:
            ControlError: a part refused; the old policy is in force.
        """
        guard = self._guard
        await self._protected.look()
        new = self._protected.within(compile_policy(loaded.policy))
        async with guard.changing:
            await self._change(guard.ruleset, new)
            guard.loaded, guard.file = loaded, file
        guard.events.add(Event("policy", new.name, detail=guard.mode))

    async def rules(self, change: Callable[[RuleSet], RuleSet]) -> None:
        """Change the compiled policy; `change` is given it once nobody else changes it.

        Raises:
            ControlError: a part refused; the old one is in force.
        """
        async with self._guard.changing:
            old = self._guard.ruleset
            new = change(old)
            if new != old:
                await self._change(old, new)

    async def _change(self, old: RuleSet, new: RuleSet) -> None:
        done: list[Follower] = []
        # A process that starts meanwhile starts with the new one.
        self._guard.ruleset = new
        try:
            for follower in self._followers:
                done.append(follower)
                await follower.follow(old, new)
        except (KernelError, TimeoutError) as error:
            self._guard.ruleset = old
            await self._undo(done, new, old)
            said = str(error) or "a process of the guard did not answer in time"
            sentence = f"the policy was not applied, the old one stays: {said}"
            raise ControlError(sentence) from None

    async def _undo(self, done: list[Follower], new: RuleSet, old: RuleSet) -> None:
        for follower in reversed(done):
            try:
                await follower.follow(new, old)
            except (KernelError, TimeoutError) as error:
                log.error("%s could not go back to the old policy: %s", follower.name, error)
