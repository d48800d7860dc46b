"""Many clients behind one address: who is productive, and what that is worth."""

from __future__ import annotations

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.lenient import LASTS, LEAST, MOST, Standings
from rstguard.engine.ruleset import ADOPTED, SECOND, Measure, Rule, Unless
from rstguard.engine.sweep import Sweep
from rstguard.engine.verdict import Action, Verdict
from tests.support.flows import flow
from tests.support.packets import CLIENT, packet, rule, ruleset
from tests.support.tables import AsTable

pytestmark = pytest.mark.usefixtures("as_table")

RULES = ruleset()
KEY = parse_address(CLIENT)


def lenient(measure: Measure = Measure.SYN_RATE, limit: int = 2, **more: object) -> Rule:
    return rule(measure, Action.DROP, limit, unless=Unless(80, 10), **more)


def used(port: int, *, source: str = CLIENT, closed: bool = False) -> Flow:
    """Return a connection that carried a request and its answer."""
    made = flow(port, source=source, sent=500, received=5000, packets=5)
    state = TcpState.TIME_WAIT if closed else TcpState.ESTABLISHED
    return made._replace(server_packets=6, state=state)


def unused(port: int, *, source: str = CLIENT) -> Flow:
    """Return a connection of nothing but handshake, keep-alive and close."""
    return flow(port, source=source, sent=60 + 4 * 52, received=60 + 3 * 52, packets=5)._replace(
        server_packets=4
    )


def percents(as_table: AsTable, *flows: Flow) -> dict[int, int]:
    standings = Standings()
    standings.look(as_table(flows), RULES, 0)
    return standings.percents()


def test_closed_connections_count_too(as_table: AsTable) -> None:
    flows = [used(port, closed=port % 2 == 0) for port in range(LEAST)]
    assert percents(as_table, *flows) == {KEY: 100}


def test_without_data_it_is_not_productive(as_table: AsTable) -> None:
    flows = [used(port) for port in range(15)] + [unused(100 + port) for port in range(5)]
    assert percents(as_table, *flows) == {KEY: 75}


def test_what_was_forgotten_and_taken_up_again_spoils_nothing(as_table: AsTable) -> None:
    """Of an office's WebSockets a tracker that was emptied sees no more than small pings."""
    adopted = 1 << RULES.labels + ADOPTED
    pings = [unused(100 + port)._replace(labels=adopted) for port in range(200)]
    assert percents(as_table, *pings) == {}
    assert percents(as_table, *(used(port) for port in range(LEAST)), *pings) == {KEY: 100}
    back = [used(100 + port)._replace(labels=adopted) for port in range(LEAST)]
    assert percents(as_table, *back) == {KEY: 100}
    assert percents(as_table, *back, *(unused(port) for port in range(5))) == {KEY: 80}


def test_of_few_connections_nothing_is_said(as_table: AsTable) -> None:
    assert percents(as_table, *(used(port) for port in range(LEAST - 1))) == {}


def test_standing_lasts_a_while_and_then_ends(as_table: AsTable) -> None:
    standings = Standings()
    standings.look(as_table(used(port) for port in range(LEAST)), RULES, 0)
    standings.look(as_table([]), RULES, LASTS - 1)
    assert standings.percents() == {KEY: 100}
    standings.look(as_table([]), RULES, LASTS)
    assert standings.percents() == {}


def test_the_table_is_bounded(as_table: AsTable) -> None:
    flows = [
        used(port, source=f"10.{number >> 8}.{number & 255}.1")
        for number in range(MOST + 100)
        for port in range(LEAST)
    ]
    assert len(percents(as_table, *flows)) == MOST


def passed(engine: Engine, count: int, now: int = SECOND) -> int:
    verdicts = [engine.decide(packet(source_port=port), now).verdict for port in range(count)]
    return verdicts.count(Verdict.ACCEPT)


def test_a_productive_source_may_go_ten_times_as_far_and_no_further() -> None:
    engine = Engine(ruleset(lenient()))
    engine.note_productive({KEY: 80})
    # 2 at once and 18 beyond; the first SYN of a source is counted when it is met again.
    assert passed(engine, 100) == 20


def test_others_may_not() -> None:
    engine = Engine(ruleset(lenient()))
    engine.note_productive({KEY: 79, KEY + 1: 100})
    assert passed(engine, 100) == 2


def test_standing_is_kept_over_another_policy_and_can_be_lost() -> None:
    first = Engine(ruleset(lenient()))
    first.note_productive({KEY: 100})
    second = Engine(ruleset(lenient(), rule(Measure.BAD_FLAGS, Action.DROP, 1)), first)
    assert passed(second, 100) == 20
    second.note_productive({})
    assert passed(second, 100, 2 * SECOND) == 2


def test_the_sweep_lets_a_productive_source_hold_more() -> None:
    hoarder = rule(Measure.CONNECTIONS, Action.RESET, 5, unless=Unless(80, 10))
    office = [used(port) for port in range(60)]
    attacker = [unused(port, source="203.0.113.66") for port in range(60)]
    judgement = Sweep(ruleset(hoarder)).judge(office + attacker, 1000 * SECOND)
    hit = [objection.flow.original.source for objection in judgement.condemned]
    assert hit.count(parse_address("203.0.113.66")) == 55
    assert hit.count(KEY) == 10


def test_what_began_uncounted_says_nothing_of_a_source(as_table: AsTable) -> None:
    flows = [used(port) for port in range(LEAST)]
    uncounted = [flow(port, packets=0) for port in range(100, 200)]
    assert percents(as_table, *flows, *uncounted) == {KEY: 100}
