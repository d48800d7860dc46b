"""What a worker leaves undone while its queue fills, and that it takes it up again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import Prefix, parse_address
from rstguard.engine.engine import OVERLOAD, Engine
from rstguard.engine.heavy import HeavyHitters
from rstguard.engine.ruleset import SECOND, Measure, Per, RuleSet
from rstguard.engine.shedding import Level, Shedding
from rstguard.engine.verdict import PASS, Action, Ban, Condemn, Reason, Shun, Verdict
from rstguard.engine.wire import ACK, KNOWN, OVER, PROVEN, STRAY, SYN, Packet
from tests.support.packets import CLIENT, MILLISECOND, SERVER, rule, ruleset

OFFENDER, TARGET = parse_address(CLIENT), parse_address(SERVER)
RULES = ruleset(
    rule(Measure.SYN_RATE, limit=1, period=60 * SECOND),
    rule(Measure.OUT_OF_STATE, limit=1, period=60 * SECOND),
    rule(Measure.CONNECTION_RATE, limit=1, period=60 * SECOND),
)


def segment(source: int, flags: int = SYN, state: int = 0) -> Packet:
    return Packet(source, TARGET, 40000, 80, 1, 1, flags, 64240, 0, state)


@given(st.lists(st.integers(0, 30), max_size=400), st.integers(1, 10))
def test_a_heavy_hitters_count_is_never_too_high_and_at_most_its_share_too_low(
    keys: list[int], size: int
) -> None:
    heavy, exact = HeavyHitters(size, 10**9), Counter[int]()
    for key in keys:
        exact[key] += 1
        assert heavy.add(key) <= exact[key]
        assert len(heavy) <= size
    for key, count in exact.items():
        assert heavy.add(key) >= count - heavy.total / (size + 1)


def test_levels_rise_with_the_queue_and_fall_one_by_one_when_it_stays_short() -> None:
    shedding, now = Shedding(4096), SECOND
    levels = [shedding.look(waiting, 0, now, 0) for waiting in (0, 1023, 1024, 2048, 3072)]
    assert levels == [0, 0, 1, 2, 3]
    assert shedding.look(1600, 0, now, 0) == Level.SYNS, "more than half of where it begins"
    fallen = []
    for _ in range(70):
        now += 50 * MILLISECOND
        fallen.append(shedding.look(0, 0, now, 0))
    assert sorted(set(fallen), reverse=True) == [3, 2, 1, 0]
    assert fallen.count(Level.SYNS) >= 20, "each level is held for a second"


def test_a_short_calm_does_not_end_it() -> None:
    shedding, now = Shedding(4096), SECOND
    for _ in range(100):
        shedding.look(4000, 0, now, 0)
        shedding.look(0, 0, now, 0)
        now += 900 * MILLISECOND
        assert shedding.look(0, 0, now, 0) == Level.SYNS
        now += 100 * MILLISECOND


def test_a_lost_packet_brings_the_last_level_at_once() -> None:
    shedding = Shedding(4096)
    assert shedding.look(10, 5, SECOND, 0) == Level.SYNS


def thinned(capacity: int = 100_000) -> tuple[Shedding, int]:
    """Return one whose queue was half full for 20 ms though `capacity` a second were taken."""
    shedding, now = Shedding(4096), SECOND
    while shedding.level is not Level.THINNED:
        shedding.look(2048, 0, now, capacity * (now - SECOND) // SECOND)
        now += 5 * MILLISECOND
    assert now - SECOND == 25 * MILLISECOND
    return shedding, now


def test_a_pause_of_the_worker_is_made_up_for() -> None:
    shedding = Shedding(4096)
    assert shedding.look(2000, 0, SECOND, 0) == Level.STRAYS
    assert shedding.look(4000, 0, SECOND + 200 * MILLISECOND, 100) == Level.SYNS
    assert shedding.look(1000, 0, SECOND + 220 * MILLISECOND, 5000) == Level.SYNS
    assert shedding.look(1030, 0, SECOND + 230 * MILLISECOND, 9000) == Level.SYNS


def go_on(shedding: Shedding, now: int, rate: int, waiting: int = 0) -> Iterator[Level]:
    """Tell the level every 100 ms while so many packets a second come through the sample."""
    for step in range(1, 400):
        taken = 1_000_000 + rate * step // 10
        yield shedding.look(waiting, 0, now + 100 * step * MILLISECOND, taken)


def test_a_queue_that_stays_long_is_thinned_until_little_comes() -> None:
    shedding, now = thinned()
    lasts = list(go_on(shedding, now, rate=2000)).index(Level.SYNS)
    assert 10 <= lasts <= 16, "of 32,000 a second it could take 100,000"


def test_a_flood_that_goes_on_is_looked_at_every_ten_seconds() -> None:
    shedding, now = thinned()
    lasts = list(go_on(shedding, now, rate=20_000)).index(Level.SYNS)
    assert 98 <= lasts <= 101


def test_thinning_that_does_not_help_is_given_up_for_a_while() -> None:
    shedding, now = thinned()
    levels = list(go_on(shedding, now, rate=20_000, waiting=2048))
    given_up = levels.index(Level.SYNS)
    assert given_up < 6
    assert Level.THINNED not in levels[given_up : given_up + 98]
    assert levels[given_up + 101] is Level.THINNED


def overloaded(rules: RuleSet = RULES) -> Engine:
    engine = Engine(rules)
    for _ in range(3):
        engine.decide(segment(OFFENDER), SECOND)
    return engine


def test_what_belongs_to_a_connection_is_judged_at_every_level() -> None:
    for level in Level:
        engine = Engine(RULES)
        verdicts = [
            engine.at(level)(
                segment(OFFENDER, ACK, KNOWN | PROVEN)._replace(source_port=port), SECOND
            )
            for port in (1, 2)
        ]
        assert [v.verdict for v in verdicts] == [Verdict.ACCEPT, Verdict.DROP]
        assert engine.shed == 0


def test_strays_go_first() -> None:
    engine = overloaded()
    for _ in range(5):
        decision = engine.at(Level.STRAYS)(segment(OFFENDER, ACK, STRAY), SECOND)
        assert decision is PASS
    assert engine.shed == 5
    assert engine.at(Level.STRAYS)(segment(OFFENDER), SECOND).rule == "syn_rate-rule"


@pytest.mark.parametrize(("fail_open", "verdict"), [(True, Verdict.ACCEPT), (False, Verdict.DROP)])
def test_then_newcomers_then_all_unproven_syns(fail_open: bool, verdict: Verdict) -> None:
    engine = overloaded(replace(RULES, fail_open=fail_open))
    new, known = segment(OFFENDER + 1), segment(OFFENDER)
    proven = segment(OFFENDER, SYN, PROVEN)
    assert engine.at(Level.STRAYS)(new, SECOND) is PASS
    assert engine.at(Level.NEWCOMERS)(segment(OFFENDER + 2), SECOND).verdict is verdict
    assert engine.at(Level.NEWCOMERS)(known, SECOND).rule == "syn_rate-rule"
    assert engine.at(Level.SYNS)(known, SECOND).verdict is verdict
    assert engine.at(Level.SYNS)(known, SECOND).rule == ""
    assert engine.at(Level.SYNS)(proven, SECOND).rule == "syn_rate-rule"
    assert engine.shed == 3


def test_the_limit_of_a_service_holds_at_every_level() -> None:
    limit = replace(rule(Measure.SYN_RATE, limit=10, action=Action.DROP), per=Per.SERVICE)
    engine = Engine(ruleset(limit))
    verdicts = Counter(
        engine.at(level)(segment(number << 8), SECOND).verdict
        for level in (Level.NEWCOMERS, Level.SYNS, Level.THINNED)
        for number in range(100)
    )
    assert verdicts == {Verdict.ACCEPT: 10, Verdict.DROP: 290}


def test_a_source_that_holds_the_worker_up_is_shunned_and_never_banned() -> None:
    engine = Engine(RULES)
    effects: list[Ban | Shun | Condemn] = []
    for number in range(2000):
        engine.at(Level.SYNS)(segment(number << 8), SECOND)
        for _ in range(2):
            decision = engine.at(Level.SYNS)(segment(OFFENDER), SECOND)
            effects += decision.effects
    assert [type(effect) for effect in effects] == [Shun]
    assert (effects[0].rule, effects[0].reason) == (OVERLOAD, Reason.OVERLOAD)
    assert isinstance(effects[0], Shun)
    assert str(effects[0].source) == CLIENT


def test_sources_that_send_the_like_of_each_other_are_not_shunned() -> None:
    engine = Engine(RULES)
    for number in range(20_000):
        decision = engine.at(Level.SYNS)(segment(number % 100 << 8), SECOND)
        assert not decision.effects


def test_a_proven_source_is_not_watched() -> None:
    engine = Engine(ruleset(rule(Measure.SYN_RATE, limit=1_000_000)))
    for _ in range(5000):
        decision = engine.at(Level.SYNS)(segment(OFFENDER, SYN, PROVEN), SECOND)
        assert decision is PASS


OF_NO_CONNECTION = {Measure.OUT_OF_STATE: ACK, Measure.BAD_FLAGS: 0}
WITHOUT_KERNEL: dict[str, dict[str, Any]] = {
    "in time": {"period": 7 * SECOND},
    "in rate": {"limit": 2_000_000},
    "of some": {"destinations": (Prefix(TARGET, 32),)},
}
"""What the kernel cannot count."""


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("fail_open", [True, False], ids=["open", "closed"])
@pytest.mark.parametrize("action", [Action.DROP, Action.RESET, Action.BAN])
@pytest.mark.parametrize("measure", OF_NO_CONNECTION)
def test_no_level_lets_pass_what_the_kernel_found_too_many(
    level: Level, fail_open: bool, action: Action, measure: Measure
) -> None:
    """A rule that bans has it shown; of others it comes here if at all by a change of policy."""
    rules = replace(ruleset(rule(measure, action, limit=9)), fail_open=fail_open)
    engine = Engine(rules)
    over = segment(OFFENDER, OF_NO_CONNECTION[measure], STRAY | OVER)
    decision = engine.at(level)(over, SECOND)
    if action is Action.BAN:
        assert decision.verdict is Verdict.DROP
        assert [type(effect) for effect in decision.effects] == [Shun]
        assert decision == Engine(rules).decide(over, SECOND)


@pytest.mark.parametrize("level", Level)
@pytest.mark.parametrize("action", [Action.DROP, Action.RESET, Action.BAN])
@pytest.mark.parametrize("measure", OF_NO_CONNECTION)
@pytest.mark.parametrize("cannot", WITHOUT_KERNEL)
def test_what_the_kernel_cannot_count_is_judged_at_each_level(
    level: Level, action: Action, measure: Measure, cannot: str
) -> None:
    rules = ruleset(
        rule(
            measure, action, **{"limit": 1, "burst": 1, "period": SECOND, **WITHOUT_KERNEL[cannot]}
        )
    )
    assert not rules.kept_by_kernel(measure)
    engine, alike = Engine(rules), Engine(rules)
    stray = segment(OFFENDER, OF_NO_CONNECTION[measure], STRAY)
    decisions = [engine.at(level)(stray, SECOND) for _ in range(3)]
    assert decisions == [alike.decide(stray, SECOND) for _ in range(3)]
    assert decisions[-1].verdict is Verdict.DROP


def test_the_narrowest_is_shunned_where_the_kernel_does_not_say_by_which_rule() -> None:
    wide = replace(rule(Measure.OUT_OF_STATE, Action.BAN, 9), ipv4_length=24, name="wide")
    narrow = rule(Measure.OUT_OF_STATE, Action.BAN, 9)
    elsewhere = replace(narrow, name="elsewhere", ports=frozenset({443}))
    engine = Engine(ruleset(wide, narrow, elsewhere))
    (shun,) = engine.decide(segment(OFFENDER, ACK, STRAY | OVER), SECOND).effects
    assert isinstance(shun, Shun)
    assert (shun.rule, shun.source.length) == (narrow.name, 32)
