"""Sources met once: what is put off is counted all the same, and displaces nobody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.newcomers import Newcomers
from rstguard.engine.ruleset import SECOND, Measure, Per
from rstguard.engine.verdict import PASS, Action, Verdict
from rstguard.engine.wire import ACK, FIN, KNOWN, PROVEN, RST, STRAY, SYN, Packet
from tests.support.packets import CLIENT, CLIENT6, SERVER, rule, ruleset

RULES = ruleset(
    rule(Measure.SYN_RATE, limit=3, period=SECOND, burst=3, action=Action.BAN),
    rule(Measure.SYN_RATE, name="prefix", limit=6, per=Per.PREFIX, ipv4_length=24, burst=6),
    rule(Measure.SYN_RATE, name="service", limit=9, per=Per.SERVICE, burst=9),
    rule(Measure.HALF_OPEN, limit=2, within=SECOND),
    rule(Measure.DISTINCT_PORTS, limit=2, within=SECOND, action=Action.DROP),
    rule(Measure.SHORT_CONNECTIONS, limit=2, burst=2, shorter_than=SECOND),
    rule(Measure.STALLED, limit=SECOND, window=256, action=Action.RESET),
    rule(Measure.CONNECTION_RATE, limit=2, burst=2, ports=frozenset({80})),
)
KINDS = [(SYN, 0), (SYN, PROVEN), (SYN, KNOWN | PROVEN), (ACK, KNOWN | PROVEN), (ACK, PROVEN)]
KINDS += [(FIN | ACK, KNOWN | PROVEN), (RST, KNOWN | PROVEN), (ACK, STRAY), (SYN | FIN, 0)]
TARGET = parse_address(SERVER)


def segment(source: int, port: int = 80, flags: int = SYN, state: int = 0) -> Packet:
    return Packet(source, TARGET, 40000, port, 1, 1, flags, 10, 0, state, 0)


packets = st.tuples(
    st.sampled_from([parse_address(CLIENT) + n for n in range(3)] + [parse_address(CLIENT6)]),
    st.sampled_from([80, 81, 82, 83]),
    st.sampled_from(KINDS),
    st.integers(0, SECOND // 2),
)


@given(st.lists(packets, max_size=60))
def test_decisions_are_those_of_an_engine_that_puts_nothing_off(
    history: list[tuple[int, int, tuple[int, int], int]],
) -> None:
    engine, plain = Engine(RULES), Engine(RULES)
    plain._put_off = lambda packet, now: False
    now = SECOND
    for source, port, (flags, state), later in history:
        now += later
        packet = segment(source, port, flags, state)
        assert engine.decide(packet, now) == plain.decide(packet, now)


def test_a_flood_of_forged_sources_does_not_displace_one_that_goes_on() -> None:
    engine = Engine(ruleset(rule(Measure.SYN_RATE, limit=1, period=60 * SECOND, burst=100)))
    offender, now = parse_address(CLIENT), SECOND
    for _ in range(100):
        now += 1
        assert engine.decide(segment(offender), now) is PASS
    for forged in range(300_000):  # more than all tables hold, and none of them twice
        now += 1
        engine.decide(segment(forged << 1), now)
    assert engine.decide(segment(offender), now).verdict is Verdict.DROP


def test_the_table_of_newcomers_is_bounded() -> None:
    counted: list[Packet] = []
    newcomers = Newcomers(32, 64, capacity=100)
    newcomers.count = lambda packet, now: counted.append(packet)
    for source in range(1, 1000):
        assert newcomers.put_off(segment(source), source)
    assert len(newcomers) <= 200
    assert not newcomers.put_off(segment(999), 1000)
    assert [packet.source for packet in counted] == [999]
    for source in range(1, 1000):
        newcomers.meet(segment(source), counts_as_met=True)
    assert len(newcomers) <= 400


@pytest.mark.parametrize("measure", [Measure.DISTINCT_PORTS, Measure.HALF_OPEN])
def test_a_rule_that_allows_none_at_all_judges_the_first(measure: Measure) -> None:
    engine = Engine(ruleset(rule(measure, limit=0, within=SECOND, action=Action.DROP)))
    assert engine.decide(segment(parse_address(CLIENT)), SECOND).verdict is Verdict.DROP
