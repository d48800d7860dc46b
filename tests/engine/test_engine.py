"""What becomes of rules that are hit: the most severe wins, a ban needs proof, nothing twice."""

from __future__ import annotations

import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import V6, parse_prefix
from rstguard.engine.checks import Kind
from rstguard.engine.engine import Engine, kind_of
from rstguard.engine.ruleset import SECOND, Escalate, Measure, Per, Rule
from rstguard.engine.sources import Sources
from rstguard.engine.verdict import (
    PASS,
    PASS_AND_TRUST,
    Action,
    Ban,
    Condemn,
    Ends,
    Reason,
    Shun,
    Verdict,
)
from rstguard.engine.wire import (
    ACK,
    FIN,
    KNOWN,
    OUTBOUND,
    PROVEN,
    RST,
    STRAY,
    SYN,
    Malformed,
    Packet,
    parse,
)
from tests.support.packets import CLIENT, MILLISECOND, packet, rule, ruleset

MINUTE = 60 * SECOND
BANNED = parse_prefix(CLIENT)


def banning(**more: object) -> Rule:
    """Return a rule that bans from the second SYN of a second on."""
    return rule(Measure.SYN_RATE, Action.BAN, limit=1, **more)


def test_what_no_rule_looks_at_passes() -> None:
    engine = Engine(ruleset())
    assert engine.decide(packet(), 0) is PASS
    assert engine.decide(packet(FIN | ACK, state=KNOWN), 0) is PASS


def test_an_accepted_first_ack_is_trusted() -> None:
    assert Engine(ruleset()).decide(packet(ACK, state=KNOWN | PROVEN), 0) is PASS_AND_TRUST


def test_an_unreadable_packet_is_told_apart() -> None:
    decision = Engine(ruleset()).decide(Malformed("empty"), 0)
    assert decision.reason is Reason.UNREADABLE
    assert decision.effects == ()


@pytest.mark.parametrize(
    ("flags", "state", "kind"),
    [
        (SYN, 0, Kind.SYN),
        (SYN, PROVEN, Kind.SYN),
        (SYN | ACK, 0, Kind.OTHER),
        (SYN | FIN, 0, Kind.BAD),
        (0, STRAY, Kind.BAD),
        (ACK, STRAY, Kind.STRAY),
        (RST, STRAY, Kind.STRAY),
        (ACK, KNOWN, Kind.HANDSHAKE),
        (ACK, KNOWN | PROVEN, Kind.HANDSHAKE),
        (FIN | ACK, KNOWN, Kind.CLOSE),
        (RST, KNOWN, Kind.CLOSE),
        (RST, KNOWN | OUTBOUND, Kind.CLOSE),
        (ACK, 0, Kind.OTHER),
    ],
)
def test_kind_of(flags: int, state: int, kind: Kind) -> None:
    assert kind_of(packet(flags, state=state)) is kind


@given(st.integers(0, 255), st.integers(0, 31))
def test_every_packet_is_of_some_kind_and_decided(flags: int, state: int) -> None:
    every = [
        rule(measure, Action.BAN, limit=1, shorter_than=SECOND)
        for measure in (Measure.SYN_RATE, Measure.CONNECTION_RATE, Measure.BAD_FLAGS)
    ]
    engine = Engine(ruleset(*every))
    for now in range(3):
        assert engine.decide(packet(flags, state=state), now).verdict in Verdict


# The worst action wins, whatever the order of the rules.


@pytest.mark.parametrize("turned_round", [False, True])
@pytest.mark.parametrize(
    ("actions", "winner"),
    [
        ([Action.OBSERVE, Action.DROP], Action.DROP),
        ([Action.DROP, Action.RESET], Action.RESET),
        ([Action.RESET, Action.BAN], Action.BAN),
        ([Action.OBSERVE, Action.BAN, Action.DROP], Action.BAN),
    ],
)
def test_the_most_severe_action_wins(
    actions: list[Action], winner: Action, turned_round: bool
) -> None:
    rules = [rule(Measure.SYN_RATE, action, limit=1, name=action.name) for action in actions]
    engine = Engine(ruleset(*(reversed(rules) if turned_round else rules)))
    engine.decide(packet(), 0)
    assert engine.decide(packet(), 0).rule == winner.name


