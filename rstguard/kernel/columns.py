"""Entries of the connection table as columns: many netlink messages at once.  Needs numpy.

As in `rstguard.kernel.entry`, whose `fields` is the reference: for each shape of message it is
noted where everything stands, and of every other message it is checked that all its attribute
headers are the same bytes.  What has one of too many shapes is read by `fields`, one by one.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.columns import COLUMNS, Columns, row_of
from rstguard.kernel import KernelError, entry
from rstguard.kernel.clock import Ages
from rstguard.kernel.netlink import (
    CHUNK,
    HEADER,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSG_FIRST_OWN,
    PATIENCE,
    Netlink,
    Request,
    interrupted,
    raise_failed,
    unreadable,
)

Column = NDArray[Any]

_SLAB: Final = 1 << 20
"""Bytes of messages that are read as one: they fit into a processor's cache."""
_LENGTH: Final = struct.Struct("<I")
_MOST_SHAPES: Final = 8
"""Shapes known of each length."""
_SHORT, _WALK = 32, 512
"""Where so few messages in a row have the same length, so many are looked at one by one."""
_COLUMN_OF: Final = {
    2: "source_port", 3: "destination_port", 6: "reply_source_port", 7: "reply_destination_port",
    10: "state", 11: "mark", 12: "ident", 13: "timeout", 14: "client_packets", 15: "client_bytes",
    16: "server_packets", 17: "server_bytes", 18: "age", 19: "zone",
}  # fmt: skip
"""Slots of `entry.Fields` that are a column as they are; `age` is a time stamp at first."""
_ADDRESSES: Final = {0: "source", 1: "destination", 4: "reply_source", 5: "reply_destination"}
_PROTOCOL, _STATUS, _LABELS, _FLAGS = 8, 9, 20, 21


