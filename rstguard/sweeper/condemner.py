"""Kill connections for certain: condemn, provoke, and confirm from the kernel's table.

A connection is condemned by mark bits: from then on the kernel answers every segment of a condemned
end with a RST that this end must accept (RFC 5961; `rstguard.kernel.chains`).  A busy end thereby
dies by its own next segment.  A silent end is provoked: a probe that seems to come from its peer
makes it speak (`rstguard.engine.segment.probe`).  `rstguard.sweeper.cases` says what counts as
proof.

Each round asks the kernel for the pending connections by name, not by a dump: this costs the same
per entry, is not slowed by the others in the table, and tells absence from a lost mark.
"""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple, Protocol

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.segment import probe
from rstguard.engine.verdict import Ends
from rstguard.kernel import condemning
from rstguard.kernel.inject import Sender, send_each, way_of
from rstguard.kernel.marks import Labels, Marks
from rstguard.sweeper.cases import (
    MILLISECOND,
    OVER,
    STRICT_AFTER,
    Case,
    Outcome,
    Result,
    Target,
    opening_of,
    probe_paths,
)

__all__ = ["Condemner", "Outcome", "Progress", "Result", "Target", "select"]

DEADLINE: Final = 5000 * MILLISECOND
FIRST_LOOK: Final = MILLISECOND
SLOWEST_LOOK: Final = 50 * MILLISECOND
AGAIN_AFTER: Final = 600 * MILLISECOND
AGAIN_ROUNDS: Final = 3
"""How often, and at what intervals, to probe ends that were told, in case the RST was lost on its
way: an end that lives answers, and is told again."""
MOST_PENDING: Final = 65_536
MOST_AT_ONCE: Final = 4_096
"""New cases per step: about 0.2 s of work, so that the caller's loop goes on."""


class Progress(NamedTuple):
    """What one step finished, how much is pending, and when (monotonic ns) to step again."""

    results: tuple[Result, ...]
    pending: int
    next_step_at: int | None


class Table(condemning.Table, Protocol):
    """The part of `rstguard.kernel.conntrack.Conntrack` that is needed here."""

    def read(self, flows: Sequence[Flow], now_ns: int | None = None) -> list[Flow | None]:
        """Return each connection as it is now, or None."""

    def delete(self, flows: Sequence[Flow]) -> list[int]:
        """Forget connections; return an errno for each."""


_Item = tuple[tuple[Tuple, int], Case]


