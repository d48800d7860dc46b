"""The asker on the fake kernel: what comes while something else is decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from scapy.layers.inet import IP, TCP

from rstguard.asker.asker import Asker
from rstguard.engine import wire
from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import Packet
from rstguard.ipc.channel import child_end, pair
from rstguard.ipc.messages import Start
from rstguard.kernel.holding import queues_of
from rstguard.kernel.marks import Marks
from tests.support.fake_kernel.kernel import FakeKernel
from tests.support.packets import ruleset

CLIENT, SERVER = "198.51.100.7", "203.0.113.10"
NUMBER = 1_000_000
QUEUE = 5640


class Driven:
    """An asker, its kernel with one connection that a RST has closed, and a clock."""

    def __init__(self) -> None:
        self.now = SECOND
        self.kernel = FakeKernel(lambda: self.now)
        rules = replace(ruleset(), forged_resets="hold")
        self.marks, self.queues = Marks(rules.marks), queues_of(range(QUEUE, QUEUE + 1))
        self.ends = pair()
        channel, start = child_end(self.ends[1]), Start(rules, QUEUE, 1)
        self.asker = Asker(channel, start, self.kernel, lambda: self.now)
        self.path = Tuple(parse_address(CLIENT), parse_address(SERVER), 40000, 443)
        back = Tuple(self.path.destination, self.path.source, 443, 40000)
        mark = self.marks.trusted.value | self.marks.held.value
        self.kernel.connections.put(
            Flow(1, self.path, back, 8, mark, True, 3, 300, 3, 300, SECOND, TcpState.CLOSE, 0)
        )

    @property
    def held(self) -> bool:
        """Whether answers of the connection would come to the asker."""
        flow = self.kernel.connections.get(self.path)
        return flow is not None and bool(flow.mark & self.marks.held.mask)

    def asked(self) -> Packet:
        """Return the last probe of the client."""
        sent = [wire.parse(data) for data in self.kernel.packets.sent]
        probes = [one for one in sent if isinstance(one, Packet)]
        return [one for one in probes if one.destination == self.path.source][-1]

    def send(self, queue: int, flags: str, *options: tuple[str, object]) -> None:
        """Put a segment of the client into a queue."""
        segment = TCP(sport=40000, dport=443, flags=flags, seq=NUMBER, options=list(options))
        self.kernel.packets.queue(queue, bytes(IP(src=CLIENT, dst=SERVER) / segment))


@pytest.fixture
def driven() -> Iterator[Driven]:
    made = Driven()
    yield made
    for end in made.ends:
        end.close()


def test_a_reset_that_comes_as_another_is_decided_is_asked_for(driven: Driven) -> None:
    """The end of the first clears the mark by which the answers to the second come here."""
    driven.send(driven.queues.held, "R")
    driven.asker.turn()
    sequence = driven.asked().sequence
    driven.send(driven.queues.answers, "A", ("SAck", (sequence, sequence + 1)))
    driven.send(driven.queues.held, "R")
    driven.asker.turn()
    judged = [(one.queue, one.passed) for one in driven.kernel.packets.judged]
    assert judged == [(driven.queues.answers, False), (driven.queues.held, False)]
    assert driven.asked().sequence != sequence
    assert driven.held
    sequence = driven.asked().sequence
    driven.send(driven.queues.answers, "A", ("SAck", (sequence, sequence + 1)))
    driven.asker.turn()
    assert not driven.kernel.packets.queues[driven.queues.held].waiting
    assert not driven.held


def test_a_reset_whose_connection_cannot_be_looked_up_has_its_verdict(driven: Driven) -> None:
    """It would else wait in the queue for as long as the process lives; its connection is asked."""
    driven.kernel.faults.fail("table.read", times=1)
    driven.send(driven.queues.held, "R")
    driven.asker.turn()
    judged = [(one.queue, one.passed) for one in driven.kernel.packets.judged]
    assert judged == [(driven.queues.held, False)]
    assert not driven.kernel.packets.sent
    driven.now += 2 * SECOND
    driven.asker.turn()
    assert driven.asked().destination == driven.path.source


@pytest.mark.parametrize("left", [5, 432_000])
def test_a_connection_that_was_opened_again_is_not_forgotten_as_a_closed_one(
    driven: Driven, left: int
) -> None:
    """A segment that the kernel was working on meanwhile may set the time of a closed one."""
    driven.send(driven.queues.held, "R")
    driven.asker.turn()
    sequence = driven.asked().sequence
    driven.send(driven.queues.answers, "A", ("SAck", (sequence, sequence + 1)))
    driven.asker.turn()
    flow = driven.kernel.connections.get(driven.path)
    assert flow is not None
    assert flow.state == TcpState.ESTABLISHED
    lifetime = flow.timeout
    driven.kernel.connections.put(flow._replace(timeout=left))
    driven.now += SECOND
    driven.asker.turn()
    flow = driven.kernel.connections.get(driven.path)
    assert flow is not None
    assert flow.timeout == (lifetime if left == 5 else left)


def answered(driven: Driven) -> list[tuple[int, bool]]:
    """Have the client report the last probe as a duplicate; return all verdicts on what waited."""
    sequence = driven.asked().sequence
    driven.send(driven.queues.answers, "A", ("SAck", (sequence, sequence + 1)))
    driven.asker.turn()
    judged = driven.kernel.packets.judged
    return [(one.number, one.passed) for one in judged if one.queue == driven.queues.held]


@pytest.mark.parametrize("flags", ["RS", "SR", "S"])
def test_a_syn_behind_a_forged_reset_is_forged_too(driven: Driven, flags: str) -> None:
    """Also if it is read first, and if the RST was lost: the connection is marked."""
    for flag in flags:
        driven.send(driven.queues.held, flag)
    driven.asker.turn()
    assert not driven.kernel.packets.judged
    assert sorted(answered(driven)) == [(number, False) for number, _ in enumerate(flags, 1)]


def test_a_syn_behind_an_honest_reset_passes_after_it(driven: Driven) -> None:
    for flag in "RS":
        driven.send(driven.queues.held, flag)
    driven.asker.turn()
    driven.now += 10 * SECOND
    driven.asker.turn()
    judged = [(one.number, one.passed) for one in driven.kernel.packets.judged]
    assert judged == [(1, True), (2, True)]
    driven.send(driven.queues.held, "S")
    driven.asker.turn()
    assert driven.kernel.packets.judged[-1].passed


def test_of_many_syns_behind_a_reset_some_wait(driven: Driven) -> None:
    for flag in "R" + 20 * "S":
        driven.send(driven.queues.held, flag)
    driven.asker.turn()
    assert [one.passed for one in driven.kernel.packets.judged] == [False] * 12


def test_a_syn_of_no_connection_that_waits_passes(driven: Driven) -> None:
    flow = driven.kernel.connections.get(driven.path)
    assert flow is not None
    driven.kernel.connections.put(flow._replace(mark=0))
    driven.send(driven.queues.held, "S")
    driven.asker.turn()
    assert [one.passed for one in driven.kernel.packets.judged] == [True]
    assert not driven.kernel.packets.sent


def test_a_syn_whose_connection_cannot_be_looked_up_has_its_verdict(driven: Driven) -> None:
    driven.kernel.faults.fail("table.read", times=1)
    driven.send(driven.queues.held, "S")
    driven.asker.turn()
    assert [one.passed for one in driven.kernel.packets.judged] == [False]


def test_an_answer_that_has_come_in_time_counts_however_many_others_wait_before_it(
    driven: Driven,
) -> None:
    driven.send(driven.queues.held, "R")
    driven.asker.turn()
    sequence = driven.asked().sequence
    for _ in range(500):
        driven.send(driven.queues.answers, "A", ("SAck", (1, 2)))
    driven.send(driven.queues.answers, "A", ("SAck", (sequence, sequence + 1)))
    driven.now += 2 * SECOND
    driven.asker.turn()
    judged = [one.passed for one in driven.kernel.packets.judged if one.queue == driven.queues.held]
    assert judged == [False]
