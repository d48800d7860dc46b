"""A sweeper driven turn by turn, against a small connection table that holds state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from rstguard.engine.address import Prefix, address_text, parse_address, parse_prefix
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.ruleset import SECOND, Measure, RuleSet
from rstguard.engine.table import Table as Sweepable
from rstguard.engine.verdict import Action, Ends, Reason
from rstguard.ipc.channel import Closed, SupervisorEnd, child_end, pair, supervisor_end
from rstguard.ipc.messages import (
    Blocked,
    Counts,
    FromChild,
    Kill,
    Killed,
    NotKilled,
    Productive,
    Ready,
    Recheck,
    Reset,
    Start,
    Stop,
)
from rstguard.ipc.said import Large, UnderPressure
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.marks import Bits, Labels, Marks
from rstguard.kernel.seam import Counted
from rstguard.sweeper.sweeper import Sweeper
from tests.support.fake_kernel.packets import FakeLog, Packets
from tests.support.packets import rule, ruleset
from tests.support.table import MARKS, Table, a_flow, client_of, server_of
from tests.support.tables import best_table

CONDEMNED = MARKS.condemned.mask
GUARDED = MARKS.proven.value
CLIENT = parse_prefix("192.0.2.1")


class Kernel(Table):
    """The table with what else a sweeper asks for; `refuses` names what fails, and how often."""

    def __init__(self, *flows: Flow) -> None:
        super().__init__(*flows)
        self.elements: list[Element] = []
        self.failing: dict[str, int] = {}
        self.kind = best_table
        self.packets = Packets()
        self.counted: dict[str, list[tuple[str, int]]] = {}
        """By set, what it was told to count for whom; and what was put into it."""

    def _may_fail(self, what: str) -> None:
        if self.failing.get(what, 0):
            self.failing[what] -= 1
            raise KernelError(f"the kernel refused to {what}")

    def table(self, columns: bool = False) -> Kernel:
        return self

    def whole(self, mark: int, mask: int) -> Sweepable:
        return self.kind(self.dump(mark, mask))

    def sets(self) -> Kernel:
        return self

    def packet_log(self, group: int) -> FakeLog:
        return FakeLog(self.packets, group)

    def put(self, name: str, prefixes: Iterable[Prefix], _seconds: int) -> None:
        self.counted.setdefault(name, []).extend((str(prefix), 0) for prefix in prefixes)

    def count(self, name: str, elements: Iterable[Counted], _seconds: int) -> None:
        self._may_fail("count")
        told = ((address_text(one.address), one.packets) for one in elements)
        self.counted.setdefault(name, []).extend(told)

    def read_sysctl(self, _name: str) -> str:
        return "432000"

    def injector(self, _marks: Marks) -> Kernel:
        return self

    def ways(self, addresses: Sequence[int]) -> list[str]:
        return ["eth0"] * len(addresses)

    def dump(self, mark: int = 0, mask: int = 0, assured: bool = False) -> Iterator[Flow]:
        self._may_fail("dump")
        return iter([flow for flow in self.flows.values() if flow.mark & mask == mark])

    def entries(self, _name: str) -> int:
        return 0

    def add(self, elements: Iterable[Element]) -> None:
        self._may_fail("add")
        self.elements += elements

    def list(self) -> list[Element]:
        return self.elements


class Driven:
    """A sweeper, its kernel, its supervisor's end, and a clock that the test moves."""

    def __init__(self, rules: RuleSet, *flows: Flow, banned: Sequence[Element] = ()) -> None:
        self.now = SECOND
        self.kernel = Kernel(*flows)
        self.kernel.elements += banned
        ours, theirs = pair()
        self.end: SupervisorEnd = supervisor_end(ours)
        self._theirs = theirs
        kernel: Any = self.kernel
        self.used = 0
        clocks = (lambda: self.now, lambda: self.used)
        self.sweeper = Sweeper(
            child_end(theirs), Start(rules, 1), kernel, *clocks, draw=lambda: 4711
        )

    def turn(self) -> int | None:
        return self.sweeper.turn()

    def heard(self) -> list[FromChild]:
        """Return what was told since the last time, less the counts."""
        return [m for m in self.end.receive() if not isinstance(m, Counts)]

    def until(self, kind: type, seconds: int = 8) -> Any:
        """Turn as often as the sweeper asks for, until it tells something of a kind."""
        over = self.now + seconds * SECOND
        while self.now < over:
            wait = self.turn()
            for message in self.heard():
                if isinstance(message, kind):
                    return message
            assert wait is not None
            self.now += max(wait, SECOND // 1000)
        raise AssertionError(f"no {kind.__name__} within {seconds} s")

    def close(self) -> None:
        self.end.close()
        self._theirs.close()


Drive = Callable[..., Driven]


@pytest.fixture
def drive() -> Iterator[Drive]:
    made: list[Driven] = []

    def driven(*arguments: Any, **more: Any) -> Driven:
        made.append(Driven(*arguments, **more))
        return made[-1]

    yield driven
    for one in made:
        one.close()


def ban(source: Prefix = CLIENT) -> Element:
    return Element(source, "ban", "rate", 600)


def test_kills_in_two_zones_are_not_confused(drive: Drive) -> None:
    """The same addresses and ports in two zones: one connection dies, the other stays silent."""
    flow = a_flow(1)
    other = flow._replace(zone=7, ident=2)
    driven = drive(ruleset(), flow, other)
    kernel = driven.kernel
    speak = kernel.speak

    def only_in_its_zone(flow: Flow, condemned: Bits, sent: Bits) -> None:
        if flow.zone == 0:
            speak(flow, condemned, sent)

    kernel.speak = only_in_its_zone  # type: ignore[method-assign]
    driven.end.send(Kill(5, source=CLIENT))
    killed = driven.until(Killed)
    assert (killed.number, killed.matched, killed.confirmed) == (5, 2, 1)
    assert [one.flow for one in killed.unconfirmed] == [other.original]
    assert driven.now > 5 * SECOND  # not before the silent one was given up


def test_a_kill_is_answered_for_its_own_connections_only(drive: Drive) -> None:
    first, second = a_flow(1), a_flow(2)
    driven = drive(ruleset(), first, second)
    driven.end.send(Kill(1, source_port=1))
    driven.end.send(Kill(2, source_port=2))
    driven.end.send(Kill(3, source_port=3))
    found: list[Killed] = []
    for _ in range(50):
        driven.turn()
        driven.now += SECOND // 100
        found += [message for message in driven.heard() if isinstance(message, Killed)]
    answers = {killed.number: (killed.matched, killed.confirmed) for killed in found}
    assert answers == {1: (1, 1), 2: (1, 1), 3: (0, 0)}


def test_two_who_ask_for_the_same_connection_are_both_answered(drive: Drive) -> None:
    driven = drive(ruleset(), a_flow(1))
    driven.end.send(Kill(1, source=CLIENT))
    driven.end.send(Kill(2, source=CLIENT))
    numbers: list[int] = []
    for _ in range(50):
        driven.turn()
        driven.now += SECOND // 100
        numbers += [message.number for message in driven.heard() if isinstance(message, Killed)]
    assert numbers == [1, 2]


def test_a_ban_ends_what_its_source_holds(drive: Drive) -> None:
    mine, foreign = a_flow(1), a_flow(2)
    elsewhere = foreign.original._replace(source=parse_address("192.0.2.9"))
    driven = drive(ruleset(), mine, foreign._replace(original=elsewhere))
    driven.end.send(Blocked(ban(), Reason.SYN_RATE))
    driven.turn()
    marked = {f.original.source: f.mark & CONDEMNED for f in driven.kernel.flows.values()}
    assert marked == {CLIENT.network: CONDEMNED, elsewhere.source: 0}


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_banned_before_is_ended_at_the_start(drive: Drive, keep: bool) -> None:
    banned = ban()._replace(keep_existing=keep)
    driven = drive(ruleset(), a_flow(1), banned=[banned])
    driven.turn()
    (flow,) = driven.kernel.flows.values()
    assert bool(flow.mark & CONDEMNED) is not keep


def test_a_list_of_bans_is_looked_up_again(drive: Drive) -> None:
    driven = drive(ruleset(), a_flow(1))
    driven.turn()
    driven.kernel.elements.append(ban())
    driven.end.send(Recheck())
    driven.turn()
    (flow,) = driven.kernel.flows.values()
    assert flow.mark & CONDEMNED


def test_nothing_asked_for_is_forgotten_while_the_kernel_refuses(drive: Drive) -> None:
    """A table that cannot be read for a moment: the ban's connections end after it."""
    driven = drive(ruleset(), a_flow(1), a_flow(2))
    driven.turn()
    driven.kernel.failing["dump"] = 3
    driven.end.send(Kill(1, source_port=2))
    driven.end.send(Blocked(ban(), Reason.SYN_RATE))
    wait = driven.turn()
    assert wait is not None
    assert wait > 0
    driven.turn()
    assert driven.kernel.failing["dump"] == 2  # it does not ask again at once
    assert not any(flow.mark & CONDEMNED for flow in driven.kernel.flows.values())
    killed = driven.until(Killed)
    assert (killed.matched, killed.confirmed) == (1, 1)
    assert all(flow.mark & CONDEMNED for flow in driven.kernel.flows.values())


def test_a_full_set_keeps_no_connection_alive(drive: Drive) -> None:
    """A sweep that bans one and resets another: what cannot be banned is counted, not told."""
    idle = rule(Measure.IDLE, Action.RESET, limit=SECOND, name="idle", ports=frozenset({80}))
    many = rule(Measure.CONNECTIONS, Action.BAN, limit=0, name="many", ports=frozenset({81}))
    quiet = a_flow(1, GUARDED)
    crowd = a_flow(2, GUARDED)
    crowd = crowd._replace(original=crowd.original._replace(destination_port=81))
    crowd = crowd._replace(labels=1 << Labels().confirmed)
    driven = drive(ruleset(idle, many), quiet, crowd)
    driven.kernel.failing["add"] = 100
    reset = driven.until(Reset)
    assert reset.rule == "idle"
    driven.turn()
    assert driven.kernel.flows[(quiet.original, 0)].mark & CONDEMNED
    assert not driven.kernel.flows[(crowd.original, 0)].mark & CONDEMNED
    driven.now += SECOND
    driven.turn()
    counts = [message for message in driven.end.receive() if isinstance(message, Counts)]
    assert counts[-1].totals["block_failed"] > 0


def test_what_is_half_open_is_ended_for_a_shunned_source(drive: Drive) -> None:
    waiting = a_flow(1, MARKS.guarded.value, TcpState.SYN_RECV)
    driven = drive(ruleset(), waiting, a_flow(2, GUARDED))
    driven.end.send(Blocked(ban()._replace(kind="shun"), Reason.SYN_RATE))
    driven.turn()
    found = {name.source_port: flow.mark for (name, _), flow in driven.kernel.flows.items()}
    assert found[1] & CONDEMNED == MARKS.condemned_for[Ends.DESTINATION]
    assert not found[2] & CONDEMNED


def test_what_stayed_is_told(drive: Drive) -> None:
    flow = a_flow(1)
    driven = drive(ruleset(), flow)
    driven.kernel.deaf = {client_of(flow): 100, server_of(flow): 100}
    driven.end.send(Reset(flow.original, Ends.BOTH, "slow", Reason.SLOW))
    told = driven.until(NotKilled)
    assert told.count == 1
    assert "stayed silent" in told.unconfirmed[0].sentence


def test_turns_say_how_long_to_wait(drive: Drive) -> None:
    driven = drive(ruleset())
    driven.sweeper.begin()
    assert driven.turn() == SECOND // 2
    assert driven.heard() == [Ready(0), UnderPressure(()), Large(())]
    driven.end.send(Productive({}))  # told to all, and no news to the sweeper
    driven.end.send(Stop())
    assert driven.turn() is None


def test_it_ends_when_the_supervisor_is_gone(drive: Drive) -> None:
    driven = drive(ruleset(), a_flow(1))
    driven.end.send(Kill(1, source=CLIENT))
    driven.turn()
    driven.end.close()
    with pytest.raises(Closed):
        driven.turn()


def test_a_second_start_is_not_swallowed(drive: Drive) -> None:
    driven = drive(ruleset())
    driven.end.send(Start(ruleset(), 1))
    with pytest.raises(ValueError, match="Start is not for"):
        driven.turn()


def test_the_same_choices_make_the_same_run(drive: Drive) -> None:
    """No clock and no chance of its own: two sweepers send the same probes."""
    several = [drive(ruleset(), a_flow(1), a_flow(2)) for _ in range(2)]
    for driven in several:
        driven.end.send(Kill(1, source=CLIENT))
        driven.until(Killed)
    assert several[0].kernel.probes == several[1].kernel.probes != []
    assert several[0].now == several[1].now


def test_sweeps_that_are_dear_come_more_seldom(drive: Drive) -> None:
    rules = ruleset(rule(Measure.IDLE, Action.RESET, 60 * SECOND))
    driven = drive(rules, a_flow(1, mark=GUARDED))
    table = driven.kernel.kind
    took, sweeps = [SECOND // 10, SECOND // 10, SECOND, SECOND, SECOND // 10], list[int]()

    def whole(flows: Iterable[Flow]) -> Sweepable:
        sweeps.append(driven.now)
        driven.used += took[len(sweeps) - 1]
        return table(flows)

    driven.kernel.kind = whole
    while len(sweeps) < len(took):
        driven.now += max(driven.turn() or 0, SECOND // 1000)
    apart = [round((b - a) / SECOND) for a, b in pairwise(sweeps)]
    assert apart == [2, 2, 5, 5]
    counts = [m.totals for m in driven.end.receive() if isinstance(m, Counts)]
    told = [count["sweep_period_ms"] for count in counts if "sweep_period_ms" in count]
    assert (max(told), told[-1]) == (5000, 2000)
