"""The sweeper: judges the connection table, and makes sure that condemned connections die.

Every couple of seconds the guarded connections are read and judged by the engine's sweep rules
(`rstguard.sweeper.sweeping`).  Whatever asks for a connection's death, a sweep rule, a worker's
verdict, a ban or an administrator, leads to `rstguard.sweeper.ending`.
"""

from __future__ import annotations

import logging
import select
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, assert_never

from rstguard.engine.address import prefix_of
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import (
    Blocked,
    Counts,
    Explain,
    Explained,
    Kill,
    Learn,
    Nearest,
    NearestAre,
    NewPolicy,
    Offences,
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
from rstguard.kernel import KernelError
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.seam import Kernel
from rstguard.sweeper.admitting import Admitting
from rstguard.sweeper.condemner import Condemner
from rstguard.sweeper.doubts import Doubts
from rstguard.sweeper.ending import Ending
from rstguard.sweeper.older import adopt_existing
from rstguard.sweeper.sweeping import Sweeping

log = logging.getLogger(__name__)

_MILLISECOND: Final = SECOND // 1000
_REPORT_EVERY: Final = SECOND
_PATIENCE: Final = "net.netfilter.nf_conntrack_tcp_timeout_established"
_MOST_WAIT: Final = SECOND // 2
_AFTER_FAILURE: Final = SECOND // 10
"""How long the kernel is left alone when it refused something."""


class Sweeper:
    """Sweeps at the policy's pace, or slower, and serves requests to kill at any time."""

    def __init__(
        self,
        channel: ChildEnd,
        start: Start,
        kernel: Kernel,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_clock: Callable[[], int] = time.process_time_ns,
        draw: Callable[[], int] | None = None,
    ) -> None:
        """Open the kernel's interfaces and take in connections older than the guard.

        Args:
            channel: to the supervisor.
            start: the policy.
            kernel: what is asked of the kernel.
            clock: tells monotonic nanoseconds.
            cpu_clock: tells the nanoseconds of processor time that were used.
            draw: draws the sequence numbers of probes, 32 bits; None for random ones.

        Raises:
            KernelError: the connection table or raw sockets cannot be had.
        """
        self._channel, self._clock = channel, clock
        table, sets = kernel.table(columns=True), kernel.sets()
        marks, labels = Marks(start.ruleset.marks), Labels(start.ruleset.labels)
        injector = kernel.injector(marks)
        condemner = Condemner(table, injector, marks, draw=draw, labels=labels)
        self._counts: Counter[str] = Counter()
        self._ending = Ending(channel, table, sets, condemner, self._counts, clock, marks, labels)
        self._admitting = Admitting(
            channel, kernel, table, sets, injector, self._counts, marks, cpu_clock
        )
        patience = int(kernel.read_sysctl(_PATIENCE))
        self._doubts = Doubts(
            channel, table, sets, injector, marks, self._counts, clock, draw, patience, labels
        )
        self._sweeping = Sweeping(
            channel,
            table,
            sets,
            self._ending,
            self._doubts,
            self._counts,
            start.ruleset,
            cpu_clock,
        )
        self._sweep_at = self._report_at = self._rests_until = self._soonest_sweep = 0
        self._running = True
        self._follow(start.ruleset)
        self._counts["adopted"] = adopt_existing(table, start.ruleset.scope, kernel.ways, marks)
        self._ending.take_over(clock())

    def _follow(self, ruleset: RuleSet) -> None:
        self._sweep_every = ruleset.sweep_every
        self._ending.follow(ruleset)
        self._doubts.follow(ruleset)
        self._sweeping.follow(ruleset)
        self._admitting.follow(ruleset, self._sweeping.sweep.admissions)

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            Closed: the supervisor is gone.
        """
        channel, both = select.poll(), select.poll()
        for poll in (channel, both):
            poll.register(self._channel.fileno(), select.POLLIN)
        for descriptor in self._admitting.descriptors:
            both.register(descriptor, select.POLLIN)
        self.begin()
        wait: int | None = 0
        while wait is not None:
            rests = self._admitting.rests(self._clock())
            poll, wait = (channel, min(wait, rests)) if rests else (both, wait)
            poll.poll(-(-wait // _MILLISECOND))
            wait = self.turn()

    def begin(self) -> None:
        """Say that connections are looked after from now on: `turn` is to follow."""
        self._channel.send(Ready(0))

    def turn(self) -> int | None:
        """Do one round of work, without waiting for anything.

        Returns:
            for how many nanoseconds at most to wait for messages before the next, or None after
            the last.

        Raises:
            Closed: the supervisor is gone.
        """
        now = self._clock()
        for message in self._channel.receive():
            self._obey(message, now)
        try:
            if now >= self._rests_until:
                self._work(now)
        except KernelError as error:
            self._counts["failed"] += 1
            self._rests_until = self._clock() + _AFTER_FAILURE
            log.error("%s", error)
        self._report(now)
        self._sweeping.measuring.step(self._channel)
        return self._wait() if self._running else None

    def _work(self, now: int) -> None:
        self._ending.work(now)
        self._doubts.work(now)
        self._admitting.work(now)
        early = self._admitting.wants_sweep and now >= self._soonest_sweep
        if early or now >= self._sweep_at:
            self._sweep_at = now + self._sweep_every  # also if it fails
            self._sweep_at = now + self._sweeping.judge(now)
            self._soonest_sweep = now + self._sweeping.rest
            self._admitting.swept(now)
            self._ending.work(now)

    def _wait(self) -> int:
        if self._sweeping.measuring.telling:
            return _MILLISECOND
        now, next_at = self._clock(), self._ending.next_at
        due = min(self._sweep_at, self._doubts.next_at)
        due = due if next_at is None else min(due, next_at)
        return min(max(due, self._rests_until, now) - now, _MOST_WAIT)

    def _report(self, now: int) -> None:
        if now >= self._report_at:
            self._report_at = now + _REPORT_EVERY
            extra = {"pending": self._ending.pending, "lost_reports": self._channel.lost}
            self._channel.send(Counts(self._counts | extra))
        self._channel.flush()

    def _obey(self, message: ToChild, now: int) -> None:  # noqa: C901 - a case for each message
        sweep, ending = self._sweeping.sweep, self._ending
        match message:
            case Blocked():
                ending.of_blocked(message)
                if message.element.kind == "ban":  # a shun is had by SYNs in anybody's name
                    sweep.large.note_hit(message.element.source, message.reason)
            case Reset():
                ending.of_verdict(message)
                sweep.large.note_hit(prefix_of(message.flow.source, 32, 128), message.reason)
            case Kill():
                ending.asked(message)
            case Recheck():
                ending.recheck()
            case Explain(number, source):
                self._channel.send(Explained(number, sweep.explain(source)))
            case Nearest(number, most):
                self._channel.send(NearestAre(number, sweep.nearest(most)))
            case NewPolicy(ruleset, generation):
                self._follow(ruleset)
                self._sweep_at = min(self._sweep_at, now + ruleset.sweep_every)
                self._channel.send(Ready(generation))
            case Offences(offences):
                sweep.restore(offences, now)
            case Large(sources):
                sweep.large.restore(sources, now)
            case Learn() | Tell():
                self._sweeping.measuring.obey(message)
            case Stop():
                self._running = False
            case Productive():
                pass  # every process is told; the sweeper is who found it out
            case Start():
                raise ValueError("Start is not for a sweeper that has begun")
            case _:
                assert_never(message)
