"""The worker: one process, one queue.

Each turn it works off packets (`rstguard.worker.judging`), sheds load if they become too many,
reports, and obeys the supervisor.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Final, assert_never

from rstguard.engine.engine import Engine
from rstguard.engine.onesided import OneSided
from rstguard.engine.ruleset import NEEDS, SECOND, RuleSet
from rstguard.engine.shedding import Level, Shedding
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.measuring import Measuring
from rstguard.ipc.messages import (
    Blocked,
    Explain,
    Explained,
    Kill,
    Learn,
    Nearest,
    NewPolicy,
    Offences,
    Overloaded,
    Productive,
    Ready,
    Recheck,
    Reset,
    Start,
    Stop,
    Tell,
    ToChild,
)
from rstguard.ipc.said import Large
from rstguard.kernel import KernelError, thinning
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import LENGTH
from rstguard.kernel.seam import Kernel
from rstguard.worker.acting import Acting
from rstguard.worker.judging import Judging
from rstguard.worker.reporting import Reporting
from rstguard.worker.search import Looking

log = logging.getLogger(__name__)

_MILLISECOND: Final = SECOND // 1000
_LONGEST_WAIT: Final = SECOND // 2


class Worker:
    """Reads one queue and carries out what the engine decides."""

    def __init__(
        self,
        channel: ChildEnd,
        start: Start,
        kernel: Kernel,
        clock: Callable[[], int] = time.monotonic_ns,
        pid: int = 0,
    ) -> None:
        """Bind the queue and take up the policy.

        Args:
            channel: to the supervisor.
            start: the policy, the queue, and which worker this is.
            kernel: what is asked of the kernel.
            clock: tells monotonic nanoseconds.
            pid: what the worker calls itself; 0 for its process id.

        Raises:
            KernelError: the queue cannot be had.
        """
        self._channel, self._clock = channel, clock
        self._pid = pid or os.getpid()
        self._index = start.index
        self._sets = kernel.sets()
        self._shedding, self._lost = Shedding(LENGTH), 0
        self._measuring = Measuring(start.ruleset, NEEDS)
        self._looking = Looking()
        self._running = True
        self._reporting = Reporting(channel)
        marks = Marks(start.ruleset.marks)
        self._acting = Acting(self._sets, kernel.injector(marks), self._reporting)
        self._engine = Engine(start.ruleset, one_sided=OneSided(self._one_sided))
        self._queue = kernel.queue(start.queue, start.ruleset.fail_open, marks)
        self._judging = Judging(
            self._queue, self._engine.decide, self._acting, self._reporting.counts, clock, marks
        )
        self._take_up(start.ruleset, self._engine)

    def _one_sided(self, address: int, port: int) -> bool:
        """Tell whether only one side is seen of a service; a set that is gone says nothing."""
        try:
            return self._sets.one_sided(address, port)
        except KernelError:
            return False

    def _take_up(self, ruleset: RuleSet, engine: Engine) -> None:
        self._engine = engine
        self._measuring.follow(ruleset)
        self._judging.follow(ruleset)
        self._acting.enforce = ruleset.enforce
        self._choose()

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            Closed: the supervisor is gone.
        """
        poll = select.poll()
        poll.register(self._queue.fileno(), select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        channel = self._channel.fileno()
        # The packet path makes no reference cycles, yet the collector would walk its tables again
        # and again: a sixth of a packet's time.  Young garbage goes when nothing is to be done.
        gc.disable()
        self.begin()
        wait: int | None = 0
        while wait is not None:
            ready = dict(poll.poll(-(-wait // _MILLISECOND)))
            if not ready and wait == _LONGEST_WAIT:
                gc.collect(1)
            wait = self.turn(channel in ready)

    def begin(self) -> None:
        """Say that the queue is read from now on: `turn` is to follow.

        What came with the order to start comes first: packets may wait already, and a ban is to
        last as long as earlier offences make it.
        """
        for message in self._channel.receive():
            self._obey(message)
        self._channel.send(Ready(0, self._queue.reader))

    def turn(self, heard: bool = True) -> int | None:
        """Do one round of work, without waiting for anything.

        Returns:
            for how many nanoseconds at most to wait for packets and messages before the next, or
            None after the last.

        Args:
            heard: whether there may be messages.

        Raises:
            Closed: the supervisor is gone.
        """
        emptied = self._judging.work_off()
        self._look_at_queue(emptied)
        self._report()
        self._measuring.step(self._channel)
        self._looking.step(self._channel)
        for message in self._channel.receive() if heard else ():
            self._obey(message)
        if not self._running:
            return None
        if self._looking.active or not emptied:
            return 0
        return _MILLISECOND if self._measuring.telling else _LONGEST_WAIT

    def close(self) -> None:
        """Give the queue up."""
        self._queue.close()

    def _look_at_queue(self, emptied: bool) -> None:
        """Leave more undone as the queue fills, and less as it empties."""
        before, waiting = self._shedding.level, 0
        if emptied and before is Level.NOTHING:
            return
        if not emptied:
            state = self._queue.state()
            waiting, self._lost = state.waiting, state.dropped_full + state.dropped_reader
        packets = self._judging.packets
        level = self._shedding.look(waiting, self._lost, self._clock(), packets)
        if level is not before:
            self._choose()
            self._thin(level, before)
            self._channel.send(Overloaded(self._pid, level))

    def _choose(self) -> None:
        """Choose what judges the packets; what learns limits does so only while there is time."""
        level = self._shedding.level
        decide = self._engine.at(level)
        self._judging.decide = decide if level else self._measuring.beside(decide)

    def _thin(self, level: Level, before: Level) -> None:
        """Have the kernel keep from the queue what would only be passed on, or no more."""
        try:
            if level is Level.THINNED:
                thinning.thin(self._sets, self._index)
            elif before is Level.THINNED:
                thinning.restore(self._sets, self._index)
        except KernelError as error:
            log.error("%s", error)

    def _report(self) -> None:
        now = self._clock()
        if self._reporting.due(now):
            self._thin(self._shedding.level, self._shedding.level)
            more = {"packets": self._judging.packets, "shed": self._engine.shed}
            self._reporting.tell(now, more)
        self._channel.flush()

    def _obey(self, message: ToChild) -> None:
        match message:
            case NewPolicy(ruleset, generation):
                self._take_up(ruleset, Engine(ruleset, self._engine))
                self._queue.set_fail_open(ruleset.fail_open)
                self._channel.send(Ready(generation, self._queue.reader))
            case Explain(number, source):
                used = self._engine.explain(source, self._clock())
                self._channel.send(Explained(number, used))
            case Nearest():
                if self._looking.ask(message):
                    self._looking.begin(self._engine.nearest(message.most, self._clock()))
            case Productive():
                self._engine.note_productive(message.percents)
            case Large():
                self._engine.note_large(message.spared)
            case Offences():
                self._engine.restore(message.offences, self._clock())
            case Learn() | Tell():
                self._measuring.obey(message)
                self._choose()
            case Stop():
                self._running = False
            case Start() | Blocked() | Reset() | Recheck() | Kill():
                raise ValueError(f"{type(message).__name__} is not for a worker")
            case _:
                assert_never(message)
