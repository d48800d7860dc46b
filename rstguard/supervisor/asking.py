"""The asker's process, which is there while the policy wants RSTs asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.messages import News, Reply, Start, ToChild
from rstguard.kernel import KernelError
from rstguard.kernel.holding import in_force
from rstguard.supervisor.child import Child, StartFailed
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.options import Options


class Asking:
    """Starts and stops the asker."""

    def __init__(
        self,
        guard: Guard,
        options: Options,
        hear: Callable[[News | Reply], None],
        changed: Callable[[Child, str], None],
    ) -> None:
        """Take what its process is given; nothing is started."""
        self._guard, self._options = guard, options
        self._hear, self._changed = hear, changed
        self._group: asyncio.TaskGroup | None = None
        """Where it lives; None before the guard has come up, and once it goes down."""

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Start it, if the policy wants it; from now on it lives in `group`."""
        self._group = group
        if in_force(self._guard.ruleset):
            self._live()

    def end(self) -> None:
        """Start none any more."""
        self._group = None

    async def begun(self) -> None:
        """Wait until it serves for the first time.

        Raises:
            StartFailed: it cannot, and why.
        """
        for child in self._guard.askers:
            await child.wait_served()

    async def follow(self, ruleset: RuleSet) -> None:
        """Have one exactly if a policy wants it; while it comes or goes RSTs pass unasked.

        Raises:
            KernelError: it cannot serve.
        """
        askers = self._guard.askers
        if in_force(ruleset) and not askers:
            self._live()
            try:
                await self.begun()
            except StartFailed as failed:
                askers.clear()
                raise KernelError(str(failed)) from None
        elif not in_force(ruleset):
            leaving, askers[:] = list(askers), []
            await asyncio.gather(*(child.stop() for child in leaving))

    def _live(self) -> None:
        """Start one.

        Raises:
            KernelError: the guard is going down.
        """
        if self._group is None:
            raise KernelError("the guard is stopping, and starts nothing any more")
        child = Child(
            "asker", "asker", self._options.spawn, None, self._start, self._hear, self._changed
        )
        self._guard.askers.append(child)
        self._group.create_task(child.live(), name=child.name)

    def _start(self) -> Iterable[ToChild]:
        workers = len(self._guard.workers)
        return (Start(self._guard.ruleset, self._options.queue, workers),)
