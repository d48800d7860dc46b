"""A worker driven turn by turn: each packet gets exactly one verdict, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rstguard.engine.ruleset import SECOND, Measure, RuleSet
from rstguard.engine.verdict import Action, Decision, Ends
from rstguard.engine.wire import ACK, KNOWN, PROVEN, RST, SYN, Malformed, Packet
from rstguard.ipc.channel import Closed, SupervisorEnd, child_end, pair, supervisor_end
from rstguard.ipc.messages import (
    Blocked,
    Counts,
    Explain,
    Explained,
    FromChild,
    Kill,
    Nearest,
    NearestAre,
    NewPolicy,
    Observed,
    Ready,
    Recheck,
    Reset,
    Start,
    Stop,
    ToChild,
)
from rstguard.kernel.marks import Marks
from rstguard.worker.worker import Worker
from tests.support.packets import CLIENT, packet, rule, ruleset
from tests.worker.kernel import Kernel


class Driven:
    """A worker, its kernel, its supervisor's end, and a clock that the test moves."""

    def __init__(self, rules: RuleSet) -> None:
        self.now = SECOND
        self.kernel = Kernel()
        ours, theirs = pair()
        self.end: SupervisorEnd = supervisor_end(ours)
        self._theirs = theirs
        kernel: Any = self.kernel
        start = Start(rules, 5640)
        self.worker = Worker(child_end(theirs), start, kernel, lambda: self.now, pid=7)
        self.queue = self.kernel.made

    def turn(self) -> int | None:
        return self.worker.turn()

    def heard(self) -> list[FromChild]:
        """Return what was told since the last time, less the counts."""
        return [m for m in self.end.receive() if not isinstance(m, Counts)]

    def judge(self, decide: Callable[[Packet | Malformed, int], Decision]) -> None:
        """Let something else decide."""
        self.worker._judging.decide = decide

    def close(self) -> None:
        self.end.close()
        self._theirs.close()


Drive = Callable[[RuleSet], Driven]


@pytest.fixture
def drive() -> Iterator[Drive]:
    made: list[Driven] = []

    def driven(rules: RuleSet) -> Driven:
        made.append(Driven(rules))
        return made[-1]

    yield driven
    for one in made:
        one.close()


def policy(action: Action, enforce: bool = True, measure: Measure = Measure.SYN_RATE) -> RuleSet:
    """A policy that lets one through and objects to all that follow within a second."""
    return ruleset(rule(measure, action, limit=1, name="few"), enforce=enforce)


SYNS = [packet(source_port=port) for port in range(1, 9)]
OWN_SYN = packet(state=KNOWN | PROVEN)
"""The kernel's own SYN, for a client that has returned a SYN cookie."""
MARKS = Marks()
QUEUED_OWN = MARKS.to_queue_known.value | MARKS.to_queue_proven.value


def test_packets_that_nobody_objects_to_pass_with_one_verdict(drive: Drive) -> None:
    driven = drive(ruleset())
    numbers = driven.queue.put(*SYNS)
    driven.turn()
    assert driven.queue.verdicts == dict.fromkeys(numbers, (True, None))
    assert driven.kernel.log == ["verdicts"]


def test_each_of_a_mixed_batch_gets_its_own(drive: Drive) -> None:
    driven = drive(policy(Action.DROP))
    driven.queue.put(*SYNS[:3])
    driven.queue.put(packet(ACK, state=KNOWN, source_port=9), mark=QUEUED_OWN | 5)
    driven.turn()
    verdicts = driven.queue.verdicts
    assert [verdicts[number] for number in (1, 2, 3)] == [(True, None)] + [(False, None)] * 2
    assert verdicts[4] == (True, MARKS.trust.value | 5)  # the bits of others stay
    assert driven.queue.owed == []


