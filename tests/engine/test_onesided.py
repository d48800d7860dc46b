"""Services seen from one side: when it is told, and that half-open handshakes at them count not."""

from __future__ import annotations

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.onesided import ASK_EVERY, MOST, OneSided, Told
from rstguard.engine.ruleset import SECOND, Measure
from rstguard.engine.service import Service
from rstguard.engine.verdict import Action, Verdict
from rstguard.engine.wire import ACK, KNOWN, SYN
from tests.support.packets import SERVER, packet, rule, ruleset

ONE, TWO = (Service(parse_address(SERVER), port) for port in (80, 443))
Look = tuple[int, set[Service], set[Service], set[Service]]
"""At a second: whose clients go on unanswered, who answers, and who is then told."""


@pytest.mark.parametrize(
    "looks",
    [
        [(0, {ONE}, set(), set()), (10, {ONE}, set(), set()), (12, {ONE}, set(), {ONE})],
        [(0, {ONE}, set(), set()), (12, set(), set(), set()), (14, {ONE}, set(), set())],
        [(0, {ONE}, {ONE}, set()), (12, {ONE}, {ONE}, set()), (24, {ONE}, set(), set())],
        [(0, {ONE}, set(), set()), (12, {ONE}, set(), {ONE}), (14, {ONE}, {ONE}, set())],
        [(0, {ONE}, set(), set()), (12, {ONE}, set(), {ONE}), (300, set(), set(), {ONE}),
         (612, set(), set(), set())],
        [(0, {ONE, TWO}, set(), set()), (12, {ONE, TWO}, {TWO}, {ONE})],
    ],
    ids=["goes on", "one scan", "answers", "ends with the first answer", "nobody asks", "beside"],
)  # fmt: skip
def test_it_is_told_while_clients_go_on_and_nothing_answers(looks: list[Look]) -> None:
    told = Told()
    for at, oneway, answers, wanted in looks:
        told.look(oneway, answers, at * SECOND)
        assert set(told.services) == wanted, at


def test_what_is_told_is_bounded() -> None:
    many = {Service(parse_address(SERVER), port) for port in range(1, 3000)}
    told = Told()
    for at in (0, 12):
        told.look(many, set(), at * SECOND)
    assert len(told.services) == MOST


def half_opens(engine: Engine, service: Service, count: int, now: int = 0) -> list[Verdict]:
    """Return what becomes of SYNs that no ACK follows."""
    return [
        engine.decide(packet(SYN, source_port=port, port=service.port), now).verdict
        for port in range(20000, 20000 + count)
    ]


def test_half_open_counts_what_is_two_sided_alone() -> None:
    asked: list[Service] = []
    oneway = {ONE}

    def ask(address: int, port: int) -> bool:
        asked.append(Service(address, port))
        return Service(address, port) in oneway

    limited = rule(Measure.HALF_OPEN, Action.DROP, 5, within=30 * SECOND)
    engine = Engine(ruleset(limited), one_sided=OneSided(ask))
    assert set(half_opens(engine, ONE, 100)) == {Verdict.ACCEPT}
    assert asked == [ONE]
    # What was opened there does not count against it elsewhere, and elsewhere the limit holds.
    assert half_opens(engine, TWO, 8) == 5 * [Verdict.ACCEPT] + 3 * [Verdict.DROP]
    oneway.clear()  # it has answered
    later = ASK_EVERY + 31 * SECOND
    assert half_opens(engine, ONE, 8, later) == 5 * [Verdict.ACCEPT] + 3 * [Verdict.DROP]


def test_a_usual_handshake_asks_nobody() -> None:
    def ask(_address: int, _port: int) -> bool:
        raise AssertionError

    engine = Engine(ruleset(rule(Measure.HALF_OPEN, Action.DROP, 5)), one_sided=OneSided(ask))
    for port in range(20000, 20100):
        engine.decide(packet(SYN, source_port=port), 0)
        engine.decide(packet(ACK, state=KNOWN, source_port=port), 0)
