"""An event loop on virtual time that several processes share, each of which can be killed.

Every callback belongs to the process in whose context it was made.  What belongs to a dead one is
never run, as after SIGKILL; what belongs to a stopped one waits until it goes on.  Sockets are
real, but the order in which they are looked at is drawn, as the delays of threads are.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")

FIRST_FAKE = 1 << 20
"""Descriptors from here on are the fake kernel's."""


BEGINNING = 1000.0
"""The virtual time at which a world begins, in seconds."""


class Dead(BaseException):
    """The process was killed in the middle of what it did."""


class Owner:
    """A process as the loop sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = self.stopped = False
        self.waiting: list[Callable[[], None]] = []
        """What is to run once it goes on."""


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)


class _Selector(selectors.EpollSelector):
    """Time passes only when nothing is ready."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self.fake_ready: Callable[[], set[int]] = set
        self._rng = rng
        self._order: dict[int, int] = {}
        self._count = 0
        self._fake: dict[int, selectors.SelectorKey] = {}
        self.owners: dict[int, Owner | None] = {}
        """Whose reader waits at a descriptor."""

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if isinstance(fileobj, int) and fileobj >= FIRST_FAKE:
            self._fake[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
            return self._fake[fileobj]
        key = super().register(fileobj, events, data)
        self._count += 1
        self._order[key.fd] = self._count
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        if fileobj in self._fake:
            return self._fake.pop(fileobj)
        return super().unregister(fileobj)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._fake[fileobj] if fileobj in self._fake else super().get_key(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if self._fake:
            known = self.fake_ready()
            ready += [(key, key.events) for fd, key in self._fake.items() if fd in known]
        ready = [one for one in ready if not self._deaf(one[0].fd)]
        if len(ready) > 1:
            # Neither the numbers of descriptors nor epoll's order are the same in each run.
            ready.sort(key=lambda one: self._order.get(one[0].fd, one[0].fd))
            self._rng.shuffle(ready)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        assert timeout is not None, "nothing is left that could ever happen"
        self.now += timeout
        return []

    def _deaf(self, fd: int) -> bool:
        owner = self.owners.get(fd)
        return owner is not None and (owner.dead or owner.stopped)


class SimLoop(asyncio.SelectorEventLoop):
    """The loop of one simulated world; virtual time begins at `BEGINNING`."""

    def __init__(self, rng: random.Random) -> None:
        self.virtual = _Selector(rng)
        self.virtual.now = BEGINNING
        super().__init__(self.virtual)
        self.set_default_executor(Late(self, rng))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.virtual.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(_owned(callback, context), *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return super().call_at(when, _owned(callback, context), *args, context=context)

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        self.virtual.owners[fd if isinstance(fd, int) else fd.fileno()] = OWNER.get()
        super().add_reader(fd, callback, *args)

    def outside(
        self, delay: float, callback: Callable[..., object], *args: Any
    ) -> asyncio.TimerHandle:
        """Call something later that is no process's doing, whoever dies meanwhile."""
        token = OWNER.set(None)
        try:
            return self.call_later(delay, callback, *args)
        finally:
            OWNER.reset(token)

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def resume(self, owner: Owner) -> None:
        """Let a stopped process go on."""
        owner.stopped = False
        held, owner.waiting = owner.waiting, []
        for one in held:
            super().call_soon(one)


def _owned(callback: Callable[..., object], context: Context | None) -> Callable[..., object]:
    owner = context.get(OWNER) if context is not None else OWNER.get()
    if owner is None:
        return callback

    def run(*args: Any) -> None:
        if owner.dead:
            return
        if owner.stopped:
            held = copy_context()
            owner.waiting.append(lambda: held.run(run, *args))
            return
        callback(*args)

    return run


class Late(ThreadPoolExecutor):
    """Runs what it is given at some time drawn, and answers later still.

    Most of it takes a few milliseconds, some of it seconds.  Each piece of work is done at once,
    unless the process is killed in the middle.
    """

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        super().__init__(1)
        self._loop, self._rng = loop, rng
        self.slow = 0.0
        """The chance that a piece of work takes up to three seconds."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        context = copy_context()

        def work() -> None:
            try:
                result = context.run(fn, *args, **kwargs)
            except Dead:
                return
            except Exception as error:  # noqa: BLE001 - handed to who waits
                self._loop.call_later(self._delay(), future.set_exception, error)
            else:
                self._loop.call_later(self._delay(), future.set_result, result)

        self._loop.call_later(self._delay(), work)
        return future

    def _delay(self) -> float:
        if self._rng.random() < self.slow:
            return self._rng.uniform(0.0, 3.0)
        return self._rng.expovariate(500.0)