class _Shape:
    """Where the values stand in messages of one shape, and what their headers are."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data) + 3 & ~3
        walked = [value for _, value, _ in entry.walk(data, entry.HEADERS, len(data))]
        self._headers = [
            (value // 4 - 1, int.from_bytes(data[value - 4 : value], "little")) for value in walked
        ]
        self._family = data[entry.FAMILY_AT]
        self._places = entry.places(data, 0, len(data))

    def fits(self, words: Column) -> Column:
        """Tell of each message, a row of words, whether it has this shape."""
        found: Column = words[:, entry.FAMILY_AT // 4] & 0xFF == self._family
        for place, header in self._headers:
            found &= words[:, place] == header
        return found

    def read(self, words: Column, into: dict[str, Column], at: Column | slice) -> None:
        """Write what some messages say into columns, `at` rows of theirs."""

        def value(slot: int, kind: str, offset: int = 0) -> Column:
            place = self._places[slot][0] + offset
            return np.ndarray((len(words),), kind, words, place, (self.size,))

        for slot, (start, end) in self._places.items():
            kind = f">u{end - start}"
            if slot in _COLUMN_OF:
                into[_COLUMN_OF[slot]][at] = value(slot, kind)
            elif slot in _ADDRESSES and end - start == 16:
                into[_ADDRESSES[slot] + "_high"][at] = value(slot, ">u8")
                into[_ADDRESSES[slot]][at] = value(slot, ">u8", 8)
            elif slot in _ADDRESSES:
                into[_ADDRESSES[slot]][at] = value(slot, kind)
            elif slot == _STATUS:
                into["seen_reply"][at] = value(slot, kind) & entry.IPS_SEEN_REPLY != 0
            elif slot == _LABELS:
                into["labels"][at] = value(slot, "<u8")
                into["labels_high"][at] = value(slot, "<u8", 8)
            elif slot == _FLAGS:
                into["server_first"][at] = value(slot, kind) >> 8 & entry.CLOSE_INIT != 0
        into["v6"][at] = self._family == entry.AF_INET6

    def tcp(self, words: Column) -> Column:
        """Tell of each message whether it is about TCP."""
        found: Column = words[:, self._places[_PROTOCOL][0] // 4] & 0xFF == entry.TCP
        return found


class _Growing:
    """Columns that grow as rows come."""

    def __init__(self, expected: int) -> None:
        self.rows = 0
        self._gone: list[Column] = []
        self.columns = {name: np.zeros(expected, kind) for name, kind in COLUMNS.items()}

    def room_for(self, more: int) -> None:
        """Have room for more rows."""
        self.rows += more
        have = len(self.columns["ident"])
        if self.rows > have:
            wanted = max(self.rows, 2 * have)
            for name, column in self.columns.items():
                grown = np.zeros(wanted, column.dtype)  # its pages take memory only once written
                grown[:have] = column
                self.columns[name] = grown

    def read(self, shape: _Shape, words: Column, at: Column) -> None:
        """Read messages of one shape into these rows, which ascend."""
        in_a_row = at[-1] - at[0] == len(at) - 1
        shape.read(words, self.columns, slice(int(at[0]), int(at[-1]) + 1) if in_a_row else at)
        tcp = shape.tcp(words)
        if not tcp.all():  # the kernel leaves them out, from 5.8 on
            self._gone.append(at[~tcp])

    def read_odd(self, data: bytes, at: int) -> None:
        """Read one message into this row, attribute by attribute."""
        flow = entry.flow_of(entry.fields(data, 0, len(data)), int)
        if flow is None:
            self._gone.append(np.array([at]))
            return
        stamped = flow._replace(age=max(flow.age, 0))
        for column, number in zip(self.columns.values(), row_of(stamped), strict=True):
            column[at] = number

    def finished(self, ages: Ages) -> Columns:
        """Return them, with ages for time stamps, and without what is not TCP."""
        columns = {name: column[: self.rows] for name, column in self.columns.items()}
        if self._gone:
            kept = np.ones(self.rows, bool)
            kept[np.concatenate(self._gone)] = False
            columns = {name: column[kept] for name, column in columns.items()}
        columns["age"] = _ages(columns["age"], ages)
        return Columns(columns)


def _ages(stamps: Column, ages: Ages) -> Column:
    unset = ages.unset
    if unset is None:
        return np.array([ages.of(stamp) if stamp else -1 for stamp in stamps.tolist()], "i8")
    return np.where(stamps != 0, np.maximum(unset - stamps, 0), -1)


class ColumnReader(Netlink):
    """Reads the table into columns, by a socket of its own that never waits."""

    def __init__(self) -> None:
        super().__init__()
        self._socket.settimeout(0)
        self._slab = bytearray(_SLAB + CHUNK)
        self._shapes: dict[int, list[_Shape]] = {}
        self._expected = 1 << 12

    def read(self, requests: Iterable[Request], ages: Ages) -> Columns:
        """Return the TCP entries that are the answers to some dump requests, in their order.

        Raises:
            KernelError: a dump failed, was interrupted (NLM_F_DUMP_INTR) or overran the socket.
            ValueError: a message is damaged.
        """
        self._shapes = {}
        made = _Growing(self._expected)
        for request in requests:
            self._read_one(request, made)
        self._expected = made.rows + made.rows // 16 + (1 << 12)
        return made.finished(ages)

    def _read_one(self, request: Request, made: _Growing) -> None:
        number = self._begin_dump(request)
        changed = done = False
        try:
            while not done:
                end = self._fill()
                messages = _Messages(self._slab, end, number)
                changed = changed or messages.interrupted
                done = messages.done
                made.room_for(messages.entries)
                for size, words, places in messages.of_one_size():
                    self._take(size, words, places + (made.rows - messages.entries), made)
                if not done and end < _SLAB:
                    self._wait()
        finally:
            if not done:
                self._read_up(number)
        if changed:
            raise interrupted()

    def _fill(self) -> int:
        """Fill the slab with what is there; return how many bytes that is.

        The kernel writes the next part of a dump while one is received (netlink_recvmsg), so there
        is something until the end, but for a moment in which it has no memory.
        """
        end, slab = 0, memoryview(self._slab)
        while end < _SLAB:
            try:
                got = self._socket.recv_into(slab[end:], CHUNK, socket.MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError as error:
                raise unreadable(error) from error
            if got > CHUNK:
                raise KernelError(f"The kernel sent a netlink message of more than {CHUNK} bytes.")
            end += got
        return end

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(PATIENCE * 1000):
            raise unreadable(TimeoutError())

    def _take(self, size: int, words: Column, at: Column, made: _Growing) -> None:
        """Read messages of one size into these rows."""
        shapes = self._shapes.setdefault(size, [])
        number = 0
        while len(words):
            if number == len(shapes):
                if number == _MOST_SHAPES:
                    break
                shapes.append(_Shape(words[0].tobytes()[:size]))
            fits = shapes[number].fits(words)
            if fits.all():
                made.read(shapes[number], words, at)
                return
            if fits.any():
                made.read(shapes[number], words[fits], at[fits])
                words, at = words[~fits], at[~fits]
            number += 1
        for row, place in zip(words, at.tolist(), strict=True):
            made.read_odd(row.tobytes()[:size], place)


class _Messages:
    """The messages in a slab: `entries` of them belong to the dump of this number.

    Raises:
        KernelError: a length leads out of the slab, or the dump failed.
    """

    def __init__(self, slab: bytearray, end: int, number: int) -> None:
        self._slab, self._end = slab, end
        self.interrupted = self.done = False
        self._count = 0
        self._found: dict[int, tuple[list[Column], list[Column]]] = {}
        self._split()
        kept = np.ones(self._count, bool)
        self._groups: list[tuple[int, Column, Column]] = []
        for size, (places, ordinals) in self._found.items():
            words, order = self._rows(size, np.concatenate(places)), np.concatenate(ordinals)
            ours = words[:, 2] == number
            self.interrupted |= bool((words[ours, 1] >> 16 & NLM_F_DUMP_INTR).any())
            entries = ours & (words[:, 1] & 0xFFFF >= NLMSG_FIRST_OWN)
            if not entries.all():
                kept[order[~entries]] = False
                self._look_at(words[ours & ~entries], size)
                words, order = words[entries], order[entries]
            self._groups.append((size, words, order))
        self._rank = np.cumsum(kept) - 1
        self.entries = int(np.count_nonzero(kept))

    def of_one_size(self) -> Iterator[tuple[int, Column, Column]]:
        """Yield a length, the entries of that length as rows of words, and their places."""
        for size, words, order in self._groups:
            yield size, words, self._rank[order]

    def _split(self) -> None:
        """Find where messages are: often many in a row have one length."""
        words = np.frombuffer(self._slab, "<u4", self._end // 4)
        at, end = 0, self._end // 4
        while at < end:
            size = int(words[at])
            step = size + 3 >> 2
            if size < HEADER.size or at + step > end:
                raise KernelError(
                    f"The kernel sent a netlink message that is cut off at byte {4 * at}."
                )
            count = (end - at) // step
            same = words[at : at + count * step : step] == size
            if not same.all():
                count = int(same.argmin())
            self._note(size, np.arange(at, at + count * step, step))
            at += count * step
            if count < _SHORT:
                at = self._walk(at, end)

    def _walk(self, at: int, end: int) -> int:
        """Look at some messages one by one; return where the next is."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        length_at = _LENGTH.unpack_from
        for ordinal in range(self._count, self._count + _WALK):
            if at >= end:
                break
            (size,) = length_at(self._slab, 4 * at)
            step = size + 3 >> 2
            if size < HEADER.size or at + step > end:
                break  # what comes next says so
            places, ordinals = found.setdefault(size, ([], []))
            places.append(at)
            ordinals.append(ordinal)
            at += step
        for size, (places, ordinals) in found.items():
            known = self._found.setdefault(size, ([], []))
            known[0].append(np.array(places))
            known[1].append(np.array(ordinals))
            self._count += len(places)
        return at

    def _note(self, size: int, places: Column) -> None:
        known = self._found.setdefault(size, ([], []))
        known[0].append(places)
        known[1].append(np.arange(self._count, self._count + len(places)))
        self._count += len(places)

    def _rows(self, size: int, places: Column) -> Column:
        """Return the messages of one size as rows of words; a copy unless all are in a row."""
        step = size + 3 >> 2
        if places[-1] - places[0] == (len(places) - 1) * step:
            start = 4 * int(places[0])
            words = np.frombuffer(self._slab, "<u4", len(places) * step, start)
            return words.reshape(-1, step)
        starts = self._end // 4 - step + 1
        anywhere: Column = np.ndarray(starts, f"V{4 * step}", self._slab, 0, 4)
        return anywhere[places].view("<u4").reshape(-1, step)

    def _look_at(self, words: Column, size: int) -> None:
        """Look at what is no entry: the end of the dump, or why it failed."""
        for row in words:
            if int(row[1]) & 0xFFFF in (NLMSG_ERROR, NLMSG_DONE):
                self.done = True
                raise_failed(row.tobytes(), 0, size)
