"""The way of each case from target to result, against a small kernel that holds state."""

from __future__ import annotations

import errno

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.verdict import Ends, Reason
from rstguard.engine.wire import ACK, SYN
from rstguard.sweeper.cases import MILLISECOND, PROBE_AT, STRICT_AFTER
from rstguard.sweeper.condemner import (
    AGAIN_AFTER,
    AGAIN_ROUNDS,
    DEADLINE,
    Condemner,
    Outcome,
    Result,
    Target,
    select,
)
from tests.support.table import MARKS, Table, a_flow, client_of, server_of

CONDEMNED = MARKS.condemned.value
SOURCE_RESET = MARKS.condemned_source.value | MARKS.rst_sent_source.value
DESTINATION_RESET = MARKS.condemned_destination.value | MARKS.rst_sent_destination.value


def a_target(flow: Flow, ends: Ends = Ends.BOTH) -> Target:
    return Target(flow, ends, "idle", Reason.IDLE)


def finish(condemner: Condemner) -> list[Result]:
    """Step as often and at such times as the condemner asks for."""
    results: list[Result] = []
    for _ in range(500):
        if condemner.next_step_at is None:
            return results
        results += condemner.step(condemner.next_step_at).results
    raise AssertionError("it never ends")


def kill(kernel: Table, *targets: Target) -> list[Result]:
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start(targets, 1000)
    return finish(condemner)


def test_an_idle_connection_dies_at_both_ends_by_one_probe_each() -> None:
    flow = a_flow()
    kernel = Table(flow)
    (result,) = kill(kernel, a_target(flow))
    assert result.outcome is Outcome.RESET
    assert result.confirmed
    assert result.took <= 2 * MILLISECOND
    assert result.text == "192.0.2.1:1 > 198.51.100.1:80: client and server were reset."
    assert len(kernel.probes) == 2 + 2 * AGAIN_ROUNDS


def test_both_ends_are_probed_some_more_in_case_a_rst_was_lost() -> None:
    flow = a_flow()
    kernel = Table(flow)
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    progress = condemner.step(MILLISECOND)
    assert (len(progress.results), progress.pending) == (1, 0)
    assert progress.next_step_at == MILLISECOND + AGAIN_AFTER
    assert len(kernel.probes) == 2
    assert condemner.step(progress.next_step_at - 1) == ((), 0, progress.next_step_at)
    assert finish(condemner) == []
    ends = [(probe.destination, probe.destination_port) for probe in kernel.probes]
    assert ends == [client_of(flow), server_of(flow)] * (1 + AGAIN_ROUNDS)


@pytest.mark.parametrize(("ends", "kept"), [(Ends.BOTH, 0), (Ends.SOURCE, 1)])
def test_only_what_is_dead_at_both_ends_leaves_the_table(ends: Ends, kept: int) -> None:
    flow = a_flow()
    kernel = Table(flow)
    kill(kernel, a_target(flow)._replace(ends=ends))
    assert len(kernel.flows) == kept


def test_a_target_whose_name_belongs_to_a_newer_one_is_not_forgotten() -> None:
    flow = a_flow()
    newer = flow._replace(ident=99)
    kernel = Table(newer)
    results = kill(kernel, a_target(flow), a_target(newer))
    assert [(r.target.flow.ident, r.outcome) for r in results] == [
        (1, Outcome.OVER),
        (99, Outcome.RESET),
    ]


def test_probes_carry_fresh_numbers_each_time() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 3}
    kill(kernel, a_target(flow))
    numbers = [probe.sequence for probe in kernel.probes]
    assert len(set(numbers)) == len(numbers) == 5 + 2 * AGAIN_ROUNDS


@pytest.mark.parametrize("swallowed", range(1, len(PROBE_AT)))
def test_an_end_that_swallows_probes_is_probed_again(swallowed: int) -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {server_of(flow): swallowed}
    (result,) = kill(kernel, a_target(flow))
    assert result.outcome is Outcome.RESET
    assert PROBE_AT[swallowed] <= result.took < PROBE_AT[swallowed] + 200 * MILLISECOND


