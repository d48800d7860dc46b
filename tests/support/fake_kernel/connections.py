"""A connection table that a test fills: `rstguard.kernel.seam.Connections` that remembers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from rstguard.engine.address import is_v6
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.table import Table
from rstguard.kernel.conntrack import GONE
from rstguard.kernel.seam import Lost
from tests.support.fake_kernel.elements import Around
from tests.support.tables import best_table

_OPENING = (TcpState.NONE, TcpState.SYN_SENT, TcpState.SYN_RECV, TcpState.SYN_SENT2)


class ConnectionTable:
    """All connections of a kernel, by original tuple and zone.

    They stay until they are deleted: their `timeout` is what the test says.

    Args:
        wall: nanoseconds of the clock on the wall, by which they grow older.
    """

    def __init__(self, wall: Callable[[], int]) -> None:
        self.wall = wall
        self.reopens = True
        self.lost = Lost()
        self.more = 0
        """Entries that nobody asks about, but that take their room."""
        self._held: dict[tuple[Tuple, int], Flow] = {}
        self._born: dict[tuple[Tuple, int], int] = {}

    def __len__(self) -> int:
        return len(self._held) + self.more

    def put(self, flow: Flow) -> None:
        """Add a connection, or say how it is now; `age` -1: the kernel does not stamp."""
        key = flow.original, flow.zone
        self._held[key] = flow
        self._born[key] = self.wall() - flow.age

    def get(self, original: Tuple, zone: int = 0, now: int | None = None) -> Flow | None:
        """Return a connection as old as it is at `now`, or None."""
        key = original, zone
        flow = self._held.get(key)
        if flow is None or flow.age < 0:
            return flow
        return flow._replace(age=(self.wall() if now is None else now) - self._born[key])

    def change(self, original: Tuple, zone: int = 0, **fields: Any) -> None:
        """Change fields of a connection that is there: its state, counts, mark."""
        flow = self.get(original, zone)
        assert flow is not None
        self.put(flow._replace(**fields))

    def drop(self, original: Tuple, zone: int = 0) -> None:
        """Take a connection out; one that is not there does not matter."""
        self._held.pop((original, zone), None)
        self._born.pop((original, zone), None)

    def all(self, now: int | None = None) -> list[Flow]:
        """Return all connections, in the order in which they were added."""
        found = (self.get(original, zone, now) for original, zone in list(self._held))
        return [flow for flow in found if flow is not None]


class FakeConnections:
    """What a process sees of the table, and how it changes it."""

    def __init__(self, table: ConnectionTable, around: Around) -> None:
        self._table = table
        self._around = around

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    def dump(
        self,
        mark: int = 0,
        mask: int = 0,
        family: int = 0,
        now_ns: int | None = None,
        assured: bool = False,
    ) -> Iterator[Flow]:
        """Yield the connections whose mark, under `mask`, equals `mark`."""
        with self._around("table.dump", ""):
            for flow in self._table.all(now_ns):
                v6 = is_v6(flow.original.source)
                of_family = family in (0, socket.AF_INET6 if v6 else socket.AF_INET)
                established = flow.seen_reply and flow.state not in _OPENING
                if flow.mark & mask == mark & mask and of_family and (established or not assured):
                    yield flow

    def whole(self, mark: int, mask: int) -> Table:
        """Return those connections for a sweep."""
        return best_table(self.dump(mark, mask))

    def read(self, flows: Sequence[Flow], now_ns: int | None = None) -> list[Flow | None]:
        """Return each connection as it is now, or None; found by tuple and zone."""
        with self._around("table.read", ""):
            return [self._table.get(flow.original, flow.zone, now_ns) for flow in flows]

    def find(self, path: Tuple) -> Flow | None:
        """Return the connection that has this tuple in either direction, or None."""
        with self._around("table.find", ""):
            held = (flow for flow in self._table.all() if path in (flow.original, flow.reply))
            return next(held, None)

    def set_mark(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Mark connections (old & ~mask) | bits; return an errno for each, 0 for success."""
        if bits & ~mask:
            raise ValueError(f"bits 0x{bits:x} outside mask 0x{mask:x}")
        with self._around("table.set_mark", f"0x{bits:x}"):
            return [self._mark(flow, bits, mask) for flow in flows]

    def _mark(self, flow: Flow, bits: int, mask: int) -> int:
        held = self._table.get(flow.original, flow.zone)
        if held is None:
            return GONE
        self._table.change(flow.original, flow.zone, mark=held.mark & ~mask | bits)
        return 0

    def set_labels(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Label connections (old & ~mask) | bits; return an errno for each, 0 for success."""
        with self._around("table.set_labels", f"0x{bits:x}"):
            codes = []
            for flow in flows:
                held = self._table.get(flow.original, flow.zone)
                codes.append(GONE if held is None else 0)
                if held is not None:
                    labels = held.labels & ~mask | bits
                    self._table.change(flow.original, flow.zone, labels=labels)
            return codes

    def set_liberal(self, flows: Sequence[Flow]) -> list[int]:
        """Segments have no numbers here: only tell which connections are there."""
        with self._around("table.set_liberal", ""):
            held = [self._table.get(flow.original, flow.zone) for flow in flows]
            return [GONE if flow is None else 0 for flow in held]

    def reopen(self, flows: Sequence[Flow], seconds: int, bits: int, mask: int) -> list[int]:
        """Call connections established again, and mark them; an errno for each, 0 for success."""
        with self._around("table.reopen", f"0x{bits:x}"):
            codes = [self._mark(flow, bits, mask) for flow in flows]
            for flow, code in zip(flows, codes, strict=True):
                if not code:
                    state = TcpState.ESTABLISHED
                    self._table.change(flow.original, flow.zone, state=state, timeout=seconds)
            return codes

    def can_reopen(self) -> bool:
        """Tell whether `reopen` works, as it does here unless it is made to fail."""
        with self._around("table.can_reopen", ""):
            return self._table.reopens

    def set_timeout(self, flows: Sequence[Flow], seconds: int) -> list[int]:
        """Say how long connections have left."""
        with self._around("table.set_timeout", ""):
            codes = []
            for flow in flows:
                there = self._table.get(flow.original, flow.zone) is not None
                if there:
                    self._table.change(flow.original, flow.zone, timeout=seconds)
                codes.append(0 if there else GONE)
            return codes

    def delete(self, flows: Sequence[Flow]) -> list[int]:
        """Take connections out, if `ident` is theirs; return an errno for each, 0 for success."""
        with self._around("table.delete", ""):
            return [self._delete(flow) for flow in flows]

    def _delete(self, flow: Flow) -> int:
        held = self._table.get(flow.original, flow.zone)
        if held is None or held.ident != flow.ident:
            return GONE
        self._table.drop(flow.original, flow.zone)
        return 0

    def count(self) -> int:
        """Return how many entries there are."""
        with self._around("table.count", ""):
            return len(self._table)

    def lost(self) -> Lost:
        """Return what the test says."""
        with self._around("table.lost", ""):
            return self._table.lost
