"""Which sources carry a large share of all connections in a capture, as the guard would find."""

from __future__ import annotations

from dataclasses import replace

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Flow
from rstguard.engine.gauges import Gauges
from rstguard.engine.large import MOST, LargeSource, is_for_numbers
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.sweep import Judgement, Sweep


class Carrying:
    """Has gauges measure connections, and notes beside who carries a large share of them.

    `found` are such sources as they were when they last did, `MOST` of them at most: those of the
    largest shares.
    """

    def __init__(self, gauges: Gauges, ruleset: RuleSet) -> None:
        """Look as a policy says, which hits nobody here."""
        self._gauges = gauges
        counting = tuple(filter(is_for_numbers, ruleset.rules))
        self._sweep = Sweep(replace(ruleset, enforce=False, rules=counting, capacity=()))
        self.found: dict[Prefix, LargeSource] = {}

    def judge(self, flows: list[Flow], now: int) -> Judgement:
        """Look at the connections as they are at `now`; nothing happens to them."""
        self._sweep.judge(flows, now)
        for one in self._sweep.found_large(now):
            if not one.quiet:
                self.found[one.source] = one
        if len(self.found) > MOST:
            order = sorted(self.found, key=lambda source: (-self.found[source].share, source))
            self.found = {source: self.found[source] for source in order[:MOST]}
        return self._gauges.judge(flows, now)