def test_an_end_behind_a_strict_firewall_is_sent_what_passes_it() -> None:
    for end, flags in ((client_of, SYN | ACK), (server_of, SYN)):
        flow = a_flow()
        kernel = Table(flow)
        kernel.strict = {end(flow)}
        (result,) = kill(kernel, a_target(flow))
        assert result.outcome is Outcome.RESET
        assert result.took < PROBE_AT[STRICT_AFTER] + 100 * MILLISECOND
        sent = [p for p in kernel.openings if (p.destination, p.destination_port) == end(flow)]
        assert {packet.flags for packet in sent} == {flags}


@pytest.mark.parametrize(
    ("deaf", "silent", "text"),
    [
        (client_of, Ends.SOURCE, "the client stayed silent to 11 probes; the server was reset"),
        (
            server_of,
            Ends.DESTINATION,
            "the server stayed silent to 11 probes; the client was reset",
        ),
        (None, Ends.BOTH, "client and server stayed silent to 11 probes"),
    ],
)
def test_an_end_that_never_answers_is_named(deaf: object, silent: Ends, text: str) -> None:
    flow = a_flow()
    kernel = Table(flow)
    ends = [deaf(flow)] if callable(deaf) else [client_of(flow), server_of(flow)]
    kernel.deaf = dict.fromkeys(ends, 1000)
    (result,) = kill(kernel, a_target(flow))
    assert (result.outcome, result.silent, result.confirmed) == (Outcome.SILENT, silent, False)
    assert DEADLINE <= result.took < DEADLINE + 100 * MILLISECOND
    assert text in result.text


@pytest.mark.parametrize(
    ("ends", "probed", "bits"),
    [
        (Ends.SOURCE, client_of, SOURCE_RESET),
        (Ends.DESTINATION, server_of, DESTINATION_RESET),
    ],
)
def test_only_the_named_end_is_told(ends: Ends, probed: object, bits: int) -> None:
    flow = a_flow(mark=5)
    kernel = Table(flow)
    (result,) = kill(kernel, a_target(flow, ends))
    assert result.outcome is Outcome.RESET
    assert kernel.flows[(flow.original, 0)].mark == bits | 5
    packet = kernel.probes[0]
    assert len(kernel.probes) == 1 + AGAIN_ROUNDS
    assert callable(probed)
    assert (packet.destination, packet.destination_port) == probed(flow)


def test_with_nat_each_end_is_addressed_by_the_tuple_it_sees() -> None:
    reply = Tuple(parse_address("10.0.0.2"), parse_address("10.0.0.1"), 8080, 61000)
    flow = a_flow()._replace(reply=reply)
    kernel = Table(flow)
    (result,) = kill(kernel, a_target(flow))
    assert result.outcome is Outcome.RESET
    assert [probe[:4] for probe in kernel.probes[:2]] == [flow.original.turned, reply.turned]


def test_a_connection_that_is_gone_before_is_over() -> None:
    (result,) = kill(Table(), a_target(a_flow()))
    assert (result.outcome, result.confirmed) == (Outcome.OVER, True)


@pytest.mark.parametrize("state", [TcpState.CLOSE, TcpState.TIME_WAIT])
def test_a_connection_that_ended_by_itself_is_not_touched(state: TcpState) -> None:
    flow = a_flow(state=state)
    kernel = Table(flow)
    (result,) = kill(kernel, a_target(a_flow()))
    assert result.outcome is Outcome.OVER
    assert kernel.probes == []
    assert kernel.flows[(flow.original, 0)].mark == 0


def test_a_newer_connection_of_the_same_name_is_not_touched() -> None:
    newer = a_flow()._replace(ident=99)
    kernel = Table(newer)
    (result,) = kill(kernel, a_target(a_flow()))
    assert result.outcome is Outcome.OVER
    assert list(kernel.flows.values()) == [newer]