def test_of_two_equally_stern_rules_the_first_is_named() -> None:
    engine = Engine(
        ruleset(
            rule(Measure.SYN_RATE, limit=1, name="one"), rule(Measure.SYN_RATE, limit=1, name="two")
        )
    )
    engine.decide(packet(), 0)
    assert engine.decide(packet(), 0).rule == "one"


def test_every_rule_counts_a_packet_that_another_objects_to() -> None:
    engine = Engine(
        ruleset(
            rule(Measure.SYN_RATE, Action.DROP, limit=1, name="mild"),
            rule(Measure.SYN_RATE, Action.RESET, limit=4, name="stern"),
        )
    )
    names = [engine.decide(packet(), 0).rule for _ in range(6)]
    assert names == ["", "mild", "mild", "mild", "stern", "stern"]


# Resets.


@pytest.mark.parametrize("ends", Ends)
def test_a_reset_condemns_a_known_connection_at_the_rules_ends(ends: Ends) -> None:
    engine = Engine(ruleset(rule(Measure.CONNECTION_RATE, Action.RESET, limit=1, ends=ends)))
    for port in (1, 2):
        seen = packet(ACK, source_port=port, state=KNOWN | PROVEN)
        decision = engine.decide(seen, 0)
    assert decision.verdict is Verdict.RESET
    assert decision.ends is ends
    effect = Condemn(decision.effects[0].flow, ends, "connection_rate-rule", Reason.CONNECTION_RATE)  # type: ignore[union-attr]
    assert decision.effects == (effect,)
    assert effect.flow == seen[:4]


def test_a_reset_of_a_refused_syn_has_no_connection_to_condemn() -> None:
    engine = Engine(ruleset(rule(Measure.SYN_RATE, Action.RESET, limit=1)))
    engine.decide(packet(), 0)
    decision = engine.decide(packet(), 0)
    assert decision.verdict is Verdict.RESET
    assert decision.effects == ()


# The trusted list has the last word.


@pytest.mark.parametrize("action", [Action.DROP, Action.RESET, Action.BAN])
def test_a_trusted_source_is_never_blocked(action: Action) -> None:
    engine = Engine(
        ruleset(
            rule(Measure.SYN_RATE, action, limit=1), trusted=("198.51.100.0/24", "2001:db8::/32")
        )
    )
    for source in (CLIENT, "2001:db8::1"):
        for _ in range(5):
            decision = engine.decide(packet(source=source, state=PROVEN), 0)
            assert decision.verdict is Verdict.ACCEPT
            assert decision.effects == ()
        assert decision.reason is Reason.TRUSTED
    engine.decide(packet(source="192.0.2.1"), 0)
    assert engine.decide(packet(source="192.0.2.1"), 0).reason is Reason.SYN_RATE


# A ban needs proof.

COOKIE = KNOWN | PROVEN
"""The state of the kernel's own SYN, for a client that has returned a SYN cookie."""


def test_a_source_that_proved_its_address_is_banned() -> None:
    engine = Engine(ruleset(banning()))
    engine.decide(packet(state=COOKIE), 0)
    decision = engine.decide(packet(state=COOKIE), 0)
    assert decision.verdict is Verdict.DROP
    wanted = Ban(BANNED, 600 * SECOND, "syn_rate-rule", Reason.SYN_RATE, keep_existing=False)
    assert decision.effects == (wanted,)


def test_a_source_without_proof_is_only_shunned() -> None:
    policy = ruleset(banning())
    engine = Engine(policy)
    engine.decide(packet(), 0)
    decision = engine.decide(packet(), 0)
    assert decision.verdict is Verdict.DROP
    wanted = Shun(BANNED, policy.shun_duration, "syn_rate-rule", Reason.SYN_RATE)
    assert decision.effects == (wanted,)