@pytest.mark.parametrize("fail_open", [True, False])
def test_what_the_engine_fails_on_fares_as_the_policy_says(drive: Drive, fail_open: bool) -> None:
    driven = drive(replace(policy(Action.BAN), fail_open=fail_open))
    driven.judge(lambda packet, now: 1 // 0)  # type: ignore[arg-type,return-value]
    numbers = driven.queue.put(*SYNS)
    driven.turn()
    passes = [driven.queue.verdicts[number][0] for number in numbers]
    assert passes == [fail_open] * len(SYNS)


@pytest.mark.parametrize("fail_open", [True, False])
def test_every_packet_gets_its_verdict_when_the_supervisor_is_gone(
    drive: Drive, fail_open: bool
) -> None:
    """Noticed in the middle of a batch, when the first ban of it is to be told."""
    driven = drive(replace(policy(Action.BAN), fail_open=fail_open))
    numbers = driven.queue.put(*SYNS)
    driven.end.close()
    with pytest.raises(Closed):
        driven.turn()
    assert sorted(driven.queue.verdicts) == numbers
    assert driven.queue.owed == []
    assert [driven.queue.verdicts[n][0] for n in numbers[2:]] == [fail_open] * 6
    assert len(driven.kernel.elements) == 1


def test_a_worker_without_packets_ends_too_when_the_supervisor_is_gone(drive: Drive) -> None:
    driven = drive(ruleset())
    driven.turn()
    driven.end.close()
    with pytest.raises(Closed):
        driven.turn()


def test_the_first_ban_of_a_batch_is_in_force_before_the_rest_is_judged(drive: Drive) -> None:
    driven = drive(policy(Action.BAN))
    decide = driven.worker._engine.decide

    def logged(packet: Packet | Malformed, now: int) -> Decision:
        driven.kernel.log.append("judge")
        return decide(packet, now)

    driven.judge(logged)
    second = [packet(source="198.51.100.8", source_port=port) for port in (1, 2)]
    third = [packet(source="198.51.100.9", source_port=port) for port in (1, 2)]
    driven.queue.put(*SYNS[:2], *second, *third)
    driven.turn()
    assert driven.kernel.log == [
        *("judge", "judge", "verdicts", "ban"),
        *("judge", "judge", "judge", "judge", "verdicts", "ban"),
    ]
    told = [m.element.source for m in driven.heard() if isinstance(m, Blocked)]
    assert [str(source) for source in told] == [CLIENT, "198.51.100.8", "198.51.100.9"]
    assert [element.source for element in driven.kernel.elements] == told


def test_what_the_kernel_refuses_is_counted_and_not_told_as_done(drive: Drive) -> None:
    driven = drive(policy(Action.BAN))
    driven.kernel.refuses = "the set is full"
    numbers = driven.queue.put(*SYNS)
    driven.turn()
    assert sorted(driven.queue.verdicts) == numbers
    assert driven.heard() == []
    assert driven.worker._reporting.counts["block_failed"] == 1


@pytest.mark.parametrize(
    ("action", "enforce", "passes", "rsts", "told"),
    [
        (Action.OBSERVE, True, True, 0, [Observed]),
        (Action.DROP, True, False, 1, []),
        (Action.RESET, True, False, 1, [Reset]),
        (Action.BAN, True, False, 1, [Blocked]),
        (Action.OBSERVE, False, True, 0, [Observed]),
        (Action.DROP, False, True, 0, []),
        (Action.RESET, False, True, 0, [Reset]),
        (Action.BAN, False, True, 0, [Blocked]),
    ],
)
def test_a_client_that_returned_a_cookie_is_refused_by_a_rst(
    drive: Drive, action: Action, enforce: bool, passes: bool, rsts: int, told: list[type]
) -> None:
    """Its SYN is the kernel's own: no mark can condemn what is not there yet."""
    driven = drive(policy(action, enforce))
    driven.queue.put(OWN_SYN, OWN_SYN, mark=QUEUED_OWN)
    driven.turn()
    assert driven.queue.verdicts[1] == (True, MARKS.trust.value)  # the handshake is over
    assert driven.queue.verdicts[2][0] is passes
    assert len(driven.kernel.sent) == rsts
    assert all(sent.flags & RST for sent in driven.kernel.sent)
    assert [type(message) for message in driven.heard()] == told


def test_a_usual_syn_is_refused_by_its_mark(drive: Drive) -> None:
    driven = drive(policy(Action.RESET))
    driven.queue.put(*SYNS[:2])
    driven.turn()
    assert driven.queue.verdicts[2] == (True, MARKS.condemned_for[Ends.BOTH])
    assert driven.kernel.sent == []


def test_turns_say_how_long_to_wait(drive: Drive) -> None:
    driven = drive(policy(Action.DROP))
    driven.worker.begin()
    assert driven.turn() == SECOND // 2
    assert driven.heard() == [Ready(0, "rstguard")]
    driven.queue.put(*(packet(source_port=port) for port in range(1, 64 * 8 + 2)))
    assert driven.turn() == 0  # more is waiting
    assert driven.turn() == SECOND // 2
    driven.end.send(Nearest(1, 5))
    assert driven.turn() == 0  # there is a search to go on with
    while driven.turn() == 0:
        pass
    assert [message.number for message in driven.heard() if isinstance(message, NearestAre)] == [1]
    driven.end.send(Stop())
    assert driven.turn() is None
    driven.worker.close()
    assert driven.queue.closed


def test_counts_are_told_as_the_given_clock_goes(drive: Drive) -> None:
    driven = drive(ruleset())
    driven.queue.put(*SYNS)
    for _ in range(3):
        driven.turn()
    assert len(driven.end.receive()) == 1
    driven.now += SECOND // 2
    driven.turn()
    (counts,) = driven.end.receive()
    assert isinstance(counts, Counts)
    assert counts.totals["packets"] == len(SYNS)


def test_a_policy_is_adopted_and_answers_come(drive: Drive) -> None:
    driven = drive(policy(Action.DROP))
    driven.queue.put(*SYNS[:2])
    driven.turn()
    driven.end.send(Explain(3, packet().source))
    driven.end.send(NewPolicy(replace(ruleset(), fail_open=False), 4))
    driven.turn()
    explained, ready = driven.heard()
    assert isinstance(explained, Explained)
    assert explained.used.keys() == {"few"}
    assert ready == Ready(4, "rstguard")
    assert not driven.queue.fail_open


@pytest.mark.parametrize("message", [Kill(1), Recheck(), Start(ruleset(), 1)])
def test_what_is_not_for_a_worker_is_not_swallowed(drive: Drive, message: ToChild) -> None:
    driven = drive(ruleset())
    driven.end.send(message)
    with pytest.raises(ValueError, match="is not for a worker"):
        driven.turn()


def test_many_are_driven_in_one_thread(drive: Drive) -> None:
    """As a simulation does: nobody waits, time is the test's."""
    several = [drive(policy(Action.BAN)) for _ in range(20)]
    for step in range(10):
        for driven in several:
            driven.now += SECOND // 10
            driven.queue.put(packet(SYN, source=f"198.51.100.{step}"), packet(source_port=step + 1))
            assert driven.turn() == SECOND // 2
    for driven in several:
        assert len(driven.queue.verdicts) == 20
        assert driven.queue.owed == []
    assert len({str(driven.queue.verdicts) for driven in several}) == 1
