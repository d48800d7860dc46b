"""RSTs that wait: what each answer decides, how often is asked, and who has to make room."""

from __future__ import annotations

import itertools

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.case import AGAIN
from rstguard.engine.evidence import Asked, Evidence, first_block
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.holding import (
    LAST,
    MOST_OF_ONE,
    PATIENCE,
    Decided,
    Holding,
    Outcome,
)
from rstguard.engine.questions import Probe
from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN, Packet

CLIENT, SERVER = parse_address("198.51.100.7"), parse_address("203.0.113.10")
ORIGINAL = Tuple(CLIENT, SERVER, 40000, 443)
REPLY = Tuple(SERVER, CLIENT, 443, 40000)
NUMBER = 1_000_000
START = 50 * SECOND
HALF = 1 << 31


def flow(client: int = CLIENT, port: int = 40000) -> Flow:
    original = Tuple(client, SERVER, port, 443)
    reply = Tuple(SERVER, client, 443, port)
    return Flow(1, original, reply, 8, 0, True, 3, 300, 3, 300, SECOND, 10, 0)


def segment(
    sends: Tuple, flags: int, sequence: int = NUMBER, acknowledgement: int = 5, payload: int = 0
) -> Packet:
    return Packet(*sends, sequence, acknowledgement, flags, 512, payload)


def reset(one: Flow, by_client: bool = True) -> Packet:
    return segment(one.original if by_client else one.reply, RST)


def holding(places: int = 8) -> Holding:
    numbers = itertools.count(7_000_000, 1_000_003)
    return Holding(lambda: next(numbers) & 0xFFFFFFFF, places)


RECEIVED = 77_000


def held(by_client: bool = True, *, tells: bool = False) -> tuple[Holding, list[Probe]]:
    """Return the table with one RST in it, and what was asked for it: its sender, the other end.

    `tells`: it tells what its sender has received.
    """
    table, one = holding(), flow()
    first = reset(one, by_client)
    if tells:
        first = first._replace(flags=RST | ACK, acknowledgement=RECEIVED)
    table.hold(1, first, 60, False, one, START)
    return table, table.take_probes()


def says(table: Holding, sends: Tuple, to: Probe, now: int = START, sequence: int = NUMBER) -> bool:
    """Have an end report a probe as a duplicate; `sequence` is what it goes on with."""
    expects = NUMBER if sequence != NUMBER else RECEIVED
    answer = segment(sends, ACK, sequence, expects)
    return table.heard(answer, (to.sequence, to.sequence + 1 & 0xFFFFFFFF), 61, now)


def dies(table: Holding, sends: Tuple, to: Probe, now: int = START) -> bool:
    """Have an end, or what stands before it, answer a probe by a RST."""
    assert to.acknowledgement is not None
    return table.heard(segment(sends, RST, to.acknowledgement), None, 60, now)


def outcome(table: Holding) -> Decided | None:
    assert len(table.decided) <= 1
    return table.decided[0] if table.decided else None


ASKED = Asked([500, 500 ^ 1 << 31], [900])


@pytest.mark.parametrize(
    ("flags", "sequence", "block", "payload", "evidence"),
    [
        (ACK, NUMBER, (500, 501), 0, Evidence.ALIVE),
        (ACK | PSH, NUMBER, (500 ^ 1 << 31, (500 ^ 1 << 31) + 1), 9, Evidence.ALIVE),
        (ACK, NUMBER, (501, 502), 0, Evidence.NOTHING),
        (ACK, NUMBER, (500, 502), 0, Evidence.NOTHING),
        (ACK, NUMBER, None, 0, Evidence.BARE),
        (ACK, NUMBER, None, 1, Evidence.NOTHING),
        (ACK, NUMBER + 1, None, 0, Evidence.NOTHING),
        (RST, 900, None, 0, Evidence.DEAD),
        (RST | ACK, 900, None, 0, Evidence.DEAD),
        (RST, NUMBER, None, 0, Evidence.NOTHING),
        (FIN | ACK, NUMBER, None, 0, Evidence.NOTHING),
        (SYN | ACK, NUMBER, (500, 501), 0, Evidence.NOTHING),
    ],
)
def test_what_a_segment_tells(
    flags: int, sequence: int, block: tuple[int, int] | None, payload: int, evidence: Evidence
) -> None:
    packet = segment(ORIGINAL, flags, sequence, payload=payload)
    assert ASKED.weigh(packet, block, NUMBER) is evidence


