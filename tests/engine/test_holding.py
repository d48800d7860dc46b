"""RSTs that wait: what each answer decides, how often is asked, and who has to make room."""

from __future__ import annotations

import itertools

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.evidence import Asked, Evidence, first_block
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.holding import (
    AGAIN,
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


def held(by_client: bool = True) -> tuple[Holding, Probe]:
    """Return the table with one RST in it, and what was asked for it."""
    table, one = holding(), flow()
    table.hold(1, reset(one, by_client), 60, False, one, START)
    (asked,) = table.take_probes()
    return table, asked


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


@pytest.mark.parametrize("by_client", [True, False])
def test_the_named_sender_is_asked_by_one_byte_that_acknowledges_too_much(by_client: bool) -> None:
    _, asked = held(by_client)
    assert asked.path == (REPLY if by_client else ORIGINAL)
    assert ahead(asked.acknowledgement, NUMBER) > 1 << 23
    assert not asked.opens


def test_its_number_is_old_if_the_reset_tells_what_was_received() -> None:
    table, one = holding(), flow()
    told = segment(one.original, RST | ACK, acknowledgement=77_000)
    table.hold(1, told, 60, False, one, START)
    (asked,) = table.take_probes()
    assert -14_000 < ahead(asked.sequence, 77_000) <= -2_000


def test_a_sender_for_which_the_first_was_not_old_is_asked_by_its_own_numbers() -> None:
    table, _ = held()
    answer = segment(ORIGINAL, ACK, NUMBER, 77_000)
    assert table.heard(answer, None, 60, START)
    (anew,) = table.take_probes()
    assert anew.path == REPLY
    assert -14_000 < ahead(anew.sequence, 77_000) <= -2_000
    assert ahead(anew.acknowledgement, NUMBER) > 1 << 23
    assert not table.heard(answer, (anew.sequence, anew.sequence + 1), 60, START + 1)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.FORGED


@pytest.mark.parametrize("by_client", [True, False])
def test_a_sender_that_knows_the_probe_and_lives_makes_it_forged(by_client: bool) -> None:
    table, probe = held(by_client)
    answer = segment(ORIGINAL if by_client else REPLY, ACK)
    block = probe.sequence, probe.sequence + 1
    assert not table.heard(answer, block, 61, START + SECOND // 50)
    one = outcome(table)
    assert one is not None
    assert (one.outcome, one.by_client, one.numbers) == (Outcome.FORGED, by_client, (1,))
    assert (one.hops, one.true_hops, one.waited) == (60, 61, SECOND // 50)
    assert not one.passes


def test_a_sender_that_knows_the_probe_and_no_connection_makes_it_honest() -> None:
    table, probe = held()
    assert probe.acknowledgement is not None
    assert not table.heard(segment(ORIGINAL, RST, probe.acknowledgement), None, 60, START)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.HONEST
    assert one.passes


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
    table, probe = held()
    assert probe.acknowledgement is not None
    late = segment(ORIGINAL, RST, probe.acknowledgement)
    table.heard(late, None, 60, START)
    assert not table.heard(late, None, 60, START + SECOND)
    table.work(START + 3 * SECOND)
    assert table.heard(late, None, 60, START + 3 * SECOND)


def test_the_other_end_is_asked_next_and_then_the_sender_by_its_numbers() -> None:
    table, _ = held()
    table.work(START + AGAIN)
    first, second = table.take_probes()
    assert first.path == second.path == ORIGINAL
    answer = segment(REPLY, ACK, 77_000, NUMBER)
    assert not table.heard(answer, (first.sequence, first.sequence + 1), 60, START + AGAIN)
    (exact,) = table.take_probes()
    assert exact.path == REPLY
    assert 2_000 <= 77_000 - exact.sequence < 14_000
    assert exact.acknowledgement is not None
    assert 1 <= NUMBER - exact.acknowledgement < 60_000
    table.heard(segment(ORIGINAL, RST, exact.acknowledgement), None, 60, START + AGAIN)
    one = outcome(table)
    assert one is not None
    assert one.outcome is Outcome.HONEST


@pytest.mark.parametrize("by_client", [True, False])
def test_an_end_behind_a_strict_firewall_is_asked_by_what_passes_it(by_client: bool) -> None:
    table, _ = held(by_client)
    table.work(START + AGAIN)
    table.take_probes()
    table.work(START + 2 * AGAIN)
    (opening,) = table.take_probes()
    assert opening.opens
    assert opening.path == (ORIGINAL if by_client else REPLY)
    # Towards the client, which has opened the connection, only a SYN+ACK passes.
    assert (opening.acknowledgement is None) == by_client
    other = REPLY if by_client else ORIGINAL
    assert table.heard(segment(other, ACK, 77_000, NUMBER + 1), None, 60, START + 3 * AGAIN)
    assert not table.take_probes()
    answer = segment(other, ACK, 77_000, NUMBER)
    assert not table.heard(answer, None, 60, START + 3 * AGAIN)
    assert len(table.take_probes()) == 1
    # Two more may be answers, what comes then is not.
    passed = [table.heard(answer, None, 60, START + 3 * AGAIN) for _ in range(2)]
    assert passed == [False, True]


@pytest.mark.parametrize("bare", [None, 0, 5, 21])
def test_no_end_is_asked_more_than_three_times(bare: int | None) -> None:
    """Whether its sender keeps silent, or has said something before or after any question."""
    table, asked = held()
    probes = [asked]
    for step in range(30):
        now = START + step * AGAIN // 2
        if step == bare:
            table.heard(segment(ORIGINAL, ACK), None, 60, now)
        table.work(now)
        table.heard(segment(REPLY, ACK, 77_000, NUMBER), None, 60, now)
        probes += table.take_probes()
    ends = [probe.path for probe in probes]
    assert (ends.count(REPLY), ends.count(ORIGINAL)) == (3, 3)


@pytest.mark.parametrize("orphan", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_a_sender_that_answers_once_a_second_is_asked_again_after_that(
    orphan: bool, bare: bool
) -> None:
    """A forger can use up its one answer, but not both."""
    table, first = held()
    if orphan:
        table = holding()
        table.orphan(flow(), START)
        (first,) = table.take_probes()
    for step in range(1, 11):
        table.work(START + step * AGAIN)
    table.take_probes()
    table.work(START + LAST)
    (last,) = table.take_probes()
    assert last.path == REPLY
    assert last.sequence == first.sequence ^ HALF  # one of the two is old
    if orphan:
        assert first.acknowledgement is not None
        assert last.acknowledgement == first.acknowledgement ^ HALF
    else:
        assert ahead(last.acknowledgement, NUMBER) > 1 << 23
    if bare:
        table.heard(segment(ORIGINAL, ACK), None, 60, START + LAST + SECOND // 50)
        assert not table.take_probes()
    table.work(START + PATIENCE)
    one = outcome(table)
    assert one is not None
    assert one.outcome is (Outcome.FORGED if bare else Outcome.UNCONFIRMED)


def test_an_other_end_that_knows_no_connection_makes_it_honest() -> None:
    table, _ = held()
    table.work(START + AGAIN)
    nonce = table.take_probes()[0].acknowledgement
    assert nonce is not None
    assert not table.heard(segment(REPLY, RST, nonce), None, 60, START + AGAIN)
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
    table, _ = held()
    table.work(START + AGAIN)
    slow = START + 6 * AGAIN
    first = table.take_probes()[0].sequence
    block = first, first + 1
    table.heard(segment(REPLY, ACK, 77_000, NUMBER), block, 60, slow)
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
    (probe,) = table.take_probes()
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
    table, probe = held(by_client)
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