class Condemner:
    """Kills connections, many at a time; `start` takes them, `step` does all work.

    At most `most` are pending; what is beyond is reported as REFUSED.  Times are monotonic ns,
    given by the caller.  After its case is closed a connection stays condemned for some seconds: an
    end that missed its RST is provoked again and gets another.  Then a connection of which both
    ends were told is taken out of the table, so that a new one of the same addresses and ports is
    not refused.
    """

    def __init__(
        self,
        table: Table,
        sender: Sender,
        marks: Marks,
        deadline: int = DEADLINE,
        most: int = MOST_PENDING,
        draw: Callable[[], int] | None = None,
        labels: Labels | None = None,
    ) -> None:
        self._labels = labels or Labels()
        self._table = table
        self._sender = sender
        self._marks = marks
        self._deadline = deadline
        self._most = most
        self._draw = draw or partial(random.getrandbits, 32)
        self._cases: dict[tuple[Tuple, int], Case] = {}
        self._finished: list[Result] = []
        self._again: deque[tuple[int, int, Target]] = deque(maxlen=most)
        self._look = FIRST_LOOK
        self.next_step_at: int | None = None

    @property
    def pending(self) -> int:
        """How many cases are open."""
        return len(self._cases)

    def start(self, targets: Iterable[Target], now: int) -> None:
        """Take targets; those already pending are merged, told ends added.  Does no I/O."""
        for target in targets:
            key = (target.flow.original, target.flow.zone)
            case = self._cases.get(key)
            if case is not None:
                if case.target.flow.ident == target.flow.ident:
                    self._merge(case, target)
                    continue
                self._close(key, case.absent(now))  # its name belongs to a newer connection
            case = Case(target, now, now + self._deadline, self._marks, self._labels)
            if len(self._cases) >= self._most:
                detail = f"not condemned, as {self._most} others are pending; try again"
                self._finished.append(case.result(Outcome.REFUSED, now, detail))
                continue
            self._cases[key] = case
        if self._cases or self._finished:
            self._look = FIRST_LOOK
            self.next_step_at = now

    @staticmethod
    def _merge(case: Case, target: Target) -> None:
        if target.ends is not case.target.ends and case.target.ends is not Ends.BOTH:
            case.target = case.target._replace(ends=Ends.BOTH)
            case.condemned = False
            case.probes = 0
            case.condemned_at = 0

    def step(self, now: int) -> Progress:
        """Condemn what is new, look what has died, provoke what is silent.

        Does nothing before `next_step_at`.

        Raises:
            KernelError: the kernel's table could not be asked; nothing is lost, step again.
        """
        if self.next_step_at is None or now < self.next_step_at:
            return Progress((), len(self._cases), self.next_step_at)
        self.next_step_at = now + self._look
        fresh = [item for item in self._cases.items() if not item[1].condemned][:MOST_AT_ONCE]
        self._judge([item for item in self._cases.items() if item[1].condemned] + fresh, now)
        self._condemn([item for item in fresh if item[0] in self._cases], now)
        self._provoke(now)
        results, self._finished = tuple(self._finished), []
        self.next_step_at = self._next_step(now)
        self._look = min(self._look * 2, SLOWEST_LOOK)
        return Progress(results, len(self._cases), self.next_step_at)

    def _next_step(self, now: int) -> int | None:
        times = [self._again[0][0]] if self._again else []
        if self._cases:
            times.append(now + self._look)
        return min(times, default=None)

    def _judge(self, items: list[_Item], now: int) -> None:
        seen = self._table.read([case.target.flow for _, case in items]) if items else []
        strangers = []
        for (key, case), flow in zip(items, seen, strict=True):
            result = case.judge(flow, now)
            if result is not None:
                self._close(key, result)
            elif flow is not None and flow.mark & case.bits != case.bits:
                case.condemned = False  # new, or other software took the bits away
            if flow is not None and case.condemned and flow.ident != case.target.flow.ident:
                strangers.append(flow)
        # Between our reading and our marking, a new connection took the old one's place.
        if strangers:
            self._table.set_mark(strangers, *self._marks.uncondemned)

    def _condemn(self, items: list[_Item], now: int) -> None:
        for ends, bits in self._marks.condemned_for.items():
            group = [(key, case) for key, case in items if case.target.ends is ends]
            flows = [case.target.flow for _, case in group]
            codes = self._mark(flows, bits) if flows else []
            for (key, case), code in zip(group, codes, strict=True):
                if code == 0:
                    case.condemned = True
                    case.condemned_at = case.condemned_at or now
                elif code == errno.ENOENT:
                    self._close(key, case.absent(now))
                else:
                    detail = f"the kernel refused to mark it ({errno.errorcode.get(code, code)})"
                    self._close(key, case.result(Outcome.REFUSED, now, detail))

    def _mark(self, flows: list[Flow], bits: int) -> list[int]:
        return condemning.condemn(self._table, flows, self._labels, bits, bits)

    def _provoke(self, now: int) -> None:
        paths: list[tuple[Tuple, int]] = []
        openings: list[tuple[bytes, int]] = []
        over: list[Flow] = []
        marks = self._marks
        for case in self._cases.values():
            if case.condemned and case.due(now):
                case.probes += 1
                silent = probe_paths(case.target.flow, case.wanted & ~case.rst_sent, marks)
                flow = case.target.flow
                ways = [way_of(path, flow, marks, case.probes) for path in silent]
                paths += zip(silent, ways, strict=True)
                if case.probes > STRICT_AFTER:
                    strict = (opening_of(path, flow, self._draw) for path in silent)
                    openings += zip(strict, ways, strict=True)
        while self._again and self._again[0][0] <= now:
            _, rounds, target = self._again.popleft()
            if rounds > 0:
                self._again.append((now + AGAIN_AFTER, rounds - 1, target))
                ends = probe_paths(target.flow, marks.rst_sent_for[target.ends], marks)
                paths += [(path, way_of(path, target.flow, marks, rounds)) for path in ends]
            elif target.ends is Ends.BOTH:
                over.append(target.flow)
        if over:  # a new connection of the same addresses and ports is welcome again
            self._table.delete(over)
        probes = [(probe(path, self._draw(), self._draw()), way) for path, way in paths]
        send_each(self._sender, probes)
        send_each(self._sender, openings)

    def _close(self, key: tuple[Tuple, int], result: Result) -> None:
        del self._cases[key]
        self._finished.append(result)
        if result.outcome in (Outcome.RESET, Outcome.SUBFLOW):
            self._again.append((result.at + AGAIN_AFTER, AGAIN_ROUNDS, result.target))


def select(
    flows: Iterable[Flow],
    source: Prefix | None = None,
    source_port: int | None = None,
    destination: Prefix | None = None,
    port: int | None = None,
) -> list[Flow]:
    """Return the connections, not yet over, that match everything that is given.

    Source and ports are those the client uses.  Destination and port may also be the ones of the
    inside server that the connection was translated to (DNAT).
    """
    chosen = []
    for flow in flows:
        client, server = flow.original, flow.reply
        if flow.state in OVER:
            continue
        if source is not None and not source.covers(client.source):
            continue
        if source_port is not None and client.source_port != source_port:
            continue
        if _hits(destination, port, client.destination, client.destination_port) or _hits(
            destination, port, server.source, server.source_port
        ):
            chosen.append(flow)
    return chosen


def _hits(prefix: Prefix | None, wanted: int | None, address: int, port: int) -> bool:
    return (prefix is None or prefix.covers(address)) and (wanted is None or wanted == port)
