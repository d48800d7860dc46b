"""The fake kernel as the simulation's processes see it: each may die at any operation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.simulation.loop import Dead, Owner
from tests.support.fake_kernel import FakeKernel


class SimKernel(FakeKernel):
    """A kernel whose views belong to processes.

    `between` is called before each operation of a process: other programs are at work meanwhile.
    """

    def __init__(self, clock: Callable[[], int], wall: Callable[[], int]) -> None:
        super().__init__(clock, wall)
        self.owner: Owner | None = None
        self.dies_in: int | None = None
        """After so many operations more the process is killed in the middle of the next."""
        self.between: Callable[[str], None] = lambda operation: None
        self.killed: Callable[[], None] = lambda: None
        """Called when the process dies that way."""

    def view(self, owner: Owner, killed: Callable[[], None]) -> SimKernel:
        """Return the kernel as one process sees it."""
        seen = copy.copy(self)
        seen.name, seen.owner, seen._open = owner.name, owner, []
        seen.dies_in, seen.killed = None, killed
        return seen

    def _around(self, operation: str, subject: str = "") -> AbstractContextManager[None]:
        return self._step(operation, subject)

    @contextmanager
    def _step(self, operation: str, subject: str) -> Iterator[None]:
        self._live()
        self.between(operation)
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                self.killed()
        self._live()
        with self.faults.around(operation, subject, self.name):
            yield

    def _live(self) -> None:
        if self.owner is not None and self.owner.dead:
            raise Dead