def test_a_bare_ack_counts_where_no_number_is_known() -> None:
    assert ASKED.weigh(segment(ORIGINAL, ACK), None, None) is Evidence.BARE
    assert ASKED.weigh(segment(ORIGINAL, ACK, payload=1), None, None) is Evidence.NOTHING


def test_who_was_not_asked_tells_nothing() -> None:
    assert Asked().weigh(segment(ORIGINAL, ACK), None, NUMBER) is Evidence.NOTHING
    assert Asked().weigh(segment(ORIGINAL, RST, 900), None, NUMBER) is Evidence.NOTHING


def test_the_first_block_of_the_options() -> None:
    assert first_block({5: bytes.fromhex("000001f4000001f50000000000000001")}) == (500, 501)
    assert first_block({5: b"short"}) is None
    assert first_block({}) is None


def ahead(number: int | None, of: int) -> int:
    """Return how far a number is ahead of another; negative if it is behind."""
    assert number is not None
    return (number - of + HALF) % (2 * HALF) - HALF


def within(asked: Probe) -> bool:
    """Tell whether a probe passes a firewall of the client, and is old for it."""
    behind, acked = ahead(asked.sequence, RECEIVED), ahead(asked.acknowledgement, NUMBER)
    return -14_000 < behind <= -2_000 and -60_000 < acked < 0


@pytest.mark.parametrize("by_client", [True, False])
def test_both_ends_are_asked(by_client: bool) -> None:
    _, (sender, other) = held(by_client)
    assert sender.path == (REPLY if by_client else ORIGINAL)
    assert other.path == (ORIGINAL if by_client else REPLY)
    assert ahead(sender.acknowledgement, NUMBER) > 1 << 23  # more than it has sent
    assert ahead(other.sequence, NUMBER) < -(1 << 23)
    assert not sender.opens
    assert not other.opens


def test_a_reset_that_tells_all_numbers_has_its_sender_asked_twice_within_its_window() -> None:
    _, (first, second, other) = held(tells=True)
    assert within(first)
    assert within(second)
    assert first.acknowledgement != second.acknowledgement
    assert (first.path, second.path, other.path) == (REPLY, REPLY, ORIGINAL)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("by_client", [True, False])
