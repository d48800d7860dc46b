"""The connection table as columns of numbers, judged at once.  Needs numpy.

An entry is a row.  An address is two numbers of 64 bits, the higher one 0 for IPv4.  Counts of
packets and bytes are below 2**62: the kernel's own, which no connection ever reaches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.address import V6
from rstguard.engine.columned import ColumnKnown
from rstguard.engine.flow import BOTH_FINS, LIVE, Flow, TcpState, Tuple
from rstguard.engine.grades import Grades
from rstguard.engine.grouping import numbers_in, sources
from rstguard.engine.lenient import HEADERS4, HEADERS6, LEAST, SYN_MORE
from rstguard.engine.reused import Reused
from rstguard.engine.table import Known, Moment, Table

Column = NDArray[Any]

COLUMNS: Final[Mapping[str, str]] = {
    "ident": "u4",
    "source": "u8",
    "destination": "u8",
    "source_port": "u2",
    "destination_port": "u2",
    "reply_source": "u8",
    "reply_destination": "u8",
    "reply_source_port": "u2",
    "reply_destination_port": "u2",
    "state": "u1",
    "mark": "u4",
    "seen_reply": "?",
    "client_packets": "i8",
    "client_bytes": "i8",
    "server_packets": "i8",
    "server_bytes": "i8",
    "age": "i8",
    "timeout": "u4",
    "zone": "u2",
    "labels": "u8",
    "server_first": "?",
    "v6": "?",
    "source_high": "u8",
    "destination_high": "u8",
    "reply_source_high": "u8",
    "reply_destination_high": "u8",
    "labels_high": "u8",
}
"""The columns, and the kind of numbers in each: those of `Flow`, and the upper halves."""
_LOW: Final = (1 << 64) - 1


class Columns(Table):
    """Connections as columns; `columns` has those of `COLUMNS`, all of one length."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self._columns = columns
        self.any_v6 = bool(columns["v6"].any())

    @classmethod
    def of(cls, flows: Iterable[Flow]) -> Columns:
        """Make columns of objects."""
        rows = [row_of(flow) for flow in flows]
        values = zip(*rows, strict=True) if rows else ([] for _ in COLUMNS)
        return cls(
            {
                name: np.array(column, kind)
                for (name, kind), column in zip(COLUMNS.items(), values, strict=True)
            }
        )

    def __len__(self) -> int:
        return len(self._columns["ident"])

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def flows(self) -> list[Flow]:
        """Return all of them as objects."""
        return self.flows_at(np.arange(len(self)))

    def flows_at(self, rows: Column) -> list[Flow]:
        """Return some rows as objects."""
        lists = [self._columns[name][rows].tolist() for name in COLUMNS]
        return [_flow(row) for row in zip(*lists, strict=True)]

    def marked(self, mark: int, mask: int) -> list[Flow]:
        """Return those whose mark, under `mask`, equals `mark`, as objects."""
        return self.flows_at(np.flatnonzero(self["mark"] & np.uint32(mask) == mark))

    def as_held(self, closing: int) -> None:
        """Show each as its server holds it."""
        held = (self["mark"] & np.uint32(closing)) != 0
        held &= _in(self["state"], BOTH_FINS) & ~self["server_first"]
        if held.any():
            self._columns["state"] = np.where(held, np.uint8(TcpState.FIN_WAIT), self["state"])

    def live(self) -> Column:
        """Return the rows of live connections."""
        return np.flatnonzero(_in(self["state"], LIVE))

    def labelled(self, bits: int) -> Column:
        """Tell of each whether it bears one of the labels that `bits` has."""
        low, high = bits & _LOW, bits >> 64
        found: Column = (self["labels"] & np.uint64(low)) != 0
        if high:
            found |= (self["labels_high"] & np.uint64(high)) != 0
        return found

    def begun(self, reused: Reused) -> list[Flow]:
        """Return those that have begun on another's entry."""
        return reused.began(self.flows_at(np.flatnonzero(self.labelled(reused.either))))

    def as_own(self, reused: Reused) -> None:
        """Show each with what is its own."""
        rows = np.flatnonzero(self.labelled(reused.either))
        own = zip(*map(row_of, reused.own(self.flows_at(rows))), strict=True)
        for (name, kind), values in zip(COLUMNS.items(), own, strict=False):  # there may be none
            self._columns[name] = self._columns[name].copy()
            self._columns[name][rows] = np.array(values, kind)

    def tally(self, ipv4: int, ipv6: int, adopted: int = 0) -> list[tuple[int, int, int]]:
        """Return how many connections each source has that has at least `LEAST`."""
        rows = np.flatnonzero(self["client_packets"])
        if adopted and (taken_up := self.labelled(adopted)[rows]).any():
            rows = rows[~taken_up | self._productive(rows)]
        keys = sources(self, rows, (ipv4, ipv6))
        codes, counts = numbers_in(keys.codes)
        many = codes[counts >= LEAST]
        if not len(many):
            return []
        place = np.searchsorted(many, keys.codes)
        place[place == len(many)] = 0
        of_many = np.flatnonzero(many[place] == keys.codes)
        place, rows = place[of_many], rows[of_many]
        first = np.full(len(many), len(self))
        np.minimum.at(first, place, rows)
        totals = np.bincount(place, minlength=len(many))
        good = np.bincount(place[self._productive(rows)], minlength=len(many))
        order = np.argsort(first)
        found = zip(many[order].tolist(), totals[order].tolist(), good[order].tolist(), strict=True)
        return [(keys.key(code), total, productive) for code, total, productive in found]

    def _productive(self, rows: Column) -> Column:
        """Tell of rows what `rstguard.engine.lenient.is_productive` tells of a connection."""
        headers = np.where(self["v6"][rows], HEADERS6, HEADERS4)
        sent: Column = self["client_bytes"][rows] > (
            self["client_packets"][rows] * headers + SYN_MORE
        )
        return sent & (
            self["server_bytes"][rows] > self["server_packets"][rows] * headers + SYN_MORE
        )

    def known(
        self,
        before: Known | None,
        moment: Moment,
        grades: Grades,
        windows: Collection[int] = (),
    ) -> Known:
        """Return the live ones, and what is known of them."""
        seen = before.seen if isinstance(before, ColumnKnown) else None
        return ColumnKnown(self, seen, moment, grades, windows)


