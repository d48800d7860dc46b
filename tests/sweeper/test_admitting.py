"""What the sweeper hears of beginnings and ends, and what the kernel is told to count then."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.ruleset import SECOND, Measure
from rstguard.engine.segment import emit
from rstguard.engine.verdict import Action
from rstguard.engine.wire import ACK, FIN, RST, SYN, Packet
from rstguard.ipc.messages import Counts, Reset
from rstguard.kernel import KernelError
from rstguard.kernel.admission import REFUSED_GROUP, TOLD_GROUP, counting_set, live_set
from tests.support.packets import rule, ruleset
from tests.support.table import MARKS, a_flow
from tests.sweeper.test_sweeper import Driven

LIMIT = 8
MANY = ruleset(rule(Measure.CONNECTIONS, Action.RESET, LIMIT), enforce=True)
SET, MILLISECOND = live_set(MANY.rules[0], 4), SECOND // 1000


class Heard(Driven):
    """A sweeper that is told of packets."""

    def __init__(self, *flows: Flow) -> None:
        super().__init__(MANY, *flows)

    def tell(self, flow: Flow, flags: int, group: int = TOLD_GROUP, prefix: str = "") -> None:
        packet = Packet(*flow.original, 7, 9, flags, 100, 0)
        self.kernel.packets.log(group, emit(packet), prefix)

    def show(self, flow: Flow) -> None:
        self.kernel.flows[flow.original, flow.zone] = flow

    def begin(self, number: int) -> Flow:
        flow = a_flow(number, MARKS.proven.value)
        self.show(flow)
        self.tell(flow, ACK)
        return flow

    def end_of(self, flow: Flow, state: TcpState, flags: int = FIN | ACK) -> None:
        self.show(flow._replace(state=state))
        self.tell(flow, flags)

    def pass_time(self, time: int = 5 * MILLISECOND) -> None:
        self.now += time
        self.turn()

    @property
    def told(self) -> int:
        """What the kernel was last told to count for the client, who is in the count once more."""
        return self.kernel.counted[SET][-1][1] - 1

    def counts(self) -> dict[str, int]:
        self.pass_time(SECOND)
        return [dict(m.totals) for m in self.end.receive() if isinstance(m, Counts)][-1]


Hear = Callable[..., Heard]


@pytest.fixture
def hear() -> Iterator[Hear]:
    made: list[Heard] = []

    def heard(*flows: Flow) -> Heard:
        made.append(Heard(*flows))
        made[-1].turn()
        return made[-1]

    yield heard
    for one in made:
        one.close()


def full() -> list[Flow]:
    return [a_flow(number, MARKS.proven.value) for number in range(1, LIMIT + 1)]


def test_who_is_near_the_limit_is_counted_and_an_end_frees_a_place_at_once(hear: Hear) -> None:
    heard = hear(*full())
    assert heard.told == LIMIT
    for state, left in ((TcpState.FIN_WAIT, LIMIT), (TcpState.LAST_ACK, LIMIT - 1)):
        heard.end_of(full()[0], state)
        heard.pass_time()
        assert heard.told == left
    heard.end_of(full()[1], TcpState.CLOSE, RST)
    heard.pass_time()
    assert heard.told == LIMIT - 2


def test_what_only_seems_to_end_goes_on_counting(hear: Hear) -> None:
    heard = hear(*full())
    heard.tell(full()[0], RST)  # the tracker did not take it
    closing = full()[1]._replace(mark=MARKS.proven.value | MARKS.closing.value)
    heard.end_of(closing, TcpState.TIME_WAIT)  # two FINs of its client: the server holds it
    heard.pass_time()
    assert heard.told == LIMIT


def test_beginnings_are_counted_until_a_sweep_is_wanted(hear: Hear) -> None:
    heard = hear()
    for number in range(1, 6):
        heard.begin(number)
    heard.pass_time()
    sweeps = heard.counts()["sweeps"]
    for number in range(6, 10):
        heard.begin(number)
    heard.pass_time()
    assert heard.counts()["sweeps"] == sweeps + 1
    assert len(heard.kernel.flows) == LIMIT + 1
    assert [m.rule for m in heard.heard() if isinstance(m, Reset)] == []


def test_a_refusal_is_told_by_its_rule_and_its_client_by_a_rst_if_it_had_a_cookie(
    hear: Hear, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, sent = hear(), list[bytes]()
    monkeypatch.setattr(heard.kernel, "send", sent.extend)
    heard.tell(a_flow(1), ACK, REFUSED_GROUP, "0")
    heard.tell(a_flow(2), SYN, REFUSED_GROUP, "0")
    heard.tell(a_flow(3), ACK, REFUSED_GROUP, "7")  # of another policy
    heard.pass_time()
    told = [m for m in heard.heard() if isinstance(m, Reset)]
    assert [(m.flow, m.rule, m.enforced) for m in told] == [
        (a_flow(number).original, MANY.rules[0].name, True) for number in (1, 2)
    ]
    assert heard.counts()[f"rule.{MANY.rules[0].name}"] == 2
    assert len(sent) == 1


def test_after_an_overrun_nothing_is_set_before_the_next_sweep(hear: Hear) -> None:
    heard = hear(*full())
    heard.kernel.packets.logs[TOLD_GROUP].overrun = True
    heard.end_of(full()[0], TcpState.CLOSE, RST)
    heard.pass_time()
    assert heard.told == LIMIT
    counts = heard.counts()
    assert counts["uncounted"] == 1
    heard.pass_time(2 * SECOND)
    assert heard.told == LIMIT - 1
    heard.pass_time(61 * SECOND)
    assert heard.counts()["uncounted"] == 0


def test_what_the_kernel_refuses_is_done_with_the_next_sweep(hear: Hear) -> None:
    heard = hear(*full())
    heard.kernel.failing["count"] = 1
    heard.end_of(full()[0], TcpState.CLOSE, RST)
    heard.pass_time()
    assert heard.told == LIMIT
    heard.pass_time(3 * SECOND)
    assert heard.told == LIMIT - 1


def test_whoever_else_listens_leaves_the_limit_to_sweeps(
    hear: Hear, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(_: object, group: int) -> None:
        raise KernelError(f"NFLOG group {group} is in use")

    assert counting_set(4) in hear().kernel.counted
    monkeypatch.setattr("tests.sweeper.test_sweeper.Kernel.packet_log", taken)
    heard = hear(*full())
    assert not heard.kernel.counted
    assert heard.counts()["cannot_count"] == 1
