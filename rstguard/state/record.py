"""The guard's use of its store: bans brought back, everything else noted without waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from rstguard.ipc.messages import Blocked, Offences
from rstguard.kernel.elements import Element
from rstguard.kernel.sets import Sets
from rstguard.state.store import Store, StoreError

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.5
_TIDY_EVERY = 1200
"""Flushes between two times that what is over is forgotten: ten minutes."""
_CLOCK_SET = 2.0
"""Seconds by which the clock jumps when somebody sets it; less is its steering."""
_AT_ONCE = 1000
"""Offences in one message to a process."""


class Record:
    """Keeps a store; without one, whose directory cannot be used, it says so and keeps nothing."""

    def __init__(self, directory: Path) -> None:
        """Name a directory; nothing is read or written before `open`."""
        self._directory = directory
        self.problem = ""
        """Why nothing is kept at present, or ""."""
        self.store: Store | None = None
        self._ahead = _ahead()

    def open(self) -> None:
        """Open the store, or say why nothing will be kept."""
        try:
            self.store = Store(self._directory, lambda: time.monotonic() + self._ahead)
        except StoreError as error:
            self._fails(error)
            return
        if self.store.set_aside:
            log.error(
                "%s was damaged and was moved to %s; bans and history begin anew",
                self.store.path,
                self.store.set_aside,
            )

    def bring_back(self) -> int:
        """Ban and shun again whose time is not over; return how many.

        Raises:
            KernelError: the sets refused.
        """
        elements: list[Element] = []
        if self.store:
            self._flush()
            try:
                elements = self.store.blocks()
            except StoreError as error:
                self._fails(error)
            if self.store.unreadable:
                log.error(
                    "%d bans of %s were damaged and are left out",
                    self.store.unreadable,
                    self.store.path,
                )
        if elements:
            with Sets() as sets:
                sets.add(elements)
        return len(elements)

    def offences(self) -> Iterator[Offences]:
        """Yield what a process that starts is to remember."""
        if self.store:
            self._flush()
            try:
                known = self.store.offences()
            except StoreError as error:
                self._fails(error)
                return
            for start in range(0, len(known), _AT_ONCE):
                yield Offences(known[start : start + _AT_ONCE])

    def blocked(self, message: Blocked) -> None:
        """Note a ban or shun that is in force."""
        element = message.element
        self.blocked_element(element)
        if message.offence and self.store:
            self.store.offended(element.rule, str(element.source), message.offence)

    def blocked_element(self, element: Element) -> None:
        """Note an element that was put into its set."""
        if self.store:
            self.store.blocked(element)

    def unblocked(self, source: str) -> None:
        """Note that a source is blocked no longer."""
        if self.store:
            self.store.unblocked(source)

    async def keep(self) -> None:
        """Write every half second what was noted; does not end by itself."""
        rounds = 0
        while self.store:
            await asyncio.sleep(_FLUSH_SECONDS)
            rounds += 1
            self._follow_the_clock(self.store)
            await asyncio.to_thread(self._flush, rounds % _TIDY_EVERY == 1)

    def _follow_the_clock(self, store: Store) -> None:
        """Bans last as long as they were to last, whatever somebody sets the clock to."""
        jumped = _ahead() - self._ahead
        if abs(jumped) > _CLOCK_SET:
            store.shift(jumped)
            self._ahead += jumped

    def _flush(self, tidy: bool = False) -> None:
        assert self.store is not None
        try:
            if tidy:
                self.store.tidy()
            else:
                self.store.flush()
            self.problem = ""
        except StoreError as error:
            self._fails(error)

    def _fails(self, error: StoreError) -> None:
        if not self.problem:  # once, not twice a second
            log.error("%s", error)
        self.problem = str(error)

    def close(self) -> None:
        """Write what waits."""
        if self.store:
            self.store.close()
            self.store = None


def _ahead() -> float:
    """Return the seconds by which the clock on the wall is ahead of the one nobody can set."""
    return time.time() - time.monotonic()
