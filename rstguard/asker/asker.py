"""The asker: RSTs wait in one queue, answers come by another, which is read first.

What decides is `rstguard.engine.holding`, and the rules are those of `rstguard.kernel.holding`.
If this process ends, RSTs that waited are dropped by the kernel; their connections stay marked, and
the next one asks for them.
"""

from __future__ import annotations

import logging
import random
import select
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Final, assert_never

from rstguard.asker.behind import Behind, Syn, named
from rstguard.asker.carrying import Carrying
from rstguard.asker.reading import Read, read_segment, segment_of
from rstguard.engine.case import MOST_ASKED
from rstguard.engine.evidence import first_block
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.holding import Holding
from rstguard.engine.questions import Probe
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.wire import ACK, RST, SYN
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import (
    Blocked,
    Counts,
    Explain,
    Kill,
    Learn,
    Nearest,
    NewPolicy,
    Offences,
    Productive,
    Ready,
    Recheck,
    Reset,
    Start,
    Stop,
    Tell,
    ToChild,
)
from rstguard.ipc.said import Large
from rstguard.kernel import KernelError, holding
from rstguard.kernel.diversion import worker_of
from rstguard.kernel.inject import send_each, way_of
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import LENGTH, MOST, Queued, Verdict
from rstguard.kernel.seam import Kernel

log = logging.getLogger(__name__)

_LIFETIME: Final = "net.netfilter.nf_conntrack_tcp_timeout_established"
_BUSY_WAIT: Final = SECOND // 100
"""While RSTs wait."""
_MOST_WAIT: Final = SECOND // 2
_REPORT_EVERY: Final = SECOND // 2
_LOOK_EVERY: Final = SECOND
_ACTIVE: Final = 15 * SECOND
"""How long lost RSTs are looked for after the last one: a closed entry lives for 10 s."""
_SHARE: Final = 10
"""A look at a large table takes long; it may take this part of a core."""
_MOST_ORPHANS: Final = 500
"""Connections that are asked for at once because their RST was lost."""
_MOST_LOST: Final = 8192
_SOON, _KEPT = 5, 10
"""Seconds before a closed entry is forgotten in which it is kept for so many more."""
_WHOLE: Final = RST | ACK
_KIND: Final = RST | SYN

_NOT_REOPENED: Final = (
    "this kernel does not let a connection be called established again that a RST has closed"
)