def test_a_sender_that_knows_the_probe_and_lives_makes_it_forged(
    by_client: bool, tells: bool
) -> None:
    table, (probe, *_) = held(by_client, tells=tells)
    assert not says(table, ORIGINAL if by_client else REPLY, probe, START + SECOND // 50)
    one = outcome(table)
    assert one is not None
    assert (one.outcome, one.by_client, one.numbers) == (Outcome.FORGED, by_client, (1,))
    assert (one.hops, one.true_hops, one.waited) == (60, 61, SECOND // 50)
    assert not one.passes


def test_a_sender_for_which_the_first_was_not_old_is_asked_by_its_own_numbers() -> None:
    table, _ = held()
    answer = segment(ORIGINAL, ACK, NUMBER, RECEIVED)
    assert table.heard(answer, None, 60, START)
    (anew,) = table.take_probes()
    assert anew.path == REPLY
    assert -14_000 < ahead(anew.sequence, RECEIVED) <= -2_000
    assert ahead(anew.acknowledgement, NUMBER) > 1 << 23
    assert not says(table, ORIGINAL, anew)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.FORGED


def test_a_bare_ack_of_one_that_was_asked_by_old_numbers_draws_no_question() -> None:
    table, _ = held(tells=True)
    table.heard(segment(ORIGINAL, ACK, NUMBER, RECEIVED), None, 60, START)
    assert not table.take_probes()


@pytest.mark.parametrize("order", ["told", "died"])
def test_a_sender_is_dead_that_says_so_twice_to_true_numbers(order: str) -> None:
    table, (first, second, other) = held(tells=True)
    if order == "told":
        says(table, REPLY, other, sequence=RECEIVED)
    assert not dies(table, ORIGINAL, first)
    assert outcome(table) is None
    assert not dies(table, ORIGINAL, second)
    if order == "died":
        assert outcome(table) is None
        says(table, REPLY, other, sequence=RECEIVED)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.HONEST
    assert one.passes
    assert not table.take_probes()


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("alive", [True, False])
def test_one_that_may_be_dead_is_asked_by_what_the_other_end_tells(
    tells: bool, alive: bool
) -> None:
    """A translator answers what does not fit, as if its client were dead."""
    table, (*senders, other) = held(tells=tells)
    for probe in senders:
        dies(table, ORIGINAL, probe)
    says(table, REPLY, other, sequence=RECEIVED + 50_000)
    assert outcome(table) is None
    (exact,) = table.take_probes()
    assert exact.path == REPLY
    assert -14_000 < ahead(exact.sequence, RECEIVED + 50_000) <= -2_000
    assert -60_000 < ahead(exact.acknowledgement, NUMBER) < 0
    (says if alive else dies)(table, ORIGINAL, exact)
    one = outcome(table)
    assert one is not None
    assert one.outcome is (Outcome.FORGED if alive else Outcome.HONEST)


def test_a_second_reset_of_the_same_number_decides_nothing() -> None:
    table, _ = held()
    assert table.heard(reset(flow()), None, 60, START)
    assert table.join(2, reset(flow())) is True
    assert outcome(table) is None


def test_more_resets_of_one_connection_than_are_kept_are_dropped() -> None:
    table, _ = held()
    joined = [table.join(number, reset(flow())) for number in range(2, MOST_OF_ONE + 2)]
    assert joined == [True] * (MOST_OF_ONE - 1) + [False]
    assert table.join(99, reset(flow(port=1))) is None


def test_an_answer_that_comes_after_the_decision_goes_no_further() -> None:
    table, (probe, _) = held()
    assert not says(table, ORIGINAL, probe)
    assert not dies(table, ORIGINAL, probe, START + SECOND)
    table.work(START + 3 * SECOND)
    assert dies(table, ORIGINAL, probe, START + 3 * SECOND)


def test_a_silent_sender_is_asked_by_what_the_other_end_tells() -> None:
    table, (_, other) = held()
    assert not says(table, REPLY, other, sequence=RECEIVED)
    assert not table.take_probes()
    table.work(START + AGAIN)
    (exact,) = table.take_probes()
    assert within(exact)
    assert not says(table, ORIGINAL, exact)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.FORGED


@pytest.mark.parametrize("by_client", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_an_end_behind_a_strict_firewall_is_asked_by_what_passes_it(
    by_client: bool, dead: bool
) -> None:
    """It keeps silent, or the firewall answers in its place."""
    table, (_, question) = held(by_client)
    other, now = REPLY if by_client else ORIGINAL, START + AGAIN
    if dead:
        assert not dies(table, other, question)
    table.work(now)
    (opening,) = table.take_probes()
    assert opening.opens
    assert opening.path == (ORIGINAL if by_client else REPLY)
    # Towards the client, which has opened the connection, only a SYN+ACK passes.
    assert (opening.acknowledgement is None) == by_client
    assert table.heard(segment(other, ACK, RECEIVED, NUMBER - 1), None, 60, now)
    assert not table.take_probes()
    answer = segment(other, ACK, RECEIVED, NUMBER)
    assert not table.heard(answer, None, 60, now)
    assert len(table.take_probes()) == 1
    # Two more may be answers, what comes then is not.
    passed = [table.heard(answer, None, 60, now) for _ in range(3)]
    assert passed == [False, False, True]


def test_an_other_end_without_dsack_is_opened_as_soon_as_the_sender_may_be_dead() -> None:
    table, (probe, _) = held()
    answer = segment(REPLY, ACK, RECEIVED, NUMBER)
    table.heard(answer, None, 60, START)
    assert not table.take_probes()
    dies(table, ORIGINAL, probe)
    table.work(START)
    (opening,) = table.take_probes()
    assert opening.opens
    table.heard(answer, None, 60, START)
    (exact,) = table.take_probes()
    assert within(exact)


def test_resets_in_both_names_learn_from_the_same_answers() -> None:
    table, _ = held(tells=True)
    one = flow()
    back = segment(one.reply, RST | ACK, RECEIVED, NUMBER)
    table.hold(2, back, 60, False, one, START)
    *_, other = table.take_probes()
    assert other.path == REPLY
    table.work(START + AGAIN)
    table.take_probes()
    # The client's answer to what it was asked as the other end ends no case, and tells numbers.
    says(table, ORIGINAL, other)
    assert outcome(table) is None
    assert len(table) == 2


@pytest.mark.parametrize("bare", [None, 0, 5, 21])
@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("told", [None, RECEIVED, RECEIVED + 9])
@pytest.mark.parametrize("dead", [True, False])
def test_no_end_is_asked_more_than_three_times(
    bare: int | None, tells: bool, told: int | None, dead: bool
) -> None:
    """Whatever is said, before or after any question."""
    table, probes = held(tells=tells)
    for step in range(30):
        now = START + step * AGAIN // 2
        if step == bare:
            table.heard(segment(ORIGINAL, ACK), None, 60, now)
        if step == 1 and dead:
            dies(table, ORIGINAL, probes[0], now)
        table.work(now)
        if told is not None and len(table):
            table.heard(segment(REPLY, ACK, told, NUMBER), None, 60, now)
        probes += table.take_probes()
    ends = [probe.path for probe in probes]
    assert ends.count(REPLY) <= 3
    assert ends.count(ORIGINAL) <= 3
    assert len(table.decided) == 1


@pytest.mark.parametrize("how", ["by nothing", "by the RST", "by the other end", "orphan"])
@pytest.mark.parametrize("bare", [True, False])
def test_a_sender_that_answers_once_a_second_is_asked_again_after_that(
    how: str, bare: bool
) -> None:
    """A forger can use up its one answer, but not both."""
    table, (first, *_, other) = held(tells=how == "by the RST")
    if how == "orphan":
        table = holding()
        table.orphan(flow(), START)
        first = table.take_probes()[0]
    if how == "by the other end":
        says(table, REPLY, other, sequence=RECEIVED)
    for step in range(1, 11):
        table.work(START + step * AGAIN)
    table.take_probes()
    table.work(START + LAST)
    (last,) = table.take_probes()
    assert last.path == REPLY
    if how == "by the other end":
        assert -14_000 < ahead(last.sequence, RECEIVED) <= -2_000
        assert last.acknowledgement == NUMBER
    elif how == "by the RST":
        assert -14_000 < ahead(last.sequence, RECEIVED) <= -2_000
        assert ahead(last.acknowledgement, NUMBER) > 1 << 23
    else:
        assert first.acknowledgement is not None
        assert last.sequence == first.sequence ^ HALF  # one of the two is old
        assert last.acknowledgement == first.acknowledgement ^ HALF
    if bare:
        table.heard(segment(ORIGINAL, ACK), None, 60, START + LAST + SECOND // 50)
    table.work(START + PATIENCE)
    one = outcome(table)
    assert one is not None
    assert one.outcome is (Outcome.FORGED if bare else Outcome.UNCONFIRMED)


@pytest.mark.parametrize("tells", [True, False])
def test_where_neither_end_knows_the_connection_nothing_is_left_to_protect(tells: bool) -> None:
    table, (*senders, other) = held(tells=tells)
    assert not dies(table, REPLY, other)
    for probe in senders:
        assert outcome(table) is None
        dies(table, ORIGINAL, probe)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.HONEST


@pytest.mark.parametrize("bare", [True, False])
def test_bare_acks_of_the_sender_count_at_the_end_only(bare: bool) -> None:
    table, _ = held()
    if bare:
        assert table.heard(segment(ORIGINAL, ACK), None, 59, START)
    table.work(START + PATIENCE - 1)
    assert outcome(table) is None
    table.work(START + PATIENCE)
    one = outcome(table)
    assert one is not None
    assert one.outcome is (Outcome.FORGED if bare else Outcome.UNCONFIRMED)


def test_a_slow_way_is_given_more_time() -> None:
    table, (_, other) = held()
    slow = START + 6 * AGAIN
    says(table, REPLY, other, slow, RECEIVED)
    table.work(START + PATIENCE)
    assert outcome(table) is None
    table.work(START + 18 * AGAIN)
    assert outcome(table) is not None


def test_the_oldest_of_the_network_with_most_makes_room() -> None:
    table = holding(places=4)
    crowd = [flow(parse_address(f"192.0.2.{last}"), last) for last in (1, 2, 3)]
    alone = flow()
    for number, one in enumerate([alone, *crowd], 1):
        table.hold(number, reset(one), 60, False, one, START + number)
    newcomer = flow(parse_address("198.51.99.1"))
    table.hold(9, reset(newcomer), 60, False, newcomer, START + 9)
    made = outcome(table)
    assert made is not None
    assert (made.outcome, made.flow) == (Outcome.CROWDED, crowd[0])
    assert made.passes
    assert len(table) == 4


def test_an_orphan_is_asked_for_and_takes_no_place_of_another() -> None:
    table = holding(places=1)
    assert table.orphan(flow(), START)
    assert table.orphan(flow(), START)
    assert not table.orphan(flow(port=2), START)
    probe = table.take_probes()[0]
    table.heard(segment(ORIGINAL, ACK), (probe.sequence, probe.sequence + 1), 60, START)
    one = outcome(table)
    assert one is not None
    assert (one.outcome, one.numbers, one.hops) == (Outcome.FORGED, (), -1)


def test_a_bare_ack_says_that_an_orphan_lives_even_if_a_reset_joins_it_later() -> None:
    table = holding()
    assert table.orphan(flow(), START)
    assert table.heard(segment(ORIGINAL, ACK), None, 60, START)
    assert table.join(5, reset(flow()))
    table.work(START + PATIENCE)
    one = outcome(table)
    assert one is not None
    assert (one.outcome, one.numbers) == (Outcome.FORGED, (5,))


@pytest.mark.parametrize("by_client", [True, False])
def test_a_connection_waits_until_all_of_it_is_decided(by_client: bool) -> None:
    table, (probe, _) = held(by_client)
    one = flow()
    assert table.waits_for(one)
    table.hold(2, reset(one, not by_client), 60, False, one, START)
    sender = ORIGINAL if by_client else REPLY
    block = probe.sequence, probe.sequence + 1
    table.heard(segment(sender, ACK), block, 61, START)
    assert table.waits_for(one)
    table.release_all(START)
    assert not table.waits_for(one)


def test_all_are_released_when_it_ends() -> None:
    table, _ = held()
    table.release_all(START)
    one = outcome(table)
    assert one is not None
    assert one.passes
    assert not len(table)


def test_a_port_that_is_used_again_ends_the_wait_of_one_that_says_it_is_dead() -> None:
    table, (probe, _) = held()
    assert table.unsure(START) == []
    table.replaced(flow(), START)
    assert outcome(table) is None
    dies(table, ORIGINAL, probe)
    assert table.unsure(START) == [flow()]
    table.replaced(flow(), START)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.HONEST