def test_a_newer_connection_that_caught_the_mark_loses_it_again() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1000, server_of(flow): 1000}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.change(flow, ident=99)
    (result,) = condemner.step(MILLISECOND).results
    assert result.outcome is Outcome.LOST
    assert kernel.flows[(flow.original, 0)].mark == 0


def test_an_end_that_closes_meanwhile_ends_the_case_at_the_second_look() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1000, server_of(flow): 1000}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.change(flow, state=TcpState.CLOSE)
    assert condemner.step(MILLISECOND).results == ()
    (result,) = condemner.step(3 * MILLISECOND).results
    assert result.outcome is Outcome.OVER


def test_a_rst_seen_between_mark_and_state_is_no_end() -> None:
    """The kernel reports the mark before the state: CLOSE may come without its RST_SENT, once."""
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1000, server_of(flow): 1000}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.change(flow, state=TcpState.CLOSE)
    assert condemner.step(MILLISECOND).pending == 1
    kernel.change(flow, mark=CONDEMNED | MARKS.rst_sent_source.value)
    assert condemner.step(3 * MILLISECOND).pending == 1
    kernel.change(flow, mark=CONDEMNED | MARKS.rst_sent.value)
    (result,) = condemner.step(7 * MILLISECOND).results
    assert result.outcome is Outcome.RESET


def test_a_flushed_table_proves_nothing() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1000}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.flows.clear()
    (result,) = condemner.step(MILLISECOND).results
    assert (result.outcome, result.confirmed) == (Outcome.LOST, False)


def test_a_mark_that_other_software_took_away_is_set_again() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1, server_of(flow): 1}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.change(flow, mark=0)
    (result,) = finish(condemner)
    assert result.outcome is Outcome.RESET


def test_if_the_proof_was_taken_away_too_nothing_is_claimed() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    condemner.step(0)
    kernel.change(flow, mark=0)  # the server had been told, and is now dead and deaf
    kernel.deaf = {client_of(flow): 1000, server_of(flow): 1000}
    (result,) = finish(condemner)
    assert (result.outcome, result.silent) == (Outcome.SILENT, Ends.BOTH)


def test_a_connection_condemned_earlier_is_confirmed_by_what_it_was_told_then() -> None:
    flow = a_flow(mark=CONDEMNED | MARKS.rst_sent.value, state=TcpState.CLOSE)
    kernel = Table(flow)
    (result,) = kill(kernel, a_target(flow))
    assert result.outcome is Outcome.RESET
    assert len(kernel.probes) == 2 * AGAIN_ROUNDS


def test_a_kernel_that_refuses_is_reported() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.refuses = errno.EPERM
    (result,) = kill(kernel, a_target(flow))
    assert (result.outcome, result.confirmed) == (Outcome.REFUSED, False)
    assert "EPERM" in result.text


def test_duplicates_are_merged_and_ends_added() -> None:
    flow = a_flow()
    kernel = Table(flow)
    targets = [a_target(flow, Ends.SOURCE), a_target(flow, Ends.SOURCE), a_target(flow)]
    (result,) = kill(kernel, *targets)
    assert result.target.ends is Ends.BOTH
    assert result.outcome is Outcome.RESET
    assert len(kernel.probes) == 2 + 2 * AGAIN_ROUNDS


def test_an_end_added_later_is_condemned_and_told_too() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow, Ends.SOURCE)], 0)
    condemner.step(0)
    condemner.start([a_target(flow, Ends.DESTINATION)], MILLISECOND)
    (result,) = finish(condemner)
    assert (result.outcome, result.target.ends) == (Outcome.RESET, Ends.BOTH)
    assert result.took < 10 * MILLISECOND


def test_what_is_beyond_the_bound_is_refused_and_said() -> None:
    flows = [a_flow(number) for number in range(1, 6)]
    kernel = Table(*flows)
    condemner = Condemner(kernel, kernel, MARKS, most=3)
    condemner.start(map(a_target, flows), 0)
    assert condemner.pending == 3
    outcomes = [result.outcome for result in finish(condemner)]
    assert sorted(outcome.name for outcome in outcomes) == ["REFUSED"] * 2 + ["RESET"] * 3


