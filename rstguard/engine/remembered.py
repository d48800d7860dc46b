"""What sweeps remember of each live connection, in columns.  Needs numpy.

The rules by which it goes on from one sweep to the next are those of `rstguard.engine.listed`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.grouping import Rows
from rstguard.engine.lenient import HEADERS4, HEADERS6
from rstguard.engine.pace import ACKED, LEAST4, LEAST6, LEAST_DATA, SEGMENT
from rstguard.engine.ruleset import SECOND
from rstguard.engine.table import Moment

Column = NDArray[Any]

_NAMES = ("source", "destination", "source_port", "destination_port", "zone")
_OF_V6 = ("v6", "source_high", "destination_high")


class Remembered:
    """Columns, of one length: when a connection began and last changed, and what it had then.

    Connections are found again by the kernel's number of them and their ports, sorted, and taken
    for the same if addresses and zone are.
    """

    _order: Column
    _number: Column

    def __init__(
        self,
        table: Rows,
        rows: Column,
        before: Remembered | None,
        moment: Moment,
        windows: Collection[int] = (),
    ) -> None:
        """Note these rows of a table."""
        now, swept = moment
        ages = table["age"][rows]
        self._name = {name: table[name][rows] for name in _NAMES}
        self._name |= {name: table[name][rows] for name in _OF_V6 if table.any_v6}
        self._sort(table["ident"][rows], before)
        self.packets = table["client_packets"][rows] + table["server_packets"][rows]
        self._bytes = table["client_bytes"][rows] + table["server_bytes"][rows]
        self._sent = [table[f"client_{name}"][rows] for name in ("packets", "bytes")]
        self._expires = now + table["timeout"][rows].astype("i8") * SECOND
        self.began = np.where(ages >= 0, now - ages, now)
        self.changed = np.full(len(rows), now, "i8")
        # An older connection moved most of its bytes before anybody looked.
        young = (ages >= 0) & (self.began >= swept)
        self.news = np.where(young, self._bytes, 0)
        self._sent_news = [np.where(young, one, 0) for one in self._sent]
        nothing = np.zeros(len(rows), "i8")
        first = np.stack((self.began, nothing, nothing) * 2)
        self.past = {window: first.copy() for window in windows}
        """As `rstguard.engine.listed.Past`, a row for each of its parts."""
        if before is not None:
            self._go_on(before, ages, moment)
        packets, sent = self._sent_news
        self.small = _small(packets, sent, self.news, table["v6"][rows])
        del self._sent_news
        for window, past in self.past.items():
            due = np.flatnonzero(now - past[3] >= window)
            past[:3, due] = past[3:, due]
            past[3, due] = now
            past[4, due] = table["client_bytes"][rows][due]
            past[5, due] = table["server_bytes"][rows][due]
        self._count_once()

    def _sort(self, idents: Column, before: Remembered | None) -> None:
        ports = self._name["source_port"].astype("u8") << np.uint64(16)
        number = idents.astype("u8") << np.uint64(32) | ports | self._name["destination_port"]
        self._listed = number
        if before is not None and np.array_equal(number, before._listed):
            self._order, self._number = before._order, before._number
            return
        self._order = np.argsort(number)
        self._number = number[self._order]

    def _go_on(self, before: Remembered, ages: Column, moment: Moment) -> None:
        now, swept = moment
        here, there = self._again(before)
        last_packets, last_began = before.packets[there], before.began[there]
        # A client that closes by a RST may use its ports again at once: the kernel then makes a new
        # entry, which may bear the old one's number, but not its time.
        other = self.packets[here] < last_packets
        age = ages[here]
        other |= (age >= 0) & (now - age > swept) & (swept > last_began)
        if other.any():
            here, there = here[~other], there[~other]
            last_packets, last_began = last_packets[~other], last_began[~other]
        packets, expires = self.packets[here], self._expires[here]
        spoke = packets != last_packets
        # A connection older than the accounting has no counters; its timer tells of packets too.
        spoke |= (packets == 0) & (expires - before._expires[there] > 2 * SECOND)
        moved = self._bytes[here] - before._bytes[there]
        self.began[here] = last_began
        for window, past in self.past.items():
            if window in before.past:
                past[:, here] = before.past[window][:, there]
            else:
                past[0, here] = past[3, here] = last_began
        self.changed[here] = np.where(spoke, now, before.changed[there])
        self.news[here] = np.where(spoke, moved, 0)
        silent, then = here[~spoke], there[~spoke]
        for news, own, last in zip(self._sent_news, self._sent, before._sent, strict=True):
            news[here] = np.where(spoke, own[here] - last[there], 0)
            own[silent] = last[then]
        self._bytes[silent] = before._bytes[then]
        self._expires[silent] = before._expires[then]

    def _again(self, before: Remembered) -> tuple[Column, Column]:
        """Return which were there before, here and there."""
        if not len(before._number):
            return self._order[:0], before._order
        if self._order is before._order:  # as at rest: the same in the same order
            here: Column = np.arange(len(self._order))
            if self._same(here, before, here).all():
                return here, here
        place = np.searchsorted(before._number, self._number)
        place[place == len(before._number)] = 0
        found = before._number[place] == self._number
        # In the order of the table, which hardly changes: memory is then read from end to end.
        last = np.full(len(self._number), -1)
        last[self._order[found]] = place[found]
        here = np.flatnonzero(last >= 0)
        place = last[here]
        there = before._order[place]
        same = self._same(here, before, there)
        # Others may have the same number and ports: hardly ever any.
        for one in np.flatnonzero(~same).tolist():
            at = int(place[one]) + 1
            while at < len(before._number) and before._number[at] == before._number[place[one]]:
                if self._same(here[one : one + 1], before, before._order[at : at + 1])[0]:
                    there[one], same[one] = before._order[at], True
                    break
                at += 1
        return (here, there) if same.all() else (here[same], there[same])

    def _same(self, here: Column, before: Remembered, there: Column) -> Column:
        same = np.ones(len(here), bool)
        for name in self._name.keys() | before._name.keys():
            mine, other = self._name.get(name), before._name.get(name)
            same &= (0 if mine is None else mine[here]) == (0 if other is None else other[there])
        return same

    def _count_once(self) -> None:
        """Count what was moved once, where the kernel has shown a connection twice."""
        twice = np.flatnonzero(self._number[1:] == self._number[:-1])
        one, other = self._order[twice], self._order[twice + 1]
        same = self._same(one, self, other)
        self.news[np.maximum(one, other)[same]] = 0
        self.small[np.maximum(one, other)[same]] = 0


def _small(packets: Column, client: Column, total: Column, v6: Column) -> Column:
    """Return of each row what `rstguard.engine.pace.small_packets` tells of a connection."""
    server = total - client
    found: Column = np.zeros(len(packets), "i8")
    at = np.flatnonzero((packets > 0) & (server >= 0))
    client, server, v6 = client[at], server[at], v6[at]
    packets = np.minimum(packets[at], client // np.where(v6, LEAST6, LEAST4))
    bare = client - np.where(v6, HEADERS6, HEADERS4) * packets
    beyond = packets - (client + server) // SEGMENT
    uploaded = client // SEGMENT * (client // np.maximum(packets, 1)) // SEGMENT
    requests = np.minimum(packets - uploaded - server // ACKED, bare // LEAST_DATA)
    found[at] = np.where(packets > 0, np.maximum(np.maximum(beyond, requests), 0), 0)
    return found
