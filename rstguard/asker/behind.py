"""SYNs that come behind a RST which waits: they wait as well.

The tracker forgets a connection that a RST has closed as soon as a SYN of the same end comes
(tcp_packet in nf_conntrack_proto_tcp.c), and with it the mark by which answers come to the asker:
the RST would pass unconfirmed.  So the SYN waits in front of the tracker.  If the RST was forged,
the SYN was as well, as its end holds the connection; else it opens the next one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.holding import Decided, Holding, Outcome
from rstguard.engine.wire import Packet
from rstguard.kernel import KernelError
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import Connections, PacketQueue

_MOST: Final = 8
"""SYNs of one connection that wait; the rest are dropped: an honest one is sent again."""
_MOST_OVER: Final = 8192
"""Connections of which is known that they are over."""

Syn = tuple[int, int, Packet]
"""The number of a packet in the queue, its mark, and what it is."""


class Behind:
    """Keeps SYNs by the connection that they would replace, each until that one is decided."""

    def __init__(
        self, queue: PacketQueue, table: Connections, holding: Holding, marks: Marks
    ) -> None:
        self._queue, self._table, self._holding, self._marks = queue, table, holding, marks
        self._waiting: dict[Tuple, list[Syn]] = {}
        self._over: OrderedDict[tuple[Tuple, int], None] = OrderedDict()
        """Connections whose RST has passed: late answers mark them once more."""

    def take(self, syns: Sequence[Syn], now: int) -> None:
        """Have SYNs wait whose connection does, and let all others pass.

        A closed connection that is marked and does not wait has lost its RST: it is asked for now.

        Raises:
            KernelError: the connections cannot be looked up; the SYNs are dropped.
        """
        if not syns:
            return
        try:
            flows = self._table.read([named(packet) for _, _, packet in syns])
        except KernelError:
            for syn in syns:
                self._settle(syn, passes=False)
            raise
        for syn, flow in zip(syns, flows, strict=True):
            if flow is None or not self._waits(flow, now):
                self._settle(syn, passes=True)
            elif len(waiting := self._waiting.setdefault(flow.original, [])) < _MOST:
                waiting.append(syn)
            else:
                self._settle(syn, passes=False)

    def _waits(self, flow: Flow, now: int) -> bool:
        if self._holding.waits_for(flow):
            return True
        if flow.state != TcpState.CLOSE or not flow.mark & self._marks.held.mask:
            return False
        return _entry(flow) not in self._over and self._holding.orphan(flow, now)

    def release(self, decided: Sequence[Decided]) -> None:
        """Give SYNs their verdict whose connections have just been decided."""
        forged = {_entry(one.flow) for one in decided if one.outcome is Outcome.FORGED}
        for flow in (one.flow for one in decided):
            passes = _entry(flow) not in forged
            if passes:
                self._over[_entry(flow)] = None
            if not self._holding.waits_for(flow):
                for syn in self._waiting.pop(flow.original, ()):
                    self._settle(syn, passes)
        while len(self._over) > _MOST_OVER:
            self._over.popitem(last=False)

    def _settle(self, syn: Syn, passes: bool) -> None:
        number, mark, _ = syn
        self._queue.settle(number, passes, mark & ~self._marks.mask & 0xFFFFFFFF)


def _entry(flow: Flow) -> tuple[Tuple, int]:
    """What tells a connection from the next one of the same ends."""
    return flow.original, flow.ident


def named(packet: Packet) -> Flow:
    """Return a connection by one of its names, to be looked up."""
    path = Tuple(*packet[:4])
    return Flow(0, path, path, 0, 0, True, 0, 0, 0, 0, -1, 0, 0)
