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

from rstguard.asker.carrying import Carrying
from rstguard.engine import wire
from rstguard.engine.address import is_v6
from rstguard.engine.evidence import first_block
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.holding import Holding
from rstguard.engine.questions import Probe
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.segment import opening, probe
from rstguard.engine.wire import ACK, RST, Packet
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
from rstguard.kernel import KernelError, holding
from rstguard.kernel.diversion import worker_of
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import MOST, Queued, Verdict
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
_WHOLE: Final = RST | ACK

_NOT_REOPENED: Final = (
    "this kernel does not let a connection be called established again that a RST has closed"
)

Read = tuple[Packet, dict[int, bytes], int]


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
        self._report_at = self._look_at = 0
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
            self._sender.send(map(_segment, probes))
            self._counts["probes"] += len(probes)
        decided, state.decided = state.decided, []
        if decided:
            self._carrying.carry_out(decided, now)

    def _hear(self, now: int) -> bool:
        """Read answers; tell whether more wait."""
        batch = self._answers.receive(MOST, _WHOLE)
        verdicts: list[Verdict] = []
        for number, mark, data in batch:
            passes = True
            if (read := _read(data)) is not None:
                packet, options, hops = read
                passes = self._holding.heard(packet, first_block(options), hops, now)
            cleared = mark & ~self._marks.mask & 0xFFFFFFFF
            verdicts.append((number, passes, cleared if passes else None))
        if verdicts:
            self._answers.give(verdicts)
        return len(batch) == MOST

    def _take(self, now: int) -> bool:
        """Read RSTs; tell whether more wait."""
        batch = self._held.receive(MOST, _WHOLE)
        fresh: list[tuple[Queued, Read]] = []
        answers: list[Flow] = []
        for queued in batch:
            self._active_until = now + _ACTIVE
            read = _read(queued[2])
            if read is None:
                self._settle(queued, passes=True)
            elif not self._holding.heard(read[0], None, read[2], now):
                self._settle(queued, passes=False)
                answers.append(_named(read[0]))
            elif (joins := self._holding.join(queued[0], read[0])) is None:
                fresh.append((queued, read))
            else:
                self._wait_or_drop(queued, joins)
        if fresh:
            self._hold(fresh, now)
        if answers:
            self._unmark(answers)
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
            flows = self._table.read([_named(read[0]) for _, read in fresh])
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
            elif flow is None or flow.mark & self._marks.condemned.mask:
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

        Those that it has not closed only had their window moved.
        """
        held = self._marks.held
        found = list(islice(self._table.dump(held.value, held.mask), _MOST_ORPHANS))
        lost = [flow for flow in found if not self._holding.waits_for(flow)]
        for flow in lost:
            if flow.state == TcpState.CLOSE:
                self._holding.orphan(flow, now)
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
            case Offences() | Productive() | Learn() | Tell():
                pass  # for those that judge
            case Start() | Blocked() | Reset() | Recheck() | Kill() | Explain() | Nearest():
                raise ValueError(f"{type(message).__name__} is not for the asker")
            case _:
                assert_never(message)


def _segment(asked: Probe) -> bytes:
    if asked.opens or asked.acknowledgement is None:
        return opening(asked.path, asked.sequence, asked.acknowledgement)
    return probe(asked.path, asked.sequence, asked.acknowledgement)


def _read(data: Packet | bytes) -> Read | None:
    """Return a segment, its options and its remaining hops, or None if it cannot be read."""
    if isinstance(data, Packet):
        return data, {}, -1
    packet = wire.parse(data)
    if not isinstance(packet, Packet):
        return None
    hops = data[7] if is_v6(packet.source) else data[8]
    return packet, wire.options(data), hops


def _named(packet: Packet) -> Flow:
    """Return a connection by one of its names, to be looked up."""
    path = Tuple(*packet[:4])
    return Flow(0, path, path, 0, 0, True, 0, 0, 0, 0, -1, 0, 0)
