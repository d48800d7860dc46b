"""What a compiled policy says of itself: whom it protects, which packets it needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.ruleset import NEEDS, SWEEP_MEASURES, Divert, Measure, Scope
from rstguard.engine.verdict import Action
from tests.support.packets import rule, ruleset

HERE = parse_address("203.0.113.10")


@pytest.mark.parametrize("measure", Measure)
def test_each_measure_is_judged_by_packets_or_by_the_sweep(measure: Measure) -> None:
    assert (measure in NEEDS) is not (measure in SWEEP_MEASURES)


def test_only_the_packets_that_some_rule_needs_are_diverted() -> None:
    assert ruleset().diverts == frozenset()
    assert ruleset(rule(Measure.IDLE)).diverts == frozenset()
    assert ruleset(rule(Measure.SYN_RATE)).diverts == {Divert.SYN}
    both = ruleset(rule(Measure.SYN_RATE), rule(Measure.SHORT_CONNECTIONS, ports=frozenset({22})))
    assert both.diverts == {Divert.SYN, Divert.CLOSE}
    assert both.ports_needing(Divert.SYN) is None
    assert both.ports_needing(Divert.CLOSE) == frozenset({22})
    assert both.ports_needing(Divert.STRAY) == frozenset()


def test_sweeps_and_bans_are_told() -> None:
    assert not ruleset(rule(Measure.SYN_RATE)).sweeps
    assert ruleset(rule(Measure.SLOW)).sweeps
    assert not ruleset(rule(Measure.SYN_RATE)).bans
    assert ruleset(rule(Measure.SYN_RATE, Action.BAN)).bans


def test_scope() -> None:
    anything = Scope(("eth0",), (), None, ())
    assert anything.protects(HERE, 1)
    web = replace(anything, destinations=(parse_prefix("203.0.113.0/24"),), ports=frozenset({80}))
    assert web.protects(HERE, 80)
    assert not web.protects(HERE, 81)
    assert not web.protects(parse_address("203.0.114.1"), 80)
    assert not web.protects(parse_address("::203.0.113.10"), 80)
    friends = replace(anything, trusted=(parse_prefix("fd00::/8"), parse_prefix("10.0.0.0/8")))
    assert friends.trusts(parse_address("10.9.8.7"))
    assert friends.trusts(parse_address("fd12::1"))
    assert not friends.trusts(HERE)
