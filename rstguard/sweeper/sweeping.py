"""The sweep itself: the connection table is read and judged, and what follows is carried out."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable
from itertools import compress

from rstguard.engine.flow import Flow
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SWEEP_MEASURES, RuleSet
from rstguard.engine.sweep import Judgement, Objection, Sweep
from rstguard.engine.verdict import Ban, Shun
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.measuring import Measuring
from rstguard.ipc.messages import FoundProductive, Observed, Productive, Reset, blocked_message
from rstguard.kernel.marks import Marks
from rstguard.kernel.placing import place
from rstguard.kernel.seam import Connections, ElementSets
from rstguard.sweeper.cases import Target, as_held
from rstguard.sweeper.ending import Ending

log = logging.getLogger(__name__)


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
        counts: Counter[str],
        ruleset: RuleSet,
        cpu_clock: Callable[[], int],
    ) -> None:
        """Ban by `sets`, end connections by `ending`, tell by `channel`, and count in `counts`.

        `cpu_clock` tells the nanoseconds of processor time that were used.
        """
        self._channel, self._table, self._sets, self._ending = channel, table, sets, ending
        self._counts, self._cpu_clock = counts, cpu_clock
        self._percents: dict[int, int] = {}
        self._ruleset = ruleset
        self._marks = Marks(ruleset.marks)
        self.sweep = Sweep(ruleset)
        self.measuring = Measuring(ruleset, SWEEP_MEASURES)

    def follow(self, ruleset: RuleSet) -> None:
        """Take up another policy; what is known of connections is kept."""
        self._ruleset = ruleset
        self.sweep = Sweep(ruleset, self.sweep)
        self.measuring.follow(ruleset)

    def judge(self, now: int) -> None:
        """Sweep once: read, judge, carry out (`now` in monotonic nanoseconds).

        Raises:
            KernelError: the connection table cannot be read.
            Closed: the supervisor is gone.
        """
        if not (self._ruleset.sweeps or self._ruleset.lenient or self.measuring.active):
            return
        began = self._cpu_clock()
        gc.disable()  # a sweep makes hundreds of thousands of objects, and no cycle
        try:
            marks = self._marks
            flows = [as_held(flow, marks) for flow in self._table.dump(*marks.swept)]
            judgement = self.sweep.judge(flows, now)
        finally:
            gc.enable()
        self._carry_out(judgement, now)
        self._measure(flows, now)
        self._counts["sweeps"] += 1
        self._counts["sweep_cpu_us"] += (self._cpu_clock() - began) // 1000
        self._counts["flows"] = len(flows)

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

    def _measure(self, flows: list[Flow], now: int) -> None:
        percents = self.sweep.standings.percents()
        if percents != self._percents:
            self._percents = percents
            self._channel.send(Productive(percents))
        if self.measuring.active:
            before = self.measuring.productive
            self.measuring.look(flows, now)
            if self.measuring.productive != before:
                self._channel.send(FoundProductive(self.measuring.productive))
