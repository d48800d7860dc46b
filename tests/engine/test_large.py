"""Sources that carry a large share of all connections: who is named, who is spared, how far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from rstguard.engine.address import Networks, Prefix, parse_address, parse_prefix
from rstguard.engine.engine import Engine
from rstguard.engine.flow import Flow
from rstguard.engine.large import (
    LASTS,
    LEAST,
    MOST,
    RATE_TIMES,
    TIMES,
    LargeSource,
    LargeSources,
    Spared,
    looks_for_large,
)
from rstguard.engine.ruleset import (
    CONFIRMED,
    DEFAULT_LABELS,
    LIKELY,
    SECOND,
    Measure,
    Per,
    Rule,
    RuleSet,
    Unless,
)
from rstguard.engine.shares import Shares
from rstguard.engine.sweep import Sweep
from rstguard.engine.verdict import Action, Verdict
from rstguard.engine.wire import KNOWN, PROVEN
from tests.support.flows import START, flow
from tests.support.packets import CLIENT, packet, rule, ruleset

pytestmark = pytest.mark.usefixtures("as_table")

AFTER, EVERY = 60 * SECOND, 10 * SECOND
LIMIT, BELOW = 100, 99
PROXY = CLIENT
SOURCE = parse_prefix(PROXY)
SERVED = 1 << DEFAULT_LABELS + CONFIRMED | 1 << DEFAULT_LABELS + LIKELY
LIMITED = rule(Measure.CONNECTIONS, Action.RESET, LIMIT)


def policy(*rules: Rule, **more: object) -> RuleSet:
    more = {"shares": Shares(25, AFTER), **more}
    return replace(ruleset(*(rules or (LIMITED,))), **more)  # type: ignore[arg-type]


def held(count: int, source: str = PROXY, *, answered: bool = True, first: int = 1) -> list[Flow]:
    """Return live connections of a source, the first ports being the oldest."""
    return [
        flow(
            port,
            source=source,
            age=1e6 - port,
            sent=500,
            received=5000 if answered else 60,
            packets=5,
            labels=SERVED if answered else 1 << DEFAULT_LABELS + LIKELY,
        )._replace(server_packets=6 if answered else 1)
        for port in range(first, first + count)
    ]


def others(count: int) -> list[Flow]:
    """Return one connection of each of so many sources, as a public service has them."""
    return [held(1, f"192.0.{number >> 8}.{number & 255}")[0] for number in range(count)]


class Gateway:
    """Sweeps every ten seconds what somebody says is there."""

    def __init__(self, rules: RuleSet) -> None:
        self.sweep = Sweep(rules)
        self.now = START

    def see(self, flows: Iterable[Flow], seconds: float = 0) -> int:
        """Sweep for so long, once at least; return how many connections the last sweep ended."""
        there, until = list(flows), self.now + int(seconds * SECOND)
        while True:
            judgement = self.sweep.judge(there, self.now)
            self.now += EVERY
            if self.now > until:
                return len(judgement.condemned)

    @property
    def large(self) -> dict[Prefix, LargeSource]:
        return {one.source: one for one in self.sweep.found_large(self.now)}


CALM = (AFTER + EVERY) / SECOND


def test_who_carried_a_large_share_for_long_may_hold_twice_what_it_bore() -> None:
    gateway = Gateway(policy())
    assert gateway.see([*held(BELOW), *others(BELOW)], CALM) == 0
    assert gateway.large[SOURCE][1:4] == (50, BELOW, BELOW)
    assert gateway.see([*held(TIMES * BELOW), *others(LIMIT)]) == 0
    assert gateway.see([*held(TIMES * BELOW + 5), *others(LIMIT)]) == 5


def test_a_policy_that_observes_learns_what_it_really_holds() -> None:
    observing = Gateway(policy(enforce=False))
    observing.see([*held(8 * LIMIT), *others(LIMIT)], CALM)
    observing.sweep = Sweep(policy(), observing.sweep)
    assert observing.see([*held(16 * LIMIT), *others(LIMIT)]) == 0


def test_a_flood_of_real_connections_is_contained_however_long_it_goes_on() -> None:
    gateway = Gateway(policy())
    assert gateway.see([*held(5 * LIMIT), *others(LIMIT)]) == 4 * LIMIT
    assert gateway.see([*held(5 * LIMIT), *others(LIMIT)], 5 * CALM) == 4 * LIMIT
    assert gateway.large[SOURCE].bore == 0  # named, and not spared


def test_one_who_becomes_large_slowly_gains_twice_the_limit_and_no_more() -> None:
    gateway, had = Gateway(policy()), []
    for _ in range(4):
        most = 9 * LIMIT - gateway.see([*held(9 * LIMIT), *others(9)])
        had.append(most)
        gateway.see([*held(most - 1), *others(9)], CALM)
    assert had == [LIMIT, TIMES * (LIMIT - 1), TIMES * LIMIT, TIMES * LIMIT]


def test_what_began_just_now_does_not_count_as_borne() -> None:
    gateway = Gateway(policy())
    gateway.see([*held(60), *others(60)], CALM)
    gateway.see([*held(100), *others(60)], CALM / 2)
    assert gateway.see([*held(130), *others(60)]) == 10
    assert gateway.large[SOURCE].bore == 60


def test_nobody_is_large_before_its_time() -> None:
    gateway = Gateway(policy())
    gateway.see([*held(BELOW), *others(LIMIT)], CALM - 20)
    assert gateway.large == {}


def test_a_share_that_is_lost_for_one_sweep_begins_anew() -> None:
    gateway = Gateway(policy())
    for _ in range(3):
        gateway.see([*held(BELOW), *others(LIMIT)], CALM - 20)
        gateway.see([*held(10), *others(LIMIT)])
    assert gateway.large == {}


@pytest.mark.parametrize(
    "flows",
    [
        [*held(LEAST - 1)],
        [*held(60), *others(181)],
        [*held(60, answered=False), *others(10)],
        [*held(BELOW)[: LEAST - 1], *held(200, answered=False, first=5000), *others(10)],
    ],
    ids=["few connections", "a small share", "never answered", "few of them answered"],
)
def test_who_is_not_large(flows: list[Flow]) -> None:
    gateway = Gateway(policy(enforce=False))
    gateway.see(flows, CALM)
    assert gateway.large == {}


@pytest.mark.parametrize(
    "more",
    [
        {"shares": Shares(25, AFTER, (parse_prefix("198.51.0.0/16"),))},
        {"scope": replace(policy().scope, trusted=(SOURCE,))},
        {"scope": replace(policy().scope, protected=(SOURCE,))},
        {"rules": (replace(LIMITED, excepted=(SOURCE,)),)},
    ],
    ids=["ordinary", "trusted", "protected", "excepted"],
)
def test_an_administrator_has_said_what_it_is(more: dict[str, object]) -> None:
    gateway = Gateway(policy())
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    assert SOURCE in gateway.large
    gateway.sweep = Sweep(policy(**more), gateway.sweep)
    gateway.see([*held(BELOW), *others(LIMIT)])
    assert gateway.large == {}


def test_a_rule_that_does_not_except_it_keeps_it_named() -> None:
    excepting = replace(LIMITED, excepted=(SOURCE,))
    gateway = Gateway(policy(excepting, rule(Measure.SYN_RATE, Action.DROP, 9)))
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    assert SOURCE in gateway.large


def test_without_rules_for_numbers_nobody_looks() -> None:
    assert not looks_for_large(policy(rule(Measure.IDLE, Action.RESET, SECOND)))
    assert not looks_for_large(policy(replace(LIMITED, per=Per.SERVICE)))
    assert looks_for_large(policy(rule(Measure.SYN_RATE, Action.DROP, 9)))


def test_in_distress_it_may_hold_what_it_bore_and_bears_no_more() -> None:
    gateway = Gateway(policy(capacity=((80, 400),)))
    gateway.see([*held(LIMIT - 20), *others(20)], CALM)
    pressed = [*others(20), *held(300, "192.0.2.77", answered=False)]
    gateway.see([*held(BELOW), *pressed], CALM)
    assert gateway.sweep.pressure.pressed
    assert gateway.large[SOURCE].bore == LIMIT - 20
    own = len(pressed) - 20 - LIMIT  # what the other one has too many
    assert gateway.see([*held(LIMIT + 10), *pressed]) == own + 10


def test_it_is_remembered_over_the_quiet_hours_and_then_forgotten() -> None:
    gateway = Gateway(policy())
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    gateway.see(others(LIMIT))
    gateway.now += LASTS - 2 * EVERY
    assert gateway.see([*held(TIMES * BELOW), *others(9 * LIMIT)]) == 0
    gateway.now += LASTS
    gateway.see(others(LIMIT))
    assert gateway.see([*held(TIMES * BELOW), *others(9 * LIMIT)]) == TIMES * BELOW - LIMIT


def test_the_table_is_bounded_and_who_bore_most_stays() -> None:
    sources = LargeSources()
    rules = policy(shares=Shares(10, 0), enforce=False)
    for number in range(3 * MOST):
        key = parse_address("10.0.0.0") + number
        bears = 100 + number
        for now in (2 * number, 2 * number + 1):
            sources.look({key: bears}, bears, Networks([]), False, rules, now)
    found = sources.found(6 * MOST)
    assert len(found) == MOST
    assert min(one.bore for one in found) == 100 + 2 * MOST


def test_what_was_told_to_another_sweeper_is_taken_up() -> None:
    gateway = Gateway(policy())
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    successor = Gateway(policy())
    successor.sweep.large.restore(gateway.sweep.found_large(gateway.now), START)
    assert successor.see([*held(TIMES * BELOW), *others(9)]) == 0
    assert successor.large.keys() == {SOURCE}


def test_another_sweeper_keeps_it_no_longer_than_the_first() -> None:
    gateway = Gateway(policy())
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    gateway.now += LASTS // 2
    gateway.see(others(LIMIT))
    (told,) = gateway.sweep.found_large(gateway.now)
    assert LASTS / 2 < told.quiet < told.age
    for quiet, kept in ((LASTS - 2 * EVERY, True), (LASTS + 1, False)):
        successor = Gateway(policy())
        successor.sweep.large.restore([told._replace(quiet=quiet)], START)
        successor.see(others(LIMIT))
        assert (SOURCE in successor.large) is kept


def test_its_prefix_may_hold_its_connections_and_those_of_its_neighbours() -> None:
    wide = replace(LIMITED, per=Per.PREFIX, ipv4_length=24, ipv6_length=48)
    gateway = Gateway(policy(wide))
    gateway.see([*held(BELOW), *others(LIMIT)], CALM)
    near = held(LIMIT, "198.51.100.99", first=30_000)
    assert gateway.see([*held(TIMES * BELOW), *near, *others(LIMIT)]) == 0
    assert gateway.see([*held(TIMES * BELOW + 5), *near, *others(LIMIT)]) == 5


def test_an_ipv6_source_is_as_wide_as_the_policy_says() -> None:
    gateway = Gateway(policy())
    many = [held(1, f"2001:db8:7::{number:x}")[0] for number in range(1, LIMIT + 1)]
    gateway.see([*many, *others(LIMIT)], CALM)
    assert gateway.large.keys() == {parse_prefix("2001:db8:7::/64")}


def test_bytes_of_a_large_source_may_be_ten_times_as_many() -> None:
    moving = rule(Measure.BYTE_RATE, Action.RESET, 1000, period=SECOND, burst=1000)

    def moved(total: int) -> list[Flow]:
        return [one._replace(client_bytes=total, client_packets=total) for one in held(60)]

    gateway = Gateway(policy(moving))
    gateway.see(moved(500), CALM)
    for step in range(1, 9):  # 60 connections, 1,200 bytes each in ten seconds
        assert gateway.see(moved(500 + 1200 * step)) == 0
    assert gateway.see(moved(30_000)) == 60


def test_under_pressure_its_connections_do_not_go_before_those_of_others() -> None:
    unanswered = rule(Measure.UNANSWERED, Action.RESET, 60 * SECOND, when_pressed=True)
    gateway = Gateway(policy(LIMITED, unanswered, capacity=((80, 240),)))
    gateway.see([*held(LIMIT - 20), *others(20)], CALM)

    def waiting(source: str, first: int) -> list[Flow]:
        made = held(90, source, answered=False, first=first)
        return [one._replace(age=50 * SECOND) for one in made]

    there = [*waiting(PROXY, 1000), *waiting("192.0.2.77", 5000), *others(30)]
    gateway.see(there)
    judgement = gateway.sweep.judge(there, gateway.now)
    ended = {one.flow.original.source for one in judgement.condemned}
    assert ended == {parse_address("192.0.2.77")}


# packets


def engine(*rules: Rule) -> Engine:
    made = Engine(policy(*rules))
    made.note_large([SOURCE])
    return made


def passed(made: Engine, count: int, source: str = PROXY, state: int = 0) -> int:
    verdicts = [
        made.decide(packet(source=source, source_port=port, state=state), SECOND).verdict
        for port in range(1, count + 1)
    ]
    return verdicts.count(Verdict.ACCEPT)


def test_its_syns_may_come_ten_times_as_fast_and_no_faster() -> None:
    limited = rule(Measure.SYN_RATE, Action.DROP, 5, period=SECOND, burst=5)
    assert passed(engine(limited), 100) == RATE_TIMES * 5
    assert passed(engine(limited), 100, source="192.0.2.9") == 5


def test_its_proven_packets_do_not_ban_it_before() -> None:
    banning = rule(Measure.SYN_RATE, Action.BAN, 5, period=SECOND, burst=5, duration=SECOND)
    assert passed(engine(banning), 100, state=KNOWN | PROVEN) == RATE_TIMES * 5


@pytest.mark.parametrize("measure", [Measure.BAD_FLAGS, Measure.OUT_OF_STATE])
def test_what_no_tcp_sends_is_not_spared(measure: Measure) -> None:
    spared = Spared()
    spared.note([SOURCE])
    address = SOURCE.network
    assert not spared.spares(rule(measure, Action.DROP, 5, period=SECOND), address, 0)
    assert spared.spares(rule(Measure.SYN_RATE, Action.DROP, 5, period=SECOND), address, 0)


def test_a_scan_of_its_is_seen_behind_its_many_syns() -> None:
    many = rule(Measure.SYN_RATE, Action.BAN, 2, period=SECOND, burst=2, duration=SECOND)
    scan = rule(Measure.DISTINCT_PORTS, Action.DROP, 3, within=10 * SECOND)
    made = engine(many, replace(scan, name="scan"))
    decisions = [made.decide(packet(source_port=port, port=port), SECOND) for port in range(1, 15)]
    assert {one.rule for one in decisions if one.verdict is Verdict.DROP} == {"scan"}


def test_who_is_spared_stays_so_when_the_policy_changes() -> None:
    limited = rule(Measure.SYN_RATE, Action.DROP, 5, period=SECOND, burst=5)
    made = engine(limited)
    assert passed(made, 30) == 30
    assert passed(Engine(policy(limited), made), 100) == 20


def test_a_productive_source_keeps_what_the_rule_gives_it() -> None:
    lenient = replace(LIMITED, unless=Unless(80, 10))
    gateway = Gateway(policy(lenient))
    assert gateway.see([*held(5 * LIMIT), *others(LIMIT)], CALM) == 0