def test_forged_syns_in_a_visitors_name_do_not_ban_him() -> None:
    """Neither do they by filling the count that his own connections are then one too many for."""
    policy = ruleset(
        banning(burst=10),
        rule(Measure.CONNECTION_RATE, Action.BAN, limit=1, burst=10),
        rule(Measure.DISTINCT_PORTS, Action.BAN, limit=3, within=60 * SECOND),
        rule(Measure.HALF_OPEN, Action.BAN, limit=3, within=60 * SECOND),
    )
    engine = Engine(policy)
    found: list[type] = []
    for number in range(1000):
        forged = packet(source_port=number, port=number % 50, state=PROVEN)
        found += map(type, engine.decide(forged, number * 10 * MILLISECOND).effects)
        if number % 200 == 0:
            own = [packet(source_port=9999, state=COOKIE), packet(ACK, source_port=9998 - number)]
            for seen in (own[0], own[1]._replace(state=KNOWN | PROVEN)):
                found += map(type, engine.decide(seen, number * 10 * MILLISECOND).effects)
    assert set(found) == {Shun}


@pytest.mark.parametrize("action", [Action.DROP, Action.RESET, Action.BAN])
@pytest.mark.parametrize(
    "measure",
    [Measure.SYN_RATE, Measure.DISTINCT_PORTS, Measure.DISTINCT_HOSTS, Measure.HALF_OPEN],
)
def test_a_returned_cookie_passes_whatever_is_forged(measure: Measure, action: Action) -> None:
    """Its owner must not be refused, or blocked once more, for SYNs that are not his."""
    engine = Engine(ruleset(rule(measure, action, limit=10, burst=10, within=60 * SECOND)))
    for number in range(100):
        forged = packet(source_port=number, port=number, destination=f"192.0.2.{number}")
        last = engine.decide(forged, number * MILLISECOND)
    assert last.verdict is not Verdict.ACCEPT
    for number in range(5):
        own = packet(source_port=5000 + number, port=101 + number, state=COOKIE)
        decision = engine.decide(own, 100 * MILLISECOND)
        assert (decision.verdict, decision.effects) == (Verdict.ACCEPT, ())


def test_who_scans_by_returned_cookies_is_banned() -> None:
    policy = ruleset(rule(Measure.DISTINCT_PORTS, Action.BAN, limit=10, within=60 * SECOND))
    engine = Engine(policy)
    scanned = (packet(port=port, state=COOKIE) for port in range(11))
    found = [type(effect) for seen in scanned for effect in engine.decide(seen, 0).effects]
    assert found == [Ban]


def test_a_flood_that_returns_cookies_is_banned() -> None:
    engine = Engine(ruleset(banning(burst=10)))
    found = effects_at(engine, list(range(12)), COOKIE)
    assert found == [Ban]


def test_handshakes_that_may_be_forged_do_not_ban() -> None:
    """An ACK that fitted nothing came from the source lately: its handshakes prove nothing."""
    engine = Engine(ruleset(rule(Measure.CONNECTION_RATE, Action.BAN, limit=1, burst=10)))
    found: list[object] = []
    for port in range(20):
        found += engine.decide(packet(ACK, source_port=port, state=KNOWN), 0).effects
    assert [type(effect) for effect in found] == [Shun]


@pytest.mark.parametrize("burst", [1, 2, 3, 4, 20])
def test_one_lucky_forgery_is_not_the_last_straw_of_a_rare_limit(burst: int) -> None:
    engine = Engine(ruleset(rule(Measure.CONNECTION_RATE, Action.BAN, limit=1, burst=burst)))
    found: list[type] = []
    for port in range(burst + 10):
        effects = engine.decide(packet(ACK, source_port=port, state=KNOWN | PROVEN), 0).effects
        found += map(type, effects)
        assert (Ban in found) == (port >= max(burst, 3))


def test_the_rsts_of_one_connection_are_one_proof() -> None:
    engine = Engine(ruleset(rule(Measure.RESET_RATE, Action.BAN, limit=1, burst=5)))
    found: list[type] = []
    for port in (1,) * 50 + tuple(range(2, 7)):
        effects = engine.decide(packet(RST, source_port=port, state=KNOWN | PROVEN), 0).effects
        found += map(type, effects)
    assert found == [Shun, Ban]


