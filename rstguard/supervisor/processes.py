"""The guard's workers and its sweeper: what each is told when it starts, and a policy by all."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.messages import NewPolicy, News, Reply, Start, ToChild
from rstguard.observe.events import Event
from rstguard.state.record import Record
from rstguard.supervisor.asking import Asking
from rstguard.supervisor.child import Child, State
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.learning import Learning
from rstguard.supervisor.options import Options

log = logging.getLogger(__name__)

_ADOPT_SECONDS: Final = 10.0
"""Twice, if the old policy must come back, in the time a client waits."""
_WATCH_SECONDS: Final = 1.0
_STARVED_SECONDS: Final = 1.0
"""If this process woke so much too late, it was stopped or starved itself."""


class Processes:
    """All processes of a guard but this one."""

    def __init__(
        self,
        guard: Guard,
        record: Record,
        learning: Learning,
        hear: Callable[[News | Reply], None],
        options: Options,
    ) -> None:
        """Build them, and make them known to `guard`; nothing is started."""
        self._guard = guard
        self._record = record
        self._learning = learning
        self._generation = 0
        self._counted: Counter[str] = Counter()
        *workers, sweeper = options.spawned
        several = len(workers) > 1
        for index, first in enumerate(workers):
            queue = options.queue + index
            name = f"worker (queue {queue})" if several else "worker"
            start = self._starting(queue, index)
            guard.workers.append(
                Child(name, "worker", options.spawn, first, start, hear, self._changed)
            )
        start = self._starting(options.queue, 0)
        guard.sweepers.append(
            Child("sweeper", "sweeper", options.spawn, sweeper, start, hear, self._changed)
        )
        self.asking = Asking(guard, options, hear, self._changed)

    def _starting(self, queue: int, index: int) -> Callable[[], Iterable[ToChild]]:
        guard, record, learning = self._guard, self._record, self._learning
        return lambda: (
            Start(guard.ruleset, queue, index),
            guard.productive,
            guard.large_now(asyncio.get_running_loop().time()),
            *record.offences(),
            *learning.first(),
        )

    def _changed(self, child: Child, reason: str) -> None:
        """A process has another state: say so, with the reason."""
        kind = "restart" if child.state is State.BACKOFF else "process"
        detail = f"{child.state.value}: {reason}" if reason else child.state.value
        self._guard.events.add(Event(kind, child.name, detail=detail))
        if child.state is State.BACKOFF:
            self._learning.died()

    async def begun(self, which: Iterable[Child]) -> None:
        """Wait until these serve for the first time.

        Raises:
            StartFailed: one cannot, and why.
        """
        await asyncio.gather(*(child.wait_served() for child in which))

    async def adopt(self, _old: RuleSet, new: RuleSet) -> None:
        """Have a policy taken up by all.

        Raises:
            TimeoutError: one gave no answer in time.
            KernelError: one that only this policy wants cannot serve.
        """
        await self.asking.follow(new)
        self._generation += 1
        message = NewPolicy(new, self._generation)
        await asyncio.gather(
            *(child.adopt(message, _ADOPT_SECONDS) for child in self._guard.children)
        )

    async def watch(self) -> None:
        """Kill a process that has fallen silent: it answers for no packet either.

        Does not end by itself.
        """
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _WATCH_SECONDS
            await asyncio.sleep(_WATCH_SECONDS)
            self._guard.events.tick()
            self._note_shortcomings(loop.time())
            if loop.time() - due > _STARVED_SECONDS:
                for child in self._guard.children:
                    child.forgive()
                continue
            for child in self._guard.children:
                if patience := child.overdue():
                    child.end(f"sent nothing for {patience:.0f} s")

    def _note_shortcomings(self, now: float) -> None:
        guard, counts = self._guard, self._guard.counts
        if counts["block_failed"] > self._counted["block_failed"]:
            guard.unplaced_at = now
        if counts["shed"] > self._counted["shed"]:
            guard.unjudged_at = now
        self._counted = counts

    async def stop(self) -> None:
        """Let all finish."""
        self.asking.end()
        await asyncio.gather(*(child.stop() for child in self._guard.children))