class Asker:
    """Reads both queues and asks."""

    def __init__(
        self,
        channel: ChildEnd,
        start: Start,
        kernel: Kernel,
        clock: Callable[[], int] = time.monotonic_ns,
        draw: Callable[[], int] | None = None,
    ) -> None:
        """Bind the queues; `start.queue` is the first worker's, `start.index` their number.

        Raises:
            KernelError: a queue, the connection table or raw sockets cannot be had.
        """
        self._channel, self._clock = channel, clock
        self._marks = Marks(start.ruleset.marks)
        self._workers = range(start.queue, start.queue + start.index)
        queues = holding.queues_of(self._workers)
        self._table, self._sender = kernel.table(), kernel.injector(self._marks)
        lifetime = int(kernel.read_sysctl(_LIFETIME))
        # A RST that finds the queue full is dropped, whatever the policy says of failures: its
        # connection is marked, and asked for.
        self._held = kernel.queue(queues.held, False, self._marks)
        self._answers = kernel.queue(queues.answers, True, self._marks)
        self._counts: Counter[str] = Counter()
        self._holding = Holding(draw or partial(random.getrandbits, 32))
        self._carrying = Carrying(
            channel,
            self._table,
            self._held,
            self._marks,
            self._counts,
            self._worker,
            self._holding.waits_for,
            lifetime,
        )
        self._behind = Behind(self._held, self._table, self._holding, self._marks)
        self._report_at = self._look_at = self._search_at = 0
        self._active_until = clock() + _ACTIVE
        self._running = True
        self._can_hold = self._table.can_reopen()
        if not self._can_hold:
            log.warning("RSTs pass at once, and forged ones are only told: %s", _NOT_REOPENED)
            self._counts["cannot_hold"] = 1
        self._follow(start.ruleset)

    def _follow(self, ruleset: RuleSet) -> None:
        self._ruleset = ruleset
        self._carrying.waits = self._can_hold and ruleset.forged_resets == "hold"

    def _worker(self, flow: Flow) -> int:
        return worker_of(self._ruleset, flow.original.source, self._workers)

    def run(self) -> None:
        """Serve until told to stop.

        Raises:
            Closed: the supervisor is gone.
        """
        poll = select.poll()
        for one in (self._held, self._answers, self._channel):
            poll.register(one.fileno(), select.POLLIN)
        self.begin()
        wait: int | None = 0
        while wait is not None:
            poll.poll(-(-wait // 1_000_000))
            wait = self.turn()

    def begin(self) -> None:
        """Say that the queues are read from now on: `turn` is to follow."""
        self._channel.send(Ready(0, self._held.reader))

    def turn(self) -> int | None:
        """Do one round of work, without waiting for anything.

        Returns:
            for how many nanoseconds at most to wait before the next, or None after the last.

        Raises:
            Closed: the supervisor is gone.
        """
        for message in self._channel.receive():
            self._obey(message)
        now = self._clock()
        try:
            more = self._hear(now)
            self._finish(now)  # takes marks off, and what is read next may need them
            more = self._take(now) or more
            self._look_for_replaced(now)
            self._holding.work(now)
            self._finish(now)  # before the look: what is decided is no orphan
            if self._look_at <= now < self._active_until:
                self._look_for_orphans(now)
                self._finish(now)
            self._carrying.look_again(now)
        except KernelError as error:
            self._counts["failed"] += 1
            log.error("%s", error)
            more = False
        self._report(now)
        if not self._running:
            return None
        if more:
            return 0
        return _BUSY_WAIT if len(self._holding) else _MOST_WAIT

    def _finish(self, now: int) -> None:
        """Send what is to be asked, and do what was decided."""
        state = self._holding
        if probes := state.take_probes():
            send_each(self._sender, [(segment_of(one), self._way(one)) for one in probes])
            self._counts["probes"] += len(probes)
        decided, state.decided = state.decided, []
        if decided:
            try:
                self._carrying.carry_out(decided, now)
            finally:
                self._behind.release(decided)

    def _way(self, asked: Probe) -> int:
        """Return the mark by which a question is routed: by the other way only in the end.

        Two answers may be needed, and the first two questions are sent at once.
        """
        flow = self._holding.asked_about(asked)
        if flow is None:
            return 0
        return way_of(asked.path, flow, self._marks, 2 if asked.number == MOST_ASKED else 1)

    def _hear(self, now: int) -> bool:
        """Read all answers that wait; tell whether more have come meanwhile.

        All, as time is up for no RST before what has come by then is read.
        """
        return all(self._hear_some(now) for _ in range(LENGTH // MOST))

    def _hear_some(self, now: int) -> bool:
        batch = self._answers.receive(MOST, _WHOLE)
        verdicts: list[Verdict] = []
        for number, mark, data in batch:
            passes = True
            if (read := read_segment(data)) is not None:
                packet, options, hops = read
                passes = self._holding.heard(packet, first_block(options), hops, now)
            cleared = mark & ~self._marks.mask & 0xFFFFFFFF
            verdicts.append((number, passes, cleared if passes else None))
        if verdicts:
            self._answers.give(verdicts)
        return len(batch) == MOST

    def _take(self, now: int) -> bool:
        """Read RSTs, and SYNs behind them; tell whether more wait."""
        batch = self._held.receive(MOST, _WHOLE)
        fresh: list[tuple[Queued, Read]] = []
        answers: list[Flow] = []
        syns: list[Syn] = []
        for queued in batch:
            self._active_until = now + _ACTIVE
            read = read_segment(queued[2])
            if read is None:
                self._settle(queued, passes=True)
            elif read[0].flags & _KIND == SYN and self._carrying.waits:
                syns.append((queued[0], queued[1], read[0]))
            elif read[0].flags & _KIND == SYN:
                self._settle(queued, passes=True)
            elif not self._holding.heard(read[0], None, read[2], now):
                self._settle(queued, passes=False)
                answers.append(named(read[0]))
            elif (joins := self._holding.join(queued[0], read[0])) is None:
                fresh.append((queued, read))
            else:
                self._wait_or_drop(queued, joins)
        if fresh:
            self._hold(fresh, now)
        if answers:
            self._unmark(answers)
        self._behind.take(syns, now)  # after the RST that came just before them
        return len(batch) == MOST

    def _unmark(self, named: list[Flow]) -> None:
        """Take off the mark that an answer has set which the tracker took for a RST like any."""
        known = [flow for flow in self._table.read(named) if flow is not None]
        if flows := [flow for flow in known if not self._holding.waits_for(flow)]:
            self._table.set_mark(flows, 0, self._marks.held.mask)

    def _hold(self, fresh: list[tuple[Queued, Read]], now: int) -> None:
        """Look up the connections of RSTs, and have those wait that are known.

        A RST marks its connection when it comes into the queue; the end of another case may have
        cleared that since.

        Raises:
            KernelError: they cannot be looked up.  They are dropped, and their connections, which
                are marked, asked for as those whose RST was lost.
        """
        try:
            flows = self._find([named(read[0]) for _, read in fresh], now)
        except KernelError:
            for queued, _ in fresh:
                self._settle(queued, passes=False)
            raise
        unmarked = []
        for (queued, read), flow in zip(fresh, flows, strict=True):
            packet, _, hops = read
            number, mark, _ = queued
            joins = self._holding.join(number, packet)  # two of one connection in one batch
            if joins is not None:
                self._wait_or_drop(queued, joins)
            elif flow is None or _is_new(flow) or flow.mark & self._marks.condemned.mask:
                self._settle(queued, passes=True)
            else:
                inside = not mark & self._marks.to_queue_over.mask
                self._counts["held_resets"] += 1
                self._holding.hold(number, packet, hops, inside, flow, now)
                if not flow.mark & self._marks.held.mask:
                    unmarked.append(flow)
                if self._carrying.waits:
                    self._carrying.held[number] = mark
                else:
                    self._carrying.settle(number, mark, True, flow)
        if unmarked:
            self._table.set_mark(unmarked, self._marks.held.value, self._marks.held.mask)

    def _find(self, wanted: list[Flow], now: int) -> list[Flow | None]:
        """Return the connections of RSTs.

        No packet tells the zone that it is in.  If the connection of zone 0 is not the one that the
        RST has marked, another's may be, which is looked for as often as there is time.
        """
        flows, held = self._table.read(wanted), self._marks.held
        if now < self._search_at or all(flow and flow.mark & held.mask for flow in flows):
            return flows
        zoned = {
            path: flow
            for flow in self._table.dump(held.value, held.mask)
            if flow.zone
            for path in (flow.original, flow.reply)
        }
        self._search_at = now + _SHARE * (self._clock() - now)
        return [
            flow if flow and flow.mark & held.mask else zoned.get(one.original, flow)
            for one, flow in zip(wanted, flows, strict=True)
        ]

    def _look_for_replaced(self, now: int) -> None:
        """A port that is used again at once: its SYN has the tracker forget the connection."""
        if unsure := self._holding.unsure(now):
            for flow, seen in zip(unsure, self._table.read(unsure), strict=True):
                if seen is None or seen.ident != flow.ident:
                    self._holding.replaced(flow, now)

    def _wait_or_drop(self, queued: Queued, waits: bool) -> None:
        if waits and self._carrying.waits:
            self._carrying.held[queued[0]] = queued[1]
        else:
            self._settle(queued, passes=waits)

    def _settle(self, queued: Queued, passes: bool) -> None:
        self._carrying.settle(queued[0], queued[1], passes)

    def _look_for_orphans(self, now: int) -> None:
        """Ask for connections whose RST was lost: in a full queue, over a limit, with a process.

        Those that it has not closed only had their window moved.  Closed ones whose turn has not
        come are kept for it.
        """
        held, room = self._marks.held, _MOST_ORPHANS - self._holding.orphans
        waits, dump = self._holding.waits_for, self._table.dump
        # Nothing may keep the dump beyond this line: unfinished, it bars the changes that follow.
        lost = list(islice((f for f in dump(held.value, held.mask) if not waits(f)), _MOST_LOST))
        closed = [flow for flow in lost if flow.state == TcpState.CLOSE]
        for flow in closed[:room]:
            self._holding.orphan(flow, now)
        if late := [flow for flow in closed[room:] if flow.timeout < _SOON]:
            self._table.set_timeout(late, _KEPT)
        if moved := [flow for flow in lost if flow.state != TcpState.CLOSE]:
            self._table.set_liberal(moved)
            self._table.set_mark(moved, 0, held.mask)
        self._look_at = now + max(_LOOK_EVERY, _SHARE * (self._clock() - now))

    def _report(self, now: int) -> None:
        if now >= self._report_at:
            self._report_at = now + _REPORT_EVERY
            extra = {"waiting_resets": len(self._holding), "lost_reports": self._channel.lost}
            self._channel.send(Counts(self._counts | extra))
        self._channel.flush()

    def _obey(self, message: ToChild) -> None:
        match message:
            case NewPolicy(ruleset, generation):
                self._follow(ruleset)
                self._channel.send(Ready(generation, self._held.reader))
            case Stop():
                now = self._clock()
                self._holding.release_all(now)
                self._finish(now)
                self._running = False
            case Offences() | Productive() | Large() | Learn() | Tell():
                pass  # for those that judge
            case Start() | Blocked() | Reset() | Recheck() | Kill() | Explain() | Nearest():
                raise ValueError(f"{type(message).__name__} is not for the asker")
            case _:
                assert_never(message)


def _is_new(flow: Flow) -> bool:
    """Tell whether a SYN has begun a connection where a RST had closed one: it is over already."""
    return flow.state in (TcpState.SYN_SENT, TcpState.SYN_RECV)
