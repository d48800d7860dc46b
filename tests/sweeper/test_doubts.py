"""What becomes of connections for which a RST came in from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.ruleset import SECOND
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Reset
from rstguard.sweeper.doubts import Doubts
from tests.support.packets import ruleset
from tests.support.table import MARKS, Table, a_flow, server_of

CAME = MARKS.proven.value | MARKS.closing.value


class Listed(Table):
    """A table that can be listed."""

    def __init__(self, *flows: Flow) -> None:
        super().__init__(*flows)
        self.walks = 0
        self.replaced: set[str] = set()
        """Sets that are not empty."""

    def entries(self, name: str) -> int:
        return int(name in self.replaced)

    def dump(self, mark: int, mask: int) -> Iterator[Flow]:
        self.walks += 1
        return self.marked(mark, mask)

    def marked(self, mark: int, mask: int) -> Iterator[Flow]:
        return iter([flow for flow in self.flows.values() if flow.mark & mask == mark])


class Watched:
    """What looks after doubts, its table, and what it told."""

    def __init__(self, *flows: Flow, enforce: bool = True) -> None:
        self.table, self.told = Listed(*flows), list[Any]()
        self.counts: Counter[str] = Counter()
        self.now, self.takes = SECOND, 0
        channel: Any = self
        table: Any = self.table
        self.doubts = Doubts(
            channel, table, table, table, MARKS, self.counts, self.clock, lambda: 7
        )
        self.doubts.follow(replace(ruleset(), enforce=enforce))

    def clock(self) -> int:
        """Show what time it is after a look."""
        return self.now + self.takes

    def send(self, message: Any) -> None:
        self.told.append(message)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.doubts.work(self.now)
            self.now = self.doubts.next_at

    def sweep(self, every: int, times: int = 1) -> None:
        """Let sweeps find what is in doubt, each one followed by looks until the next."""
        for _ in range(times):
            self.doubts.swept(self.table.marked(*MARKS.doubted), self.now, every)
            until = self.now + every
            while self.now < until:
                self.look()


def closed(number: int = 1, mark: int = CAME) -> Flow:
    return a_flow(number)._replace(state=TcpState.CLOSE, mark=mark)


def test_a_server_that_went_on_is_reset_and_told_of() -> None:
    watched = Watched(closed())
    watched.look()
    assert not watched.table.probes  # its client may use the port again at once
    watched.look(2)
    (told,) = watched.told
    assert isinstance(told, Reset)
    assert (told.flow, told.reason) == (closed().original, Reason.OUTLIVED)
    assert watched.counts["outlived"] == 1


def test_where_looks_are_far_apart_none_waits_for_a_second() -> None:
    """In a very large table: a closed connection is forgotten after ten seconds."""
    watched = Watched()
    watched.takes = SECOND * 6 // 10
    watched.look()
    watched.table.flows[closed().original, 0] = closed()._replace(timeout=9)
    while watched.table.walks < 2:
        watched.look()
    assert watched.now > 6 * SECOND
    assert watched.table.probes


def test_a_server_that_is_through_with_it_is_asked_twice_and_left_alone() -> None:
    watched = Watched(closed())
    watched.table.deaf[server_of(closed())] = 99
    watched.look(5)
    assert (watched.told, watched.counts["outlived"]) == ([], 0)
    assert len(watched.table.probes) == 2


def test_the_answer_to_the_second_probe_counts_as_well() -> None:
    watched = Watched(closed())
    watched.table.deaf[server_of(closed())] = 1
    watched.look(5)
    assert watched.counts["outlived"] == 1


def test_a_clients_second_reset_proves_nothing() -> None:
    watched = Watched(closed())
    watched.table.deaf[server_of(closed())] = 99
    watched.look(2)
    watched.table.set_mark([closed()], MARKS.rst_sent.value, MARKS.rst_sent.mask)
    watched.look(3)
    assert watched.counts["outlived"] == 0


def test_of_a_connection_that_goes_on_any_number_is_taken() -> None:
    flow = a_flow()._replace(state=TcpState.ESTABLISHED, mark=CAME)
    watched = Watched(flow)
    watched.look(3)
    assert [one.original for one in watched.table.liberal] == [flow.original]
    assert watched.table.flows[flow.original, flow.zone].mark == MARKS.proven.value
    assert (watched.table.probes, watched.counts["window_cured"]) == ([], 1)


@pytest.mark.parametrize(
    "mark", [CAME | MARKS.held.value, MARKS.proven.value], ids=["held", "none"]
)
def test_what_is_held_back_or_has_no_reset_is_not_looked_at(mark: int) -> None:
    watched = Watched(closed(mark=mark))
    watched.look(3)
    assert not watched.table.probes
    assert not watched.table.liberal


def half_closed(number: int = 1, state: int = TcpState.CLOSE_WAIT, left: int = 60) -> Flow:
    return closed(number)._replace(state=state, timeout=left)


@pytest.mark.parametrize("state", [TcpState.FIN_WAIT, TcpState.CLOSE_WAIT, TcpState.LAST_ACK])
def test_a_half_closed_connection_lasts_as_long_as_an_open_one(state: TcpState) -> None:
    watched = Watched(half_closed(state=state), half_closed(2, state, left=10))
    watched.look(3)
    first, second = watched.table.flows.values()
    assert (first.timeout, second.timeout) == (60, 432_000)
    assert {first.mark, second.mark} == {CAME}
    assert len(watched.table.liberal) == 2
    assert not watched.table.probes


def test_one_that_the_tracker_takes_for_over_is_asked_for_before_it_goes() -> None:
    flow = half_closed(state=TcpState.TIME_WAIT)
    watched = Watched(flow)
    watched.look(2)
    assert not watched.table.probes
    watched.table.set_timeout([flow], 10)
    watched.look(2)
    assert watched.counts["outlived"] == 1


@pytest.mark.parametrize("state", [TcpState.LAST_ACK, TcpState.TIME_WAIT])
def test_what_its_server_closed_first_needs_no_look(state: TcpState) -> None:
    watched = Watched(half_closed(state=state, left=10)._replace(server_first=True))
    watched.look(2)
    (flow,) = watched.table.flows.values()
    assert (flow.mark, flow.timeout) == (MARKS.proven.value, 10)
    assert not watched.table.probes


def begun(number: int, age: int) -> Flow:
    mark = MARKS.guarded.value | MARKS.closing.value
    return closed(number)._replace(state=TcpState.SYN_SENT, mark=mark, age=age)


def test_a_syn_that_is_not_answered_stands_for_the_connection_before_it() -> None:
    watched = Watched(begun(1, age=0), begun(2, age=2 * SECOND))
    watched.look(2)
    assert [one.destination_port for one in watched.table.probes] == [80]
    assert watched.counts["outlived"] == 1


def test_what_takes_the_place_of_a_half_closed_connection_is_looked_at() -> None:
    watched = Watched(half_closed(state=TcpState.TIME_WAIT), half_closed(2))
    watched.look()
    new = half_closed()._replace(ident=77, state=TcpState.SYN_SENT, mark=MARKS.guarded.value)
    watched.table.flows[new.original, new.zone] = new
    watched.table.delete([half_closed(2)])
    watched.look(2)
    assert watched.counts["outlived"] == 1


def test_many_half_closed_ones_keep_nobody_waiting() -> None:
    many = [half_closed(number) for number in range(1, 5001)]
    watched = Watched(*many, closed(6000))
    watched.look(3)
    assert watched.counts["outlived"] == 1
    watched.look(2)
    assert len({one.original for one in watched.table.liberal}) == 5001


def test_a_policy_that_observes_changes_nothing() -> None:
    watched = Watched(closed(), enforce=False)
    watched.look(3)
    assert watched.table.flows[closed().original, closed().zone].mark == CAME


def test_many_at_once_wait_for_their_turn() -> None:
    watched = Watched(*(closed(number) for number in range(1, 4501)))
    watched.table.deaf[server_of(closed())] = 10_000
    watched.look(2)
    assert len(watched.table.probes) == 2000
    watched.look(9)
    assert len(watched.table.probes) == 9000


def test_what_sweeps_find_costs_no_walk_through_the_table() -> None:
    """While the kernel walks it handles no packet on that processor."""
    open_, half = a_flow(5), half_closed(6, left=10)
    watched = Watched(closed(), open_._replace(state=TcpState.ESTABLISHED, mark=CAME), half)
    watched.sweep(2 * SECOND)
    assert not watched.table.probes  # its client may use the port again at once
    watched.sweep(2 * SECOND, times=2)
    assert (watched.table.walks, watched.counts["outlived"]) == (0, 1)
    assert watched.counts["window_cured"] == 1
    assert watched.table.flows[half.original, 0].timeout == 432_000


@pytest.mark.parametrize("every", [6 * SECOND, 30 * SECOND])
def test_where_sweeps_are_far_apart_the_table_is_walked_through(every: int) -> None:
    watched = Watched()
    watched.sweep(every)
    watched.table.flows[closed().original, 0] = closed()
    watched.sweep(every)
    assert watched.counts["outlived"] == 1


def test_when_sweeps_end_the_table_is_walked_through_again() -> None:
    watched = Watched()
    watched.sweep(2 * SECOND)
    watched.look(6)
    watched.table.flows[closed().original, 0] = closed()
    watched.look(4)
    assert watched.counts["outlived"] == 1


@pytest.mark.parametrize("name", ["rstguard-replaced4", "rstguard-replaced6"])
def test_only_if_a_syn_took_the_place_of_a_connection_that_is_looked_for(name: str) -> None:
    watched = Watched(begun(1, age=0))
    watched.sweep(2 * SECOND, times=3)
    assert watched.table.walks == 0
    watched.table.replaced = {name}
    watched.sweep(2 * SECOND)
    assert watched.table.walks
    assert not watched.table.probes  # it has just come
    watched.table.flows[begun(1, 0).original, 0] = begun(1, age=2 * SECOND)
    watched.sweep(2 * SECOND, times=2)
    assert watched.counts["outlived"] == 1
    assert watched.table.flows[begun(1, 0).original, 0].mark & MARKS.condemned_destination.value
