"""Who is nearest to which limit, as the tables tell it without being counted in."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.lenient import LEAST
from rstguard.engine.limiter import CAPACITY, Limiter
from rstguard.engine.nearest import Near, largest, merged
from rstguard.engine.ruleset import SECOND, Measure, Per, Rule, RuleSet, Unless
from rstguard.engine.sweep import Sweep
from rstguard.engine.verdict import Action
from rstguard.engine.wire import Packet
from tests.support.flows import START, flow
from tests.support.packets import CLIENT, CLIENT6, SERVER, SERVER6, packet, rule, ruleset

OTHER = "198.51.100.8"
MANY = 10_000


def syns(source: str, count: int, destination: str = SERVER) -> list[Packet]:
    return [
        packet(source=source, destination=destination, source_port=30000 + number, port=number + 1)
        for number in range(count)
    ]


def nearest(rules: RuleSet, packets: Iterable[Packet], most: int = MANY) -> list[tuple[str, float]]:
    """Return what an engine tells right after packets that come at once."""
    engine = Engine(rules)
    for one in packets:
        engine.decide(one, START)
    steps = engine.nearest(most, START)
    found = merged((near for step in steps for near in step), most)
    return [(subject, round(used, 3)) for _, subject, used in found]


@given(st.dictionaries(st.integers(0, 5000), st.integers(0, 99), max_size=900), st.integers(1, 9))
def test_the_largest_are_those_of_a_sorted_table(table: dict[int, int], most: int) -> None:
    found = largest(table, most)
    assert [value for _, value in found] == sorted(table.values(), reverse=True)[:most]
    assert len(set(found)) == len(found)
    assert all(table[key] == value for key, value in found)


def test_they_are_put_together() -> None:
    found = [
        Near("a", "x", 0.5), Near("b", "x", 0.4), Near("a", "y", 0.9), Near("a", "x", 0.7),
        Near("a", "z", 0.6), Near("b", "y", 0.0),
    ]  # fmt: skip
    assert merged(found, 2) == (
        Near("a", "y", 0.9), Near("a", "x", 0.7), Near("b", "x", 0.4)
    )  # fmt: skip
    assert merged([], 2) == ()


@pytest.mark.parametrize(
    ("more", "subjects"),
    [
        ({}, ["2001:db8:1::/64", CLIENT]),
        ({"ipv4_length": 24, "ipv6_length": 48}, ["2001:db8:1::/48", "198.51.100.0/24"]),
        ({"per": Per.SERVICE}, [f"[{SERVER6}]:1", f"{SERVER}:1"]),
    ],
)
def test_a_rate(more: dict[str, Any], subjects: list[str]) -> None:
    """Ten may come at once: of IPv6 came eight, of IPv4 five, and of another source too many."""
    limit = rule(Measure.SYN_RATE, limit=10, **more)
    packets = [
        packet(source=source, destination=destination, port=1)
        for source, destination, count in ((CLIENT6, SERVER6, 8), (CLIENT, SERVER, 5))
        for _ in range(count)
    ]
    assert nearest(ruleset(limit), packets) == list(zip(subjects, (0.8, 0.5), strict=True))
    if not more:
        assert nearest(ruleset(limit), [*packets, *syns(OTHER, 30)], 1) == [(OTHER, 1)]


@pytest.mark.parametrize("measure", [Measure.DISTINCT_PORTS, Measure.HALF_OPEN])
def test_different_targets(measure: Measure) -> None:
    limit = rule(measure, limit=10)
    assert nearest(ruleset(limit), syns(CLIENT, 4) + syns(OTHER, 1)) == [(CLIENT, 0.4)]
    assert nearest(ruleset(limit), syns(CLIENT, 12)) == [(CLIENT, 1.1)]


def test_what_is_long_ago_is_not_told() -> None:
    limits = ruleset(rule(Measure.SYN_RATE), rule(Measure.DISTINCT_PORTS))
    engine = Engine(limits)
    for one in syns(CLIENT, 3):
        engine.decide(one, START)
    assert not any(engine.nearest(5, START + 11 * SECOND))


def test_trusted_ones_have_no_limit_and_hide_nobody() -> None:
    limits = ruleset(rule(Measure.SYN_RATE, limit=100), trusted=("203.0.113.0/24",))
    packets = [one for last in range(16) for one in syns(f"203.0.113.{last}", 50)]
    assert nearest(limits, packets + syns(CLIENT, 5), 1) == [(CLIENT, 0.05)]


def test_a_productive_source_is_measured_by_its_own_limit() -> None:
    limits = ruleset(rule(Measure.SYN_RATE, limit=10, unless=Unless(80, 10)))
    engine = Engine(limits)
    engine.note_productive({parse_address(CLIENT): 90})
    for one in syns(CLIENT, 20) + syns(OTHER, 5):
        engine.decide(one, START)
    found = merged((near for step in engine.nearest(5, START) for near in step), 5)
    name = limits.rules[0].name
    assert found == (Near(name, OTHER, 0.5), Near(name, CLIENT, 0.2))
    assert engine.explain(parse_address(CLIENT), START) == {name: 0.2}


def test_one_in_both_generations_counts_as_it_is_now() -> None:
    limiter = Limiter(10, SECOND, 10, capacity=2)
    for key in (1, 2, 3, 1, 1):  # 3 begins a new generation, into which 1 comes over
        limiter.over(key, START)
    found = [item for step in limiter.nearest(5, START) for item in step]
    assert sorted(found) == [(1, 0.3), (1, 0.3), (2, 0.1), (3, 0.1)]


def test_connections_and_bytes_as_the_last_sweep_saw_them() -> None:
    limits = ruleset(
        rule(Measure.CONNECTIONS, Action.RESET, 10, name="held"),
        rule(Measure.BYTE_RATE, Action.RESET, 1000, burst=10_000, name="bytes"),
        rule(Measure.IDLE, Action.RESET, 900 * SECOND, name="idle"),
        trusted=("203.0.113.0/24",),
    )
    sweep = Sweep(limits)
    flows = [flow(port, source=OTHER) for port in range(4)]
    flows += [flow(port, source="203.0.113.9", sent=50_000) for port in range(9)]
    sweep.judge([*flows, flow(50)], START)
    sweep.judge([*flows, flow(50, sent=6000)], START + SECOND)
    moved, held = Near("bytes", CLIENT, 0.5), Near("held", OTHER, 0.4)
    assert sweep.nearest(5) == (moved, held, Near("held", CLIENT, 0.1))
    assert sweep.explain(parse_address(CLIENT)) == {"held": 0.1, "bytes": 0.5}
    assert Sweep(limits, sweep).nearest(1) == (moved, held)
    assert Sweep(ruleset(rule(Measure.CONNECTIONS, limit=11)), sweep).nearest(5) == ()


def test_productive_sources_may_hold_more() -> None:
    limits = ruleset(rule(Measure.CONNECTIONS, limit=40, unless=Unless(80, 10)))
    sweep = Sweep(limits)
    office = [
        flow(port, sent=900, received=9000, packets=5)._replace(server_packets=6)
        for port in range(2 * LEAST)
    ]
    sweep.judge([*office, *(flow(port, source=OTHER) for port in range(6))], START)
    assert [(near.subject, near.used) for near in sweep.nearest(5)] == [
        (OTHER, 0.15),
        (CLIENT, 0.1),
    ]


def full(limit: Rule) -> tuple[Engine, float]:
    """Return an engine with full tables, and the seconds that filling them took."""
    engine = Engine(ruleset(limit))
    check = next(iter(engine.meters[0].checks.values()))
    syn = packet()
    began = time.process_time()
    for number in range(2 * CAPACITY):
        check(syn._replace(source=number), START + number)
    return engine, time.process_time() - began


@pytest.mark.parametrize("measure", [Measure.SYN_RATE, Measure.DISTINCT_PORTS])
def test_a_step_takes_little_of_the_time_that_filling_the_table_took(measure: Measure) -> None:
    engine, filling = full(rule(measure, limit=100))
    gc.collect()
    longest = 0.0
    looking = engine.nearest(5, START)
    while True:
        began = time.process_time()
        if next(looking, None) is None:
            break
        longest = max(longest, time.process_time() - began)
    assert 0 < longest < filling / 10