def test_an_ack_alone_proves_nothing() -> None:
    engine = Engine(ruleset(rule(Measure.OUT_OF_STATE, Action.BAN, limit=1)))
    for _ in range(2):
        decision = engine.decide(packet(ACK, state=STRAY), 0)
    assert [type(effect) for effect in decision.effects] == [Shun]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([SYN, ACK, FIN, RST, 0]))))
def test_no_unproven_source_is_ever_banned(history: list[tuple[int, int]]) -> None:
    every = [
        rule(measure, Action.BAN, limit=1, shorter_than=SECOND)
        for measure in (
            Measure.SYN_RATE,
            Measure.BAD_FLAGS,
            Measure.OUT_OF_STATE,
            Measure.HALF_OPEN,
        )
    ]
    engine = Engine(ruleset(*every))
    for step, (last_byte, flags) in enumerate(history):
        state = 0 if flags in {SYN, 0} else STRAY
        seen = packet(flags, source=f"192.0.2.{last_byte}", state=state)
        decision = engine.decide(seen, step * MILLISECOND)
        assert not any(isinstance(effect, Ban) for effect in decision.effects)


@pytest.mark.parametrize(
    ("per", "source", "banned"),
    [
        ({}, CLIENT, "198.51.100.7"),
        ({}, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ({"ipv4_length": 24, "per": Per.PREFIX}, CLIENT, "198.51.100.0/24"),
        ({"ipv6_length": 48, "per": Per.PREFIX}, "2001:db8:1:2:3::4", "2001:db8:1::/48"),
        ({"per": Per.SERVICE}, CLIENT, "198.51.100.7"),
        ({"per": Per.SERVICE}, "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
    ],
)
def test_a_block_is_laid_on_what_the_rule_counts(
    per: dict[str, object], source: str, banned: str
) -> None:
    engine = Engine(ruleset(banning(**per)))
    engine.decide(packet(source=source, state=COOKIE), 0)
    (effect,) = engine.decide(packet(source=source, state=COOKIE), 0).effects
    assert isinstance(effect, Ban)
    assert effect.source == parse_prefix(banned)


def test_keep_existing_is_handed_on() -> None:
    engine = Engine(ruleset(banning(keep_existing=True)))
    engine.decide(packet(state=COOKIE), 0)
    (effect,) = engine.decide(packet(state=COOKIE), 0).effects
    assert isinstance(effect, Ban)
    assert effect.keep_existing


def test_a_stalled_connection_is_proof_of_its_clients_address() -> None:
    engine = Engine(ruleset(rule(Measure.STALLED, Action.BAN, limit=30 * SECOND, window=256)))
    shut = packet(ACK, window=0, state=PROVEN)  # only such connections' ACKs are diverted
    engine.decide(shut, 0)
    (effect,) = engine.decide(shut, 31 * SECOND).effects
    assert isinstance(effect, Ban)


# Effects are ordered once.


def effects_at(engine: Engine, times: list[int], state: int) -> list[type]:
    """Return the types of all effects of SYNs sent at the given milliseconds."""
    return [
        type(effect)
        for time in times
        for effect in engine.decide(packet(state=state), time * MILLISECOND).effects
    ]


def test_a_ban_is_ordered_once_though_packets_are_still_under_way() -> None:
    assert effects_at(Engine(ruleset(banning())), [0, 0, 1, 2, 3, 500, 900], COOKIE) == [Ban]


def test_a_shun_is_ordered_once_though_packets_are_still_under_way() -> None:
    assert effects_at(Engine(ruleset(banning())), [0, 0, 1, 2, 3, 500, 900], 0) == [Shun]


def test_a_source_that_still_arrives_after_a_second_is_banned_again() -> None:
    assert effects_at(Engine(ruleset(banning())), [0, 0, 1, 1500, 1501], COOKIE) == [Ban, Ban]


def test_a_shun_does_not_stand_in_the_way_of_a_ban() -> None:
    engine = Engine(ruleset(banning()))
    assert effects_at(engine, [0, 0, 1], 0) == [Shun]
    assert effects_at(engine, [2, 3], COOKIE) == [Ban]


def test_a_ban_is_not_weakened_to_a_shun() -> None:
    engine = Engine(ruleset(banning()))
    assert effects_at(engine, [0, 0, 1], COOKIE) == [Ban]
    assert effects_at(engine, [2, 3], 0) == []


def test_while_only_observing_a_ban_is_reported_once_for_its_whole_time() -> None:
    engine = Engine(ruleset(banning(), enforce=False))
    times = [second * 1000 for second in range(600) for _ in range(3)]
    assert effects_at(engine, times, COOKIE) == [Ban]
    assert effects_at(engine, [600_001, 600_001, 600_002], COOKIE) == [Ban]


# Repeated offences.


def durations(rule_: Rule, times: list[int]) -> list[int]:
    """Return how long the bans ordered at these seconds last, in seconds."""
    sources = Sources(ruleset(rule_))
    found = []
    for time in times:
        for effect in sources.block(BANNED, True, rule_, time * SECOND):
            found.append(effect.duration // SECOND)  # noqa: PERF401
    return found


ESCALATING = banning(
    duration=30 * MINUTE, escalate=Escalate(4, 24 * 60 * MINUTE, 7 * 1440 * MINUTE)
)


def test_each_new_ban_lasts_longer_up_to_a_limit() -> None:
    hours = [0, 10, 20, 30, 60]
    assert durations(ESCALATING, [h * 3600 for h in hours]) == [1800, 7200, 28800, 86400, 86400]


def test_an_offence_is_forgotten_in_time() -> None:
    week = 7 * 86400
    assert durations(ESCALATING, [0, 10_000, 10_000 + week + 1]) == [1800, 7200, 1800]


def test_without_escalation_each_ban_lasts_the_same() -> None:
    assert durations(banning(), [0, 1000, 2000]) == [600, 600, 600]


def test_the_same_ban_ordered_again_is_no_new_offence() -> None:
    assert durations(ESCALATING, [0, 1, 2, 3, 4]) == [1800] * 5


def test_offences_against_one_rule_do_not_lengthen_the_bans_of_another() -> None:
    other = banning(name="other", duration=MINUTE, escalate=ESCALATING.escalate)
    sources = Sources(ruleset(ESCALATING, other))
    sources.block(BANNED, True, ESCALATING, 0)
    (effect,) = sources.block(BANNED, True, other, 3600 * SECOND)
    assert effect.duration == MINUTE


def test_a_shun_is_no_offence() -> None:
    sources = Sources(ruleset(ESCALATING))
    for minute in range(5):
        (effect,) = sources.block(BANNED, False, ESCALATING, minute * MINUTE)
        assert isinstance(effect, Shun)
    (effect,) = sources.block(BANNED, True, ESCALATING, 10 * MINUTE)
    assert effect.duration == 30 * MINUTE


def test_a_thousand_offences_do_not_overflow() -> None:
    found = durations(ESCALATING, [hour * 3600 for hour in range(1000)])
    assert found[-1] == 86400


# A change of policy.


def test_an_unchanged_rule_keeps_its_counts_over_a_change_of_policy() -> None:
    kept = rule(Measure.SYN_RATE, limit=2, name="kept")
    first = Engine(ruleset(kept))
    first.decide(packet(), 0)
    first.decide(packet(), 0)
    second = Engine(ruleset(rule(Measure.BAD_FLAGS), kept), previous=first)
    assert second.decide(packet(), 0).rule == "kept"


def test_a_changed_rule_starts_afresh() -> None:
    first = Engine(ruleset(rule(Measure.SYN_RATE, limit=1)))
    first.decide(packet(), 0)
    second = Engine(ruleset(rule(Measure.SYN_RATE, limit=1, burst=2)), previous=first)
    assert second.decide(packet(), 0) is PASS


def test_a_removed_rule_is_gone() -> None:
    first = Engine(ruleset(rule(Measure.SYN_RATE, limit=1)))
    first.decide(packet(), 0)
    assert Engine(ruleset(), previous=first).decide(packet(), 0) is PASS


def test_offences_are_remembered_over_a_change_of_policy() -> None:
    first = Engine(ruleset(ESCALATING))
    assert effects_at(first, [0, 0], COOKIE) == [Ban]
    second = Engine(ruleset(ESCALATING, rule(Measure.BAD_FLAGS)), previous=first)
    hour = 3600 * SECOND
    second.decide(packet(state=COOKIE), hour)
    (effect,) = second.decide(packet(state=COOKIE), hour).effects
    assert isinstance(effect, Ban)
    assert effect.duration == 4 * 30 * MINUTE


# What it costs.

EVERY_SYN_MEASURE = ruleset(
    rule(Measure.SYN_RATE, Action.BAN, limit=100, name="rate"),
    rule(
        Measure.SYN_RATE, limit=1000, name="subnet", per=Per.PREFIX, ipv4_length=24, ipv6_length=48
    ),
    rule(Measure.DISTINCT_PORTS, Action.BAN, limit=15, name="scan"),
    rule(Measure.DISTINCT_HOSTS, Action.BAN, limit=15, name="sweep"),
    rule(Measure.HALF_OPEN, limit=100, name="half-open"),
    rule(Measure.SHORT_CONNECTIONS, Action.BAN, limit=10, name="short", shorter_than=SECOND),
)


def flood(engine: Engine, start: int, count: int) -> None:
    """Send a SYN of a new source each microsecond, of IPv4 and IPv6 by turns."""
    syn = packet()
    for number in range(start, start + count):
        source = V6 | number << 64 if number & 1 else number
        engine.decide(Packet(source, *syn[1:]), number * 1000)


def test_memory_is_bounded_however_many_sources_come() -> None:
    engine = Engine(EVERY_SYN_MEASURE)
    flood(engine, 0, 140_000)
    tracemalloc.start()
    try:
        # Every table turns over once more, so that all it then holds has been counted.
        flood(engine, 140_000, 140_000)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 120_000_000, f"{held:,} bytes"


def test_a_decision_takes_few_calls() -> None:
    """Calls are what a decision costs; counted, not timed, they are the same on any machine."""
    engine = Engine(EVERY_SYN_MEASURE)
    data = bytes.fromhex("4500002800014000400600 00c6336407cb00710a".replace(" ", ""))
    data += bytes.fromhex("9c400050010203040000000050 02faf000000000".replace(" ", ""))
    engine.decide(parse(data), 0)  # put off: its source's first
    engine.decide(parse(data), 0)  # that one, and this
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        engine.decide(parse(data), 1)
    finally:
        sys.setprofile(None)
    assert calls <= 10 + 8 * len(EVERY_SYN_MEASURE.rules), f"{calls} calls"


def test_a_packet_that_passes_leaves_no_garbage() -> None:
    """The calm decision is one shared value, and a source seen before needs no new entry."""
    engine = Engine(ruleset(rule(Measure.SYN_RATE, limit=1_000_000)))
    data = bytes.fromhex("4500002800014000400600 00c6336407cb00710a".replace(" ", ""))
    data += bytes.fromhex("9c400050010203040000000050 02faf000000000".replace(" ", ""))
    engine.decide(parse(data), 0)
    tracemalloc.start()
    try:
        before = _held_by_us()
        for number in range(1000):
            assert engine.decide(parse(data), number) is PASS
        after = _held_by_us()
    finally:
        tracemalloc.stop()
    assert after - before < 2000


def _held_by_us() -> int:
    """Return the bytes that lines of ours hold: other threads may run beside a test."""
    ours = tracemalloc.Filter(inclusive=True, filename_pattern="*/rstguard/*")
    traces = tracemalloc.take_snapshot().filter_traces([ours]).traces
    return sum(trace.size for trace in traces)


def test_a_source_that_was_shunned_does_not_return_with_a_fresh_burst() -> None:
    engine = Engine(ruleset(rule(Measure.SYN_RATE, Action.BAN, limit=100, burst=200)))
    flood = [engine.decide(packet(), n * MILLISECOND).verdict for n in range(20_000)]
    first_second, after_the_shun = flood[:1_000], flood[10_300:11_300]
    assert 200 <= first_second.count(Verdict.ACCEPT) <= 300
    assert after_the_shun.count(Verdict.ACCEPT) <= 102
