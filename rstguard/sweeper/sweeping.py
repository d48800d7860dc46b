"""The sweep itself: the connection table is read and judged, and what follows is carried out."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable
from itertools import compress
from typing import Final

from rstguard.engine.address import Prefix
from rstguard.engine.reused import Reused
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SECOND, SWEEP_MEASURES, RuleSet
from rstguard.engine.sweep import Judgement, Objection, Sweep
from rstguard.engine.table import Table
from rstguard.engine.verdict import Ban, Shun
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.measuring import Measuring
from rstguard.ipc.messages import (
    FoundProductive,
    Observed,
    Productive,
    Reset,
    blocked_message,
)
from rstguard.ipc.said import Large, PressedService, UnderPressure
from rstguard.kernel.marks import Marks
from rstguard.kernel.placing import place
from rstguard.kernel.seam import Connections, ElementSets
from rstguard.sweeper.cases import Target
from rstguard.sweeper.doubts import Doubts
from rstguard.sweeper.ending import Ending

log = logging.getLogger(__name__)

_SHARE: Final = 5
"""A sweep of a large table is dear: sweeps may take one part in so many of a core."""
_TELL_LARGE_EVERY: Final = 10 * SECOND
"""What large sources hold and bore changes slowly."""


class Sweeping:
    """Sweeps by the policy in force, measures if limits are learned, and tells who is productive.

    `sweep` is what judges, `measuring` what is learned.
    """

    def __init__(
        self,
        channel: ChildEnd,
        table: Connections,
        sets: ElementSets,
        ending: Ending,
        doubts: Doubts,
        counts: Counter[str],
        ruleset: RuleSet,
        cpu_clock: Callable[[], int],
    ) -> None:
        """Ban by `sets`, end connections by `ending`, tell by `channel`, and count in `counts`.

        What is in doubt goes to `doubts`.  `cpu_clock` tells the nanoseconds of processor time
        that were used.
        """
        self._channel, self._table, self._sets, self._ending = channel, table, sets, ending
        self._doubts, self._counts, self._cpu_clock = doubts, counts, cpu_clock
        self._percents: dict[int, int] = {}
        self.rest = 0
        """How long after a sweep the next one begins at the soonest, in nanoseconds."""
        self._told: frozenset[int] | None = None
        self._tell_at = 0
        self._told_large: dict[Prefix, bool] | None = None
        """Which sources were told of as large, and whether as spared; None before the first."""
        self._tell_large_at = 0
        self._ruleset = ruleset
        self._marks = Marks(ruleset.marks)
        self._reused = Reused(ruleset.labels)
        self.sweep = Sweep(ruleset)
        self.measuring = Measuring(ruleset, SWEEP_MEASURES)

    def follow(self, ruleset: RuleSet) -> None:
        """Take up another policy; what is known of connections is kept."""
        self._ruleset = ruleset
        self.sweep = Sweep(ruleset, self.sweep)
        self.measuring.follow(ruleset)

    def judge(self, now: int) -> int:
        """Sweep once: read, judge, carry out (`now` in monotonic nanoseconds).

        Returns:
            how long to wait from now on until the next sweep, in nanoseconds: as the policy says,
            or less while a service is pressed, but no less than `_SHARE` times the processor time
            that this one took.

        Raises:
            KernelError: the connection table cannot be read.
            Closed: the supervisor is gone.
        """
        ruleset = self._ruleset
        if not (self.sweep.looks or self.measuring.active):
            self._tell_pressure(now)
            self._tell_large(now)
            return ruleset.sweep_every
        began = self._cpu_clock()
        gc.disable()  # a sweep makes hundreds of thousands of objects, and no cycle
        try:
            marks = self._marks
            table = self._table.whole(*marks.swept)
            doubted = table.marked(*marks.doubted)
            table.as_held(marks.closing.mask)
            if begun := table.begun(self._reused):
                self._table.set_labels(begun, 0, self._reused.stale)
            table.as_own(self._reused)
            judgement = self.sweep.judge(table, now)
        finally:
            gc.enable()
        self._carry_out(judgement, now)
        self._tell_pressure(now)
        self._tell_large(now)
        self._measure(table, now)
        self._counts["sweeps"] += 1
        took = self._cpu_clock() - began
        self.rest = _SHARE * took
        period = max(self.sweep.every, self.rest)
        self._counts["sweep_cpu_us"] += took // 1000
        self._counts["sweep_period_ms"] = period // 1_000_000
        self._counts["flows"] = len(table)
        self._doubts.swept(doubted, now, period)
        return period

    def _carry_out(self, judgement: Judgement, now: int) -> None:
        enforce, send = self._ruleset.enforce, self._channel.send
        for objection in judgement.observed:
            rule = objection.rule
            self._count(objection)
            send(Observed(objection.flow.original, rule.name, REASONS[rule.measure]))
        found = []
        for objection in judgement.condemned:
            flow, rule = objection
            self._count(objection)
            reason = REASONS[rule.measure]
            found.append(Target(flow, rule.ends, rule.name, reason))
            send(Reset(flow.original, rule.ends, rule.name, reason, enforce, by_worker=False))
        if enforce:
            self._ending.of_flows(found, now)
        self._block(judgement.blocks)

    def _tell_pressure(self, now: int) -> None:
        """Tell which services are pressed, if that has changed, and how full they are each second.

        The first time also if none is: an earlier sweeper may have told of some.
        """
        pressed = self.sweep.pressed
        if self._told == frozenset(pressed) and (not pressed or now < self._tell_at):
            return
        self._told, self._tell_at = frozenset(pressed), now + SECOND
        told = [
            PressedService(service >> 16, service & 0xFFFF, room.live, room.start, room.end)
            for service, room in pressed.items()
        ]
        self._channel.send(UnderPressure(tuple(told)))

    def _tell_large(self, now: int) -> None:
        """Tell which sources are large, if that has changed, and how they are now and then.

        The first time also if none is: an earlier sweeper may have told of some.
        """
        sources = self.sweep.found_large(now)
        spared = {one.source: bool(one.bore) for one in sources}
        if self._told_large == spared and (not spared or now < self._tell_large_at):
            return
        self._told_large, self._tell_large_at = spared, now + _TELL_LARGE_EVERY
        self._channel.send(Large(sources))

    def _block(self, effects: tuple[Ban | Shun, ...]) -> None:
        enforce = self._ruleset.enforce
        messages = [blocked_message(effect, enforce, by_worker=False) for effect in effects]
        if messages and enforce:
            there, error = place(self._sets, [message.element for message in messages])
            if error:
                self._counts["block_failed"] += there.count(False)
                log.error("%s", error)
                messages = list(compress(messages, there))
        for message in messages:
            self._counts[f"rule.{message.element.rule}"] += 1
            self._channel.send(message)
            if enforce:
                self._ending.of_banned(message.element)

    def _count(self, objection: Objection) -> None:
        self._counts[f"rule.{objection.rule.name}"] += 1

    def _measure(self, table: Table, now: int) -> None:
        percents = self.sweep.standings.percents()
        if percents != self._percents:
            self._percents = percents
            self._channel.send(Productive(percents))
        if self.measuring.active:
            before = self.measuring.productive
            self.measuring.look(table.flows(), now)
            if self.measuring.productive != before:
                self._channel.send(FoundProductive(self.measuring.productive))
