"""What a worker and the sweeper keep while the guard learns limits, and how they hand it over.

A worker measures the packets that its rules need, the sweeper the connections; it also notes who
looks productive.  It is told in parts, one each time that the process has looked after its work:
no packet waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from rstguard.engine.flow import Flow
from rstguard.engine.gauges import Gauges
from rstguard.engine.lenient import is_productive
from rstguard.engine.ruleset import Measure, RuleSet
from rstguard.engine.shown import Breadth
from rstguard.engine.verdict import Decision
from rstguard.engine.wire import Malformed, Packet
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import AllMeasured, Learn, LookProductive, Measured, Tell

_SOURCES = 1 << 16
"""Sources whose most is kept, of each rule and in each process."""
_MOST_PRODUCTIVE = 1 << 18
_IN_A_PART = 2048

Item = TypeVar("Item")
Part = Measured | LookProductive | AllMeasured
Decide = Callable[[Packet | Malformed, int], Decision]


class Measuring:
    """Gauges for the rules of one process, or nothing while the guard does not learn."""

    def __init__(self, ruleset: RuleSet, measures: Collection[Measure]) -> None:
        """Measure nothing yet; `measures` are those that this process can see."""
        self._measures = measures
        self._gauges: Gauges | None = None
        self._rests = False
        self._productive: set[int] = set()
        self._telling: deque[Iterator[Part]] = deque()
        self.follow(ruleset)

    def follow(self, ruleset: RuleSet) -> None:
        """Take up a policy: rules that stay the same are measured on, others anew."""
        rules = tuple(rule for rule in ruleset.rules if rule.measure in self._measures)
        self._ruleset = replace(ruleset, rules=rules)
        self._breadth = Breadth(ruleset)
        if self._gauges:
            self._gauges = self._made()

    def obey(self, message: Learn | Tell) -> None:
        """Begin, rest, go on, forget; or have everything told that was measured."""
        if isinstance(message, Tell):
            self._telling.append(self._parts(message.number))
            return
        self._rests = message.rests
        if not message.on:
            self._gauges = None
            self._productive = set()
            self._telling.clear()
        elif self._gauges is None:
            self._gauges = self._made()

    def _made(self) -> Gauges:
        return Gauges(self._ruleset, self._gauges, _SOURCES)

    @property
    def active(self) -> bool:
        """Whether anything is measured now: what a policy enforces would be measured short."""
        return self._gauges is not None and not self._rests and not self._ruleset.enforce

    @property
    def telling(self) -> bool:
        """Whether there are parts to be told."""
        return bool(self._telling)

    @property
    def productive(self) -> int:
        """How many sources look productive."""
        return len(self._productive)

    def beside(self, decide: Decide) -> Decide:
        """Return what decides and measures, or `decide` itself while nothing is measured."""
        if self._gauges is None or not self.active:
            return decide
        measure = self._gauges.decide

        def both(packet: Packet | Malformed, now: int) -> Decision:
            measure(packet, now)
            return decide(packet, now)

        return both

    def look(self, flows: Sequence[Flow], now: int) -> None:
        """Measure the guarded connections, closed ones too, as they are at `now`."""
        if self._gauges is None or not self.active:
            return
        of, productive = self._breadth.of, self._productive
        for flow in flows:
            if len(productive) < _MOST_PRODUCTIVE and is_productive(flow):
                productive.add(of(flow.original.source))
        self._gauges.judge(flows, now)

    def step(self, channel: ChildEnd) -> None:
        """Tell one part more, if there is one and the channel is free."""
        if not self._telling or channel.waiting:
            return
        part = next(self._telling[0], None)
        if part is None:
            self._telling.popleft()
        else:
            channel.send(part)

    def _parts(self, number: int) -> Iterator[Part]:
        gauges = self._gauges.gauges if self._gauges else ()
        for gauge in gauges:
            for shown in _in_parts(list(gauge.shown.items())):
                yield Measured(number, gauge.rule.name, shown)
        for sources in _in_parts(list(self._productive)):
            yield LookProductive(number, sources)
        yield AllMeasured(number, sum(gauge.left_out for gauge in gauges))


def _in_parts(items: Iterable[Item]) -> Iterator[tuple[Item, ...]]:
    rest = iter(items)
    while part := tuple(islice(rest, _IN_A_PART)):
        yield part