def test_two_thousand_take_two_questions() -> None:
    flows = [a_flow(number) for number in range(1, 2001)]
    kernel = Table(*flows)
    condemner = Condemner(kernel, kernel, MARKS)
    kernel.hear = lambda packet: None  # type: ignore[method-assign]
    condemner.start(map(a_target, flows), 0)
    condemner.step(0)
    assert len(kernel.probes) == 4000
    for flow in flows:
        kernel.change(flow, mark=CONDEMNED | MARKS.rst_sent.value)
    progress = condemner.step(MILLISECOND)
    assert (len(progress.results), progress.pending) == (2000, 0)
    assert kernel.reads == 2


def test_a_step_takes_in_a_bounded_number_and_none_is_forgotten() -> None:
    flows = [a_flow(number) for number in range(1, 10_001)]
    kernel = Table(*flows)
    kernel.hear = lambda packet: None  # type: ignore[method-assign]
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start(map(a_target, flows), 0)
    counts = []
    for _ in range(4):
        assert condemner.next_step_at is not None
        condemner.step(condemner.next_step_at)
        counts.append(sum(1 for flow in kernel.flows.values() if flow.mark))
    assert counts == [4096, 8192, 10_000, 10_000]


def test_nothing_to_do_asks_for_no_step() -> None:
    kernel = Table()
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([], 0)
    assert condemner.next_step_at is None


def test_looks_grow_rarer_but_never_cease() -> None:
    flow = a_flow()
    kernel = Table(flow)
    kernel.deaf = {client_of(flow): 1000, server_of(flow): 1000}
    condemner = Condemner(kernel, kernel, MARKS)
    condemner.start([a_target(flow)], 0)
    gaps, before = [], 0
    while condemner.next_step_at is not None:
        gaps.append(condemner.next_step_at - before)
        before = condemner.next_step_at
        condemner.step(before)
    assert gaps[:4] == [0, MILLISECOND, 2 * MILLISECOND, 4 * MILLISECOND]
    assert max(gaps) == 50 * MILLISECOND
    assert len(gaps) < 120


SELECTIONS = [
    ("everything", {}, [1, 2, 3]),
    ("a source", {"source": "192.0.2.0/24"}, [1, 2]),
    ("a source of the other family", {"source": "2001:db8::/32"}, []),
    ("a source port", {"source_port": 2}, [2]),
    ("a destination", {"destination": "198.51.100.1"}, [1, 2]),
    ("the inside server behind DNAT", {"destination": "10.0.0.2"}, [2, 3]),
    ("its port", {"port": 8080}, [2, 3]),
    ("the outside port", {"port": 80}, [1, 2]),
    ("not the port of one with the address of the other",
     {"destination": "10.0.0.2", "port": 80}, []),
    ("all together",
     {"source": "192.0.2.1", "source_port": 2, "destination": "198.51.100.1", "port": 80}, [2]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "asked", "wanted"), SELECTIONS, ids=[s[0] for s in SELECTIONS])
def test_select(text: str, asked: dict[str, str | int], wanted: list[int]) -> None:
    inside = Tuple(parse_address("10.0.0.2"), parse_address("192.0.2.1"), 8080, 2)
    other = Tuple(parse_address("10.9.9.9"), parse_address("10.0.0.2"), 3, 8080)
    flows = [
        a_flow(1),
        a_flow(2)._replace(reply=inside),
        a_flow(3)._replace(original=other, reply=other.turned),
        a_flow(4, state=TcpState.TIME_WAIT),
    ]
    prefix = {k: parse_prefix(str(v)) for k, v in asked.items() if k in ("source", "destination")}
    number = {k: int(v) for k, v in asked.items() if k in ("source_port", "port")}
    chosen = select(
        flows,
        prefix.get("source"),
        number.get("source_port"),
        prefix.get("destination"),
        number.get("port"),
    )
    assert [flow.ident for flow in chosen] == wanted, text
