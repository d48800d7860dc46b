"""The guard's use of its store from the event loop, which never waits for the disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from rstguard.engine.address import Prefix
from rstguard.engine.sources import Offence
from rstguard.ipc.messages import Blocked, Offences
from rstguard.ipc.said import Large
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.seam import ElementSets
from rstguard.state.store import Store, StoreError
from rstguard.state.waiting import MOST_OFFENCES, Waiting

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.5
_TIDY_SECONDS = 600.0
_OPEN_AGAIN_SECONDS = 10.0
_SURE_SECONDS = 30.0
_LARGE_SECONDS = 60.0
"""How often it is written how the large sources are, while they are the same."""
_CLOCK_SET = 2.0
"""Seconds by which the clock jumps when somebody sets it; less is its steering."""
_AT_ONCE = 1000
"""Offences in one message to a process."""


class Record:
    """Keeps a store; while its directory cannot be used, it says so, and tries again."""

    def __init__(
        self,
        directory: Path,
        sets: Callable[[], AbstractContextManager[ElementSets]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Name a directory; nothing is read or written before `open`.

        Args:
            directory: where the file is, or is to be.
            sets: opens the kernel's sets.
            wall: the clock that people set, in seconds since 1970.
        """
        self._directory = directory
        self._sets = sets
        self._wall = wall
        self.problem = ""
        """Why nothing is kept at present, or ""."""
        self.store: Store | None = None
        self.large_before = Large(())
        """The sources that were large when a guard before this ended."""
        self._large: dict[Prefix, int] | None = None
        """What those bore that were noted last, and when that was, on the loop's clock."""
        self._large_at = 0.0
        self.opened_late: Callable[[], None] = lambda: None
        """Called when the store, which could not be used at the start, is open."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ahead = 0.0
        """Seconds by which the wall's clock was ahead of the loop's, which nobody can set."""
        self._waiting = Waiting(self._clock)
        self._known: OrderedDict[tuple[str, Prefix], tuple[int, float]] = OrderedDict()
        """How many offences, and when the last, by rule and source; on the loop's clock."""
        self.changing = asyncio.Lock()
        """Held by whoever brings bans back, or changes in the sets what was noted: what is lifted
        or shortened is not to return with others that were read before."""

    async def open(self) -> None:
        """Open the store, or say why nothing is kept at present."""
        self._loop = asyncio.get_running_loop()
        self._ahead = self._wall() - self._loop.time()
        await self._try_to_open()

    async def _try_to_open(self) -> None:
        try:
            store = await asyncio.to_thread(Store, self._directory, self._clock, self._waiting)
        except StoreError as error:
            self._fails(error)
            return
        if store.set_aside:
            log.error(
                "%s was damaged and was moved to %s; bans and history begin anew",
                store.path,
                store.set_aside,
            )
        self.store, self.problem = store, ""
        try:
            self._remember(await asyncio.to_thread(store.offences))
            self.large_before = Large(await asyncio.to_thread(store.large))
        except StoreError as error:
            self._fails(error)

    async def bring_back(self) -> int:
        """Ban and shun again whose time is not over; return how many.

        Raises:
            KernelError: the sets refused.
        """
        store = self.store
        if store is None:
            return 0
        async with self.changing:
            try:
                elements = await asyncio.to_thread(store.blocks)
            except StoreError as error:
                self._fails(error)
                return 0
            if store.unreadable:
                log.error(
                    "%d bans of %s were damaged and are left out", store.unreadable, store.path
                )
            if elements:
                await asyncio.to_thread(self._add, elements)
        return len(elements)

    async def holds(self, source: str) -> bool:
        """Tell whether a ban or shun of exactly this source is remembered."""
        store = self.store
        if store is None:
            return False
        try:
            return await asyncio.to_thread(store.holds, source)
        except StoreError as error:
            self._fails(error)
            return False

    async def count(self) -> int:
        """Return how many bans are remembered that surely are in force, or 0.

        Those of the last `_SURE_SECONDS` of their time are left out: a set may forget them earlier,
        as what was told of them was heard later.
        """
        store = self.store
        if store is None:
            return 0
        try:
            return await asyncio.to_thread(store.count, _SURE_SECONDS)
        except StoreError as error:
            self._fails(error)
            return 0

    def _add(self, elements: list[Element]) -> None:
        with self._sets() as sets:
            sets.add(elements)

    def offences(self) -> Iterator[Offences]:
        """Yield what a process that starts is to remember; the disk is not asked."""
        now = self._now()
        known = iter(self._known.items())
        while some := tuple(islice(known, _AT_ONCE)):
            yield Offences(
                tuple(
                    Offence(rule, source, count, int((now - last) * 1e9))
                    for (rule, source), (count, last) in some
                )
            )

    def blocked(self, message: Blocked, replaces: bool = False) -> None:
        """Note a ban or shun that is in force; see `Waiting.blocked` for `replaces`."""
        element = message.element
        self.blocked_element(element, replaces)
        if message.offence:
            self._waiting.offended(element.rule, str(element.source), message.offence)
            self._know((element.rule, element.source), message.offence, self._now())

    def blocked_element(self, element: Element, replaces: bool = False) -> None:
        """Note an element that was put into its set; see `Waiting.blocked` for `replaces`."""
        self._waiting.blocked(element, replaces)

    def large(self, message: Large) -> None:
        """Note which sources are large; if they are those of before, once a minute."""
        found = {one.source: one.bore for one in message.sources}
        if found != self._large or (found and self._now() >= self._large_at + _LARGE_SECONDS):
            self._large, self._large_at = found, self._now()
            self._waiting.large(message.sources)

    def unblocked(self, source: str) -> None:
        """Note that a source is blocked no longer; `changing` is held since it was lifted."""
        self._waiting.unblocked(source)

    def _remember(self, offences: Iterable[Offence]) -> None:
        """Take up what was read, unless something later is known."""
        now, later = self._now(), dict(self._known)
        for rule, source, count, age in offences:
            if (rule, source) not in later:
                self._know((rule, source), count, now - age / 1e9)
        for key in later:
            self._known.move_to_end(key)

    def _know(self, key: tuple[str, Prefix], count: int, last: float) -> None:
        self._known[key] = (count, last)
        self._known.move_to_end(key)
        if len(self._known) > MOST_OFFENCES:
            self._known.popitem(last=False)

    async def keep(self) -> None:
        """Write every half second what was noted; does not end by itself."""
        tidied, opened = -_TIDY_SECONDS, self._now()
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            self._follow_the_clock()
            now = self._now()
            if self.store:
                tidy = now - tidied >= _TIDY_SECONDS
                tidied = now if tidy else tidied
                await self._flush(self.store, tidy)
            elif now - opened >= _OPEN_AGAIN_SECONDS:
                opened = now
                await self._open_late()

    async def _open_late(self) -> None:
        await self._try_to_open()
        if self.store is None:
            return
        self.opened_late()
        try:
            count = await self.bring_back()
        except KernelError as error:
            log.error("what %s remembers could not be banned again: %s", self.store.path, error)
        else:
            log.warning("%s can be used now; %d bans came back", self.store.path, count)

    def _follow_the_clock(self) -> None:
        """Bans last as long as they were to last, whatever somebody sets the clock to."""
        jumped = self._wall() - self._now() - self._ahead
        if abs(jumped) > _CLOCK_SET:
            self._ahead += jumped
            self._waiting.shift(jumped)

    async def _flush(self, store: Store, tidy: bool) -> None:
        try:
            dropped = await asyncio.to_thread(store.flush, tidy)
        except StoreError as error:
            self._fails(error)
            return
        if self.problem:
            log.warning("%s is written again", store.path)
        if dropped:
            log.error("%d changes were too many to wait for %s and are lost", dropped, store.path)
        self.problem = ""

    def _fails(self, error: StoreError) -> None:
        if not self.problem:  # once, not twice a second
            log.error("%s", error)
        self.problem = str(error)

    async def close(self) -> None:
        """Write what waits; say so if that is not possible."""
        store, self.store = self.store, None
        if store:
            try:
                await asyncio.to_thread(store.close)
            except StoreError as error:
                log.error("%s", error)

    def _now(self) -> float:
        """Return the loop's time, in seconds; threads may ask as well."""
        return self._loop.time() if self._loop else 0.0

    def _clock(self) -> float:
        """Return seconds since 1970, by a clock that nobody sets unseen."""
        return self._now() + self._ahead
