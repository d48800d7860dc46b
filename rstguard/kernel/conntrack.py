"""The kernel's connection table: read it whole or by name, and mark connections in it.

Own netlink code because it was measured: 100,000 entries take the general-purpose library 6.7 s.
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol

from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.listed import Listed
from rstguard.engine.table import Table
from rstguard.kernel import KernelError, entry
from rstguard.kernel.clock import Ages
from rstguard.kernel.netlink import (
    HEADER,
    NFGEN,
    NLM_F_CREATE,
    Answer,
    Netlink,
    Request,
    attribute,
    attributes,
)
from rstguard.kernel.seam import Lost

_SUBSYSTEM: Final = 1 << 8
_NEW: Final = _SUBSYSTEM | 0
_GET: Final = _SUBSYSTEM | 1
_DELETE: Final = _SUBSYSTEM | 2
_GET_STATS: Final = _SUBSYSTEM | 5
_GET_STATS_CPU: Final = _SUBSYSTEM | 4
_STATS_ENTRIES: Final = 1
# enum ctattr_stats_cpu (linux/netfilter/nfnetlink_conntrack.h), in the order of `Lost`
_LOST: Final = (9, 10, 11, 15)

_FAMILIES: Final = entry.AF_INET, entry.AF_INET6

_PATH: Final = Tuple(0xC0000201, 0xC0000202, 1, 1)  # 192.0.2.0/24, RFC 5737
_BACK: Final = Tuple(0xC0000202, 0xC0000201, 1, 1)
_NOBODYS: Final = Flow(0, _PATH, _BACK, TcpState.CLOSE, 0, False, 0, 0, 0, 0, -1, 5, 0)

GONE: Final = errno.ENOENT
"""What `set_mark` and `delete` return for a connection that is no longer in the table."""


class _Columns(Protocol):
    """The part of `rstguard.kernel.columns.ColumnReader` that is needed here."""

    def read(self, requests: Iterable[Request], ages: Ages) -> Table:
        """Return the entries that are the answers to some dump requests."""

    def close(self) -> None:
        """Close the socket."""


class Conntrack:
    """The connection table of the network namespace of the thread that makes this object.

    Times: ages are in nanoseconds.  The kernel stamps with the clock on the wall, whose steps are
    known (`rstguard.kernel.clock`); with `now_ns` they are against that time of it.

    Raises:
        KernelError: no netfilter netlink here, or privileges are missing.
    """

    def __init__(self, ages: Ages | None = None, columns: bool = False) -> None:
        """`columns`: `whole` gives them, where numpy is there; once confined it is too late."""
        self._ages = ages or Ages()
        self._reader_of_columns = _reader_of_columns() if columns else None
        self._netlink = Netlink()
        self._free = [Netlink()]
        """Sockets for dumps, no more than ever were read from at once: a confined process has only
        those that it had before."""

    def close(self) -> None:
        """Close the sockets."""
        for netlink in (self._netlink, *self._free, self._reader_of_columns):
            if netlink:
                netlink.close()

    def __enter__(self) -> Conntrack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dump(
        self,
        mark: int = 0,
        mask: int = 0,
        family: int = 0,
        now_ns: int | None = None,
        assured: bool = False,
    ) -> Iterator[Flow]:
        """Yield the TCP connections whose mark, under `mask`, equals `mark`.

        `family` is AF_INET, AF_INET6, or 0 for both.  `assured` leaves out those that never were
        established; a kernel that cannot tell yields them too.  The kernel filters.  Connections
        that come or go meanwhile may or may not be among them.

        Raises:
            KernelError: the reading failed or is incomplete; what was yielded is right.
        """
        reader = self._reader(now_ns)
        more = entry.assured_only() if assured else b""
        for request in _requests(mark, mask, family, more):
            yield from self._dump(reader, request)

    def whole(self, mark: int, mask: int) -> Table:
        """Return the TCP connections whose mark, under `mask`, equals `mark`, for a sweep.

        They are the same as of `dump`, in the same order; columns, if they were asked for.

        Raises:
            KernelError: the reading failed or is incomplete.
        """
        if self._reader_of_columns is None:
            return Listed(self.dump(mark, mask))
        self._ages.look()
        try:
            return self._reader_of_columns.read(_requests(mark, mask), self._ages)
        except ValueError as error:
            raise _not_understood(error) from error

    def _reader(self, now_ns: int | None) -> entry.Reader:
        if now_ns is not None:
            return entry.Reader(lambda began: max(now_ns - began, 0))
        self._ages.look()
        return entry.Reader(self._ages.of)

    def _dump(self, reader: entry.Reader, request: Request) -> Iterator[Flow]:
        # A socket of its own: the caller may mark connections while the dump goes on, or leave it.
        netlink = self._free.pop() if self._free else Netlink()
        read = reader.flow
        try:
            for chunk, spans in netlink.dump(request):
                for start, end in spans:
                    flow = read(chunk, start, end)
                    if flow is not None:
                        yield flow
        except ValueError as error:
            raise _not_understood(error) from error
        finally:
            self._free.append(netlink)

    def read(self, flows: Sequence[Flow], now_ns: int | None = None) -> list[Flow | None]:
        """Return each connection as it is now, or None if it is no longer in the table.

        A connection is found by tuple and zone: compare `ident` to know whether it is the same.

        Raises:
            KernelError: the kernel could not be asked, or refused for another reason than absence.
        """
        reader = self._reader(now_ns)
        answers = self._ask(_GET, flows, b"")
        return [self._found(reader, answer) for answer in answers]

    def find(self, path: Tuple) -> Flow | None:
        """Return the connection that has this tuple in either direction, in zone 0; or None.

        Raises:
            KernelError: the kernel could not be asked, or refused for another reason than absence.
        """
        (found,) = self.read([_NOBODYS._replace(original=path)])
        return found

    @staticmethod
    def _found(reader: entry.Reader, answer: Answer) -> Flow | None:
        if answer.error == GONE or (not answer.message and not answer.error):
            return None
        if answer.error:
            raise KernelError(
                f"The kernel refused to show a connection: {os.strerror(answer.error)}."
            )
        try:
            return reader.flow(answer.message, 0, len(answer.message))
        except ValueError as error:
            raise KernelError(f"A connection could not be understood: {error}.") from error

    def set_mark(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Give connections the mark (old & ~mask) | bits; return an errno for each, 0 for success.

        The kernel computes the new mark itself (ctnetlink_change_mark), so the bits outside `mask`
        stay whatever they are at that moment.  `GONE` means: no longer in the table.

        Raises:
            ValueError: `bits` has bits that `mask` lacks.
            KernelError: the kernel could not be asked.
        """
        if bits & ~mask:
            raise ValueError(f"bits 0x{bits:x} outside mask 0x{mask:x}")
        return [a.error for a in self._ask(_NEW, flows, entry.mark_attributes(bits, mask))]

    def set_liberal(self, flows: Sequence[Flow]) -> list[int]:
        """Have the tracker take segments of any number of these connections; an errno for each.

        It cures a connection whose window a forged RST has moved in the tracker.

        Raises:
            KernelError: the kernel could not be asked.
        """
        return [answer.error for answer in self._ask(_NEW, flows, entry.liberal_attributes())]

    def reopen(self, flows: Sequence[Flow], seconds: int, bits: int, mask: int) -> list[int]:
        """Call closed connections established again, as before a RST that their ends did not take.

        Each lives for `seconds` without a segment, and has its mark changed as by `set_mark`.

        Raises:
            KernelError: the kernel could not be asked.
        """
        more = entry.reopened_attributes(seconds) + entry.mark_attributes(bits, mask)
        return [answer.error for answer in self._ask(_NEW, flows, more)]

    def can_reopen(self) -> bool:
        """Try whether this kernel reopens a connection, by one of two addresses that nobody has.

        Raises:
            KernelError: the kernel could not be asked.
        """
        one = _NOBODYS
        make = Request(_NEW, entry.AF_INET, entry.closed_attributes(one), flags=NLM_F_CREATE)
        if self._netlink.transact([make])[0].error:
            return False
        self.reopen([one], one.timeout, 0, 0)
        (now,) = self.read([one])
        if now is not None:
            self.delete([now])
        return now is not None and now.state == TcpState.ESTABLISHED

    def set_timeout(self, flows: Sequence[Flow], seconds: int) -> list[int]:
        """Have connections forgotten so much later; an errno for each.

        The next packet sets the time anew, to what the tracker gives the connection's state.

        Raises:
            KernelError: the kernel could not be asked.
        """
        attributes = entry.timeout_attributes(seconds)
        return [answer.error for answer in self._ask(_NEW, flows, attributes)]

    def set_labels(self, flows: Sequence[Flow], bits: int, mask: int) -> list[int]:
        """Give connections the labels (old & ~mask) | bits; return an errno for each, or 0.

        `GONE` means: no longer in the table.  ENOSPC: it began while no rule asked for labels, and
        has no room for any (nf_connlabels_replace).

        Raises:
            ValueError: `bits` has bits that `mask` lacks.
            KernelError: the kernel could not be asked.
        """
        if bits & ~mask:
            raise ValueError(f"labels 0x{bits:x} outside mask 0x{mask:x}")
        return [a.error for a in self._ask(_NEW, flows, entry.labels_attributes(bits, mask))]

    def delete(self, flows: Sequence[Flow]) -> list[int]:
        """Take connections out of the table; return an errno for each, 0 for success.

        The kernel compares `ident` too, so a newer connection of the same name stays (GONE).

        Raises:
            KernelError: the kernel could not be asked.
        """
        requests = [
            Request(
                _DELETE,
                entry.family_of(flow.original),
                entry.name_attributes(flow) + attribute(entry.ID, flow.ident.to_bytes(4, "big")),
            )
            for flow in flows
        ]
        return [answer.error for answer in self._netlink.transact(requests)]

    def count(self) -> int:
        """Return how many entries the table holds, of all protocols.

        Raises:
            KernelError: the kernel could not be asked or does not say.
        """
        (answer,) = self._netlink.transact([Request(_GET_STATS, 0, b"")])
        if answer.message:
            for path, start, end in entry.walk(answer.message, entry.HEADERS, len(answer.message)):
                if path == (_STATS_ENTRIES,):
                    return int.from_bytes(answer.message[start:end], "big")
        raise KernelError(
            "The kernel does not say how many connections it tracks: "
            "load the module with `modprobe nf_conntrack_netlink`."
        )

    def lost(self) -> Lost:
        """Return what the table could not take in, over all processors, since the machine began.

        Raises:
            KernelError: the kernel could not be asked.
        """
        sums = [0] * len(_LOST)
        for chunk, spans in self._netlink.dump(Request(_GET_STATS_CPU, 0, b"")):
            for start, end in spans:
                found = attributes(chunk[start + HEADER.size + NFGEN.size : end])
                for place, kind in enumerate(_LOST):
                    sums[place] += int.from_bytes(found.get(kind, b""), "big")
        return Lost(*sums)

    def _ask(self, kind: int, flows: Sequence[Flow], attributes: bytes) -> list[Answer]:
        return self._netlink.transact(
            [
                Request(
                    kind, entry.family_of(flow.original), entry.name_attributes(flow) + attributes
                )
                for flow in flows
            ]
        )


def _requests(mark: int, mask: int, family: int = 0, more: bytes = b"") -> list[Request]:
    """Return what asks for the connections that have a mark.

    The kernel leaves out what is not TCP for one family at a time (EOPNOTSUPP for both), and each
    request is a walk through the whole table: 5 ms for 262,144 empty buckets.  Hardly anything but
    TCP bears bits of ours, so whoever asks for some is given it as well, and does not take it.
    """
    by_mark = (entry.mark_attributes(mark, mask) if mask else b"") + more
    if mark and not family:
        return [Request(_GET, 0, by_mark)]
    wanted = (family,) if family else _FAMILIES
    return [Request(_GET, one, entry.tcp_only() + by_mark) for one in wanted]


def _not_understood(error: ValueError) -> KernelError:
    return KernelError(
        f"The kernel's connection table could not be understood ({error}): "
        "please report this with the kernel's version."
    )


def _reader_of_columns() -> _Columns | None:
    """Return what reads the table into columns, or None where there is no numpy."""
    # Its library of linear algebra, which nothing here uses, would start a thread for each core:
    # they would not be confined.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        module = importlib.import_module("rstguard.kernel.columns")
    except ImportError:
        return None
    reader: _Columns = module.ColumnReader()
    return reader
