"""One simulated gateway: kernel, clocks, disk, the guard's processes, and who starts the guard."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rstguard.engine.ruleset import SECOND
from rstguard.kernel import KernelError
from rstguard.kernel.footprint import Footprint
from rstguard.policy.load import PolicyError
from tests.simulation.incarnation import (
    QUEUE,
    Broken,
    Gone,
    Incarnation,
    Provoked,
    Refused,
)
from tests.simulation.kernel import SimKernel
from tests.simulation.loop import SimLoop
from tests.simulation.processes import Process, Processes

EPOCH: Final = 1_700_000_000.0
_LAYERS: Final = 10
"""How often at most a coroutine waits for something more while it is being ended."""
_SHARED: Final = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a directory of its own in it
"""Where files are in memory."""


class World(logging.Handler):
    """All that there is, drawn from one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(logging.INFO)
        self.seed = seed
        self.rng = random.Random(seed)
        self.loop = SimLoop(random.Random(self.rng.random()))
        self.offset = 0.0
        self.kernel = SimKernel(self._nanoseconds, lambda: int(self.wall() * SECOND))
        self.loop.virtual.fake_ready = self.kernel.packets.readable
        self.processes = Processes(self.kernel, self.loop, random.Random(self.rng.random()))
        self.log: list[str] = []
        self.problems: list[str] = []
        self.on_event: list[Callable[[dict[str, Any]], None]] = []
        self.on_end: list[Callable[[Incarnation], None]] = []
        self.on_loss: list[Callable[[], None]] = []
        """Called before sets of the banned are taken away by whoever may do so."""
        self.late = self.late_until = 0.0
        """By how many seconds the supervisor may hear late what was told, and until when."""
        self.latest = 0.0
        """For how long a supervisor was stopped at most."""
        self.current: Incarnation | None = None
        self.incarnations: list[Incarnation] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.tracebacks: list[str] = []
        self.wanted = True
        """Whether the service manager keeps a guard running."""
        self.cleans = self.rng.random() < 0.5
        """Whether it runs `rstguard cleanup` after each end, as systemd does."""
        self.keep_bans = self.rng.random() < 0.3
        self.workers = self.rng.choice((1, 1, 2))
        shared = _SHARED if _SHARED.is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="sim-", dir=shared))
        self.run_directory = self.root / "run"
        self.run_directory.mkdir()
        self.state_directory = self.root / "state"
        self.file = self.root / "policy.yaml"
        self.panic_file = self.run_directory / "panic"
        self.excused: set[int] = set()
        self.loop.set_task_factory(self._task)

    def _task(self, loop: Any, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **more)
        self.tasks.append(task)
        return task

    def _nanoseconds(self) -> int:
        return int(self.loop.time() * SECOND)

    def wall(self) -> float:
        """Tell the seconds since 1970, as somebody has set them."""
        return EPOCH + self.loop.time() + self.offset

    def note(self, text: str) -> None:
        """Add a line to the log of this world."""
        self.log.append(f"{self.loop.time():10.4f} {text.replace(str(self.root), '')}")

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the guard's log."""
        self.note(f"  {record.levelname[0]} {record.getMessage()}")
        if record.exc_info and not isinstance(record.exc_info[1], Provoked):
            self.tracebacks.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def broken(self, sentence: str) -> None:
        """An invariant does not hold."""
        self.note(f"BROKEN: {sentence}")
        self.problems.append(sentence)

    def told(self, record: dict[str, Any], text: str) -> None:
        """An event was told."""
        self.note(f"  * {text}")
        for one in self.on_event:
            one(record)

    def excuse(self, incarnation: Incarnation) -> None:
        """This one need not end of what was provoked: a request met it."""
        self.excused.add(id(incarnation))

    # The service manager

    def start(self) -> None:
        """Start a guard, unless one runs."""
        if self.current is not None or not self.wanted:
            return
        one = Incarnation(self, len(self.incarnations) + 1)
        self.incarnations.append(one)
        self.current = one
        self.note(f"{one.owner.name} starts")
        try:
            one.launch()
        except (OSError, PolicyError) as error:
            self.note(f"it cannot: {error}")
            one.error = str(error)
            self.kill_supervisor(one)

    def kill_supervisor(self, one: Incarnation) -> None:
        """SIGKILL: nothing that it would still do is done."""
        if one.owner.dead or one.over:
            return
        self.note(f"{one.owner.name} is killed")
        for hook in self.on_end:
            hook(one)
        one.owner.dead = True
        one.over = True
        one.kernel.died()
        for spawned in one.spawned:
            with contextlib.suppress(ValueError, KeyError, OSError):
                self.loop.remove_reader(spawned.channel.fileno())
            spawned.channel.close()
        if hasattr(one, "parts"):
            store = one.parts.record.store
            if store is not None:
                store._database.close()
        one.close()
        one.give_up()
        self._after(one)

    def ended(self, one: Incarnation) -> None:
        """A supervisor has ended by itself."""
        self.note(f"{one.owner.name} ends: {one.error or 'in order'}")
        for hook in self.on_end:
            hook(one)
        if not self.keep_bans:
            self._lose()
        one.owner.dead = True
        one.close()
        one.give_up()
        for spawned in one.spawned:
            spawned.channel.close()
        self._after(one)

    def _after(self, one: Incarnation) -> None:
        if one is not self.current:
            return
        self.current = None
        # It is not for the dead to see to what comes after them.
        if self.cleans:
            self.loop.outside(self.rng.uniform(0.01, 0.1), self._clean)
        if self.wanted:
            self.loop.outside(self.rng.uniform(0.1, 1.0), self.start)

    def _lose(self) -> None:
        for hook in self.on_loss:
            hook()

    def _clean(self) -> None:
        if self.current is None:
            self.note("cleanup")
            if not self.keep_bans:
                self._lose()
            with contextlib.suppress(KernelError):
                Footprint(self.kernel, self.run_directory, range(0)).remove(self.keep_bans)

    @property
    def works(self) -> Incarnation | None:
        """The guard that answers requests, if there is one."""
        one = self.current
        return one if one is not None and one.serves and not one.owner.stopped else None

    async def ask(self, **request: Any) -> Any:
        """Ask whatever guard there is; see `Incarnation.ask`."""
        if self.works is None:
            raise Gone
        return await self.works.ask(**request)

    async def until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        """Wait for a condition that is to come true in so many seconds.

        Raises:
            Broken: it does not; `otherwise` is the sentence.
        """
        end = self.loop.time() + seconds
        while not condition():
            if self.loop.time() > end:
                raise Broken(otherwise)
            await asyncio.sleep(0.25)

    def close(self) -> None:
        """Give back all that this world has of the real one."""
        for process in self.processes.all:
            process.die()
        for one in self.incarnations:
            if not one.over:
                self.kill_supervisor(one)
        for task in self.tasks:
            _end(task)
        self.tasks.clear()
        self.processes.all.clear()
        self.incarnations.clear()
        self.loop._ready.clear()  # type: ignore[attr-defined]
        self.loop._scheduled.clear()  # type: ignore[attr-defined]
        self.loop.close()
        shutil.rmtree(self.root, ignore_errors=True)


def _end(task: asyncio.Task[Any]) -> None:
    """End a task that nobody runs any more: what its last lines do has no effect."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    for _ in range(_LAYERS):
        if task.done() or coroutine.cr_frame is None:
            return
        with contextlib.suppress(BaseException):
            coroutine.close()


__all__ = ["QUEUE", "Broken", "Gone", "Incarnation", "Process", "Provoked", "Refused", "World"]
