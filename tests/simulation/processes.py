"""Workers and sweepers that run on the loop: the real classes and channels, without processes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import random
from collections.abc import Callable

from rstguard.asker.asker import Asker
from rstguard.engine.ruleset import SECOND
from rstguard.ipc.channel import ChildEnd, Closed, child_end, pair, supervisor_end
from rstguard.ipc.entry import last_words
from rstguard.ipc.messages import Failed, Start
from rstguard.kernel import KernelError
from rstguard.supervisor.spawn import Kind, Spawned
from rstguard.sweeper.sweeper import Sweeper
from rstguard.worker.worker import Worker
from tests.simulation.kernel import SimKernel
from tests.simulation.loop import OWNER, Dead, Owner, SimLoop

log = logging.getLogger("tests.simulation")


class Process:
    """One worker or sweeper: the part of Popen that the supervisor uses, and its life."""

    def __init__(
        self, kind: Kind, pid: int, end: ChildEnd, kernel: SimKernel, loop: SimLoop,
        rng: random.Random,
    ) -> None:  # fmt: skip
        self.kind, self.pid = kind, pid
        self.owner = Owner(f"{kind} {pid}")
        self.kernel = kernel.view(self.owner, self.die)
        self.serving: Worker | Sweeper | Asker | None = None
        self.queue: int | None = None
        self._status: int | None = None
        self._reaped: int | None = None
        self._end, self._loop, self._rng = end, loop, rng
        self._due = 0.0
        self._timer = loop.outside(rng.uniform(0.02, 0.4), self._begin)
        self._started: Start | None = None
        self._listening = False
        self.began = False
        self.dies_in_turns: int | None = None
        """If set, it dies in its next turn after so many of its operations."""
        self.on_death: Callable[[Process], None] = lambda one: None

    @property
    def alive(self) -> bool:
        """Whether it runs, or could."""
        return self._status is None

    def poll(self) -> int | None:
        """Return the exit status once the kernel tells it, which is a little later."""
        return self._reaped

    def kill(self) -> None:
        """SIGKILL: it ends at once, or a moment later."""
        self._loop.outside(self._rng.choice((0.0, 0.0, 0.001, 0.02)), self.die)

    def die(self, status: int = -9) -> None:
        """End now; the kernel closes what it had open."""
        if self._status is not None:
            return
        self._status = status
        self.owner.dead = True
        self._timer.cancel()
        if self._listening:
            self._loop.remove_reader(self._end.fileno())
        self.on_death(self)
        self.kernel.died()
        self._end.close()
        self._loop.outside(self._rng.choice((0.0, 0.001, 0.05)), self._reap)

    def _reap(self) -> None:
        self._reaped = self._status

    def stop(self) -> None:
        """SIGSTOP."""
        self.owner.stopped = True

    def go_on(self) -> None:
        """SIGCONT."""
        self.owner.stopped = False
        if self.alive:
            self.wake()

    def _listen(self) -> None:
        """Have a turn when a message comes, or the supervisor is gone."""
        if not self._listening and self.alive:
            self._listening = True
            self._loop.add_reader(self._end.fileno(), self._heard)

    def _heard(self) -> None:
        self._listening = False
        self._loop.remove_reader(self._end.fileno())
        self.wake()

    def wake(self) -> None:
        """There may be something to do: have a turn soon."""
        if self.alive and not self.owner.stopped:
            self._timer.cancel()
            self._timer = self._loop.outside(self._rng.expovariate(3000.0), self._run)

    def _begin(self) -> None:
        self.began = True
        self.wake()

    def _run(self) -> None:
        if self.owner.stopped or not self.alive or not self.began:
            return
        self._timer.cancel()
        try:
            with last_words(self._end):
                self._turn()
        except Dead:
            return
        except Closed:
            self.die(0)
        except KernelError as error:
            with contextlib.suppress(Closed):
                self._end.send(Failed(str(error)))
            self.die(1)
        except SystemExit:
            self.die(1)
        self._listen()

    def _turn(self) -> None:
        if self.serving is None:
            self._open()
            return
        if self.dies_in_turns is not None:
            self.kernel.dies_in, self.dies_in_turns = self.dies_in_turns, None
        wait = self.serving.turn()
        if wait is None:
            self.die(0)
            return
        self._timer = self._loop.outside(max(wait / SECOND, 0.0005), self._run)

    def _open(self) -> None:
        """Take up the policy, and begin to serve; there may be no `Start` yet."""
        if self._started is None:
            size = self._end._next()
            if size is None:
                return
            if not size:
                raise Closed
            start = self._end._read(size)
            assert isinstance(start, Start)
            self._started = start
            self._timer = self._loop.outside(self._rng.uniform(0.0, 0.2), self._run)
            return
        clock, start = self.clock, self._started
        if self.kind == "asker":
            bits = self._rng.getrandbits
            self.serving = Asker(self._end, start, self.kernel, clock, lambda: bits(32))
        elif self.kind == "worker":
            worker = Worker(self._end, start, self.kernel, clock, self.pid)
            self.queue = start.queue
            self.serving = worker
        else:
            draw = self._rng.getrandbits
            self.serving = Sweeper(
                self._end, start, self.kernel, clock, lambda: 0, lambda: draw(32)
            )
        self.serving.begin()
        self._timer = self._loop.outside(0.0, self._run)

    def clock(self) -> int:
        """Tell monotonic nanoseconds."""
        return int(self._loop.time() * SECOND)


class Processes:
    """Starts processes, and knows those that live."""

    def __init__(self, kernel: SimKernel, loop: SimLoop, rng: random.Random) -> None:
        self._kernel, self._loop, self._rng = kernel, loop, rng
        self._pids = itertools.count(100)
        self.all: list[Process] = []
        self.refuses: int | None = None
        """The errno with which nothing can be started at present, or None."""
        self.on_spawn: Callable[[Process], None] = lambda one: None

    @property
    def alive(self) -> list[Process]:
        """Those that run, or could."""
        return [one for one in self.all if one.alive]

    def reading(self, queue: int) -> Process | None:
        """Return the worker that reads a queue."""
        return next((one for one in self.alive if one.queue == queue), None)

    def spawn(self, kind: Kind) -> Spawned:
        """Start a process.

        Raises:
            OSError: there is none to be had at present.
        """
        owner = OWNER.get()
        if owner is not None and owner.dead:
            raise Dead
        if self.refuses is not None:
            raise OSError(self.refuses, errno.errorcode[self.refuses])
        ours, theirs = pair()
        one = Process(
            kind, next(self._pids), child_end(theirs), self._kernel, self._loop, self._rng
        )
        self.all.append(one)
        self.on_spawn(one)
        return Spawned(kind, one, supervisor_end(ours))