def row_of(flow: Flow) -> tuple[int, ...]:
    """Return a connection in the order of `COLUMNS`."""
    original, reply = flow.original, flow.reply
    addresses = (original.source, original.destination, reply.source, reply.destination)
    low = [address & _LOW for address in addresses]
    high = [address >> 64 & _LOW for address in addresses]
    return (
        flow.ident, low[0], low[1], original.source_port, original.destination_port,
        low[2], low[3], reply.source_port, reply.destination_port,
        flow.state, flow.mark, flow.seen_reply,
        flow.client_packets, flow.client_bytes, flow.server_packets, flow.server_bytes,
        flow.age, flow.timeout, flow.zone, flow.labels & _LOW, flow.server_first,
        original.source >= V6, *high, flow.labels >> 64,
    )  # fmt: skip


def _flow(row: tuple[Any, ...]) -> Flow:
    (
        ident, source, destination, source_port, destination_port,
        reply_source, reply_destination, reply_source_port, reply_destination_port,
        state, mark, seen_reply, client_packets, client_bytes, server_packets, server_bytes,
        age, timeout, zone, labels, server_first,
        v6, source_high, destination_high, reply_source_high, reply_destination_high, labels_high,
    ) = row  # fmt: skip
    if v6:
        source |= V6 | source_high << 64
        destination |= V6 | destination_high << 64
        reply_source |= V6 | reply_source_high << 64
        reply_destination |= V6 | reply_destination_high << 64
    return Flow(
        ident, Tuple(source, destination, source_port, destination_port),
        Tuple(reply_source, reply_destination, reply_source_port, reply_destination_port),
        state, mark, seen_reply, client_packets, client_bytes, server_packets, server_bytes,
        age, timeout, zone, labels | labels_high << 64, server_first,
    )  # fmt: skip


def _in(states: Column, wanted: Iterable[int]) -> Column:
    table = np.zeros(256, bool)
    table[list(wanted)] = True
    found: Column = table[states]
    return found
