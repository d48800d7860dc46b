"""What was decided about a RST, done: its verdict, the tracker's entry, what is told."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.holding import Decided, Outcome
from rstguard.engine.ruleset import SECOND
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.said import Weighed
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import Connections, PacketQueue

_TOLD_A_SECOND: Final = 20
"""Forged RSTs of which each is told; the rest are only counted."""
_MICROSECOND: Final = 1000
_AGAIN: Final = SECOND // 5
"""When a connection that was opened again is looked at once more."""
_CLOSED_SECONDS: Final = 10
"""How long the tracker keeps a closed connection at most (nf_conntrack_tcp_timeout_close)."""


class Carrying:
    """Carries out what `rstguard.engine.holding` decides.

    `held` keeps the mark of each packet that waits, by its number.
    """

    def __init__(
        self,
        channel: ChildEnd,
        table: Connections,
        queue: PacketQueue,
        marks: Marks,
        counts: Counter[str],
        hand_over: Callable[[Flow], int],
        waiting: Callable[[Flow], bool],
        lifetime: int,
    ) -> None:
        """Take what is needed.

        Args:
            channel: to the supervisor.
            table: the connection table.
            queue: where the RSTs wait.
            marks: where the bits are.
            counts: what is counted, by outcome.
            hand_over: returns the queue of the worker that a connection's client belongs to.
            waiting: tells whether more of a connection is still to be decided.
            lifetime: seconds that the tracker keeps an established connection without a segment.
        """
        self._channel, self._table, self._queue, self._marks = channel, table, queue, marks
        self._counts, self._hand_over, self._lifetime = counts, hand_over, lifetime
        self._waiting = waiting
        self._told, self._told_at = 0, 0
        self._reopened: deque[tuple[int, Flow]] = deque()
        """Connections that were opened again, and when to look at them."""
        self.held: dict[int, int] = {}
        self.waits = True
        """Whether RSTs wait, or pass at once (`forged_resets: observe`)."""

    def carry_out(self, decided: list[Decided], now: int) -> None:
        """Do all of it: entries first, as a verdict cannot be taken back.

        Raises:
            KernelError: the connection table cannot be had; the packets have their verdicts all the
                same, and the entries stay marked.
        """
        try:
            self._entries(decided)
            forged = [one.flow for one in decided if one.outcome is Outcome.FORGED and self.waits]
            self._reopened += [(now + _AGAIN, flow) for flow in forged]
        finally:
            for one in decided:
                for number in one.numbers:
                    self._verdict(one, number)
                self._count(one, now)

    def look_again(self, now: int) -> None:
        """See that connections which were opened again are not forgotten as closed ones.

        A segment that was under way in the kernel then, of a closed connection by what it had seen,
        sets the time of a closed one behind that; an idle connection has no next segment.

        Raises:
            KernelError: the connection table cannot be had.
        """
        flows = []
        while self._reopened and self._reopened[0][0] <= now:
            flows.append(self._reopened.popleft()[1])
        if not flows:
            return
        seen = [flow for flow in self._table.read(flows) if flow is not None]
        short = [
            flow
            for flow in seen
            if flow.state == TcpState.ESTABLISHED and 0 <= flow.timeout <= _CLOSED_SECONDS
        ]
        if short:
            self._counts["reopened_again"] += len(short)
            self._table.set_timeout(short, self._lifetime)

    def _entries(self, decided: list[Decided]) -> None:
        """Repair the entries of forged RSTs, and take the mark off all others.

        Where another RST of the connection waits, the mark stays: without it no answer would come
        here, and silence lets a RST pass.
        """
        for waiting in (False, True):
            of_these = [d for d in decided if self._waiting(d.flow) is waiting]
            self._change(of_these, 0 if waiting else self._marks.held.mask)

    def _change(self, decided: list[Decided], held: int) -> None:
        """Change entries and clear the bits `held` of their marks.

        Behind an honest RST in its client's name the sweeper has a look at the server's end, as
        behind those that nobody held.
        """
        closing = self._marks.closing
        forged = [d.flow for d in decided if d.outcome is Outcome.FORGED and self.waits]
        if forged:
            self._table.reopen(forged, self._lifetime, 0, held | closing.mask)
        passed = [d for d in decided if d.numbers and not (self.waits and not d.passes)]
        of_client = [d.flow for d in passed if d.by_client and not d.fin]
        if of_client:
            self._table.set_mark(of_client, closing.value, held | closing.mask)
        others = [d.flow for d in passed if not d.by_client or d.fin]
        if others:
            self._table.set_mark(others, 0, held)
        # The RST of an orphan is lost: where one that waited would pass, the server may not know.
        # Not of one that had to make room: nobody knows whether it was forged.
        known = Outcome.HONEST, Outcome.UNCONFIRMED
        ended = [d.flow for d in decided if not d.numbers and d.outcome in known]
        if ended:
            self._table.set_mark(ended, closing.value, held | closing.mask)

    def _verdict(self, decided: Decided, number: int) -> None:
        mark = self.held.pop(number, None)
        if mark is not None:  # else it has had one
            self.settle(number, mark, decided.passes, decided.flow)

    def settle(self, number: int, mark: int, passes: bool, flow: Flow | None = None) -> None:
        """Give a RST its verdict; where a worker is to see it, it goes on to that one's queue."""
        marks = self._marks
        to = None
        if passes and flow is not None and mark & marks.to_queue_also_known.value:
            to = self._hand_over(flow)
        mark &= ~marks.to_queue_over.mask if to is not None else ~marks.mask
        self._queue.settle(number, passes, mark & 0xFFFFFFFF, to)

    def _count(self, decided: Decided, now: int) -> None:
        outcome = decided.outcome
        if not decided.numbers:
            self._counts["lost_resets"] += 1
        self._counts[outcome.value] += 1
        if outcome is not Outcome.FORGED:
            return
        if now - self._told_at >= SECOND:
            self._told, self._told_at = 0, now
        self._told += 1
        if self._told <= _TOLD_A_SECOND:
            self._channel.send(
                Weighed(
                    decided.flow.original,
                    outcome,
                    decided.by_client,
                    decided.inside,
                    decided.fin,
                    decided.hops,
                    decided.true_hops,
                    decided.waited // _MICROSECOND,
                    self.waits,
                )
            )
