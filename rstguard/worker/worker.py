"""The worker: one process, one queue.

Packets come in batches, of one if no more wait.  Each is parsed and judged, then all get their
verdicts with one system call, exactly one whatever happens.  What decisions ask for besides (a ban,
a report) is carried out right after, the first of a batch at once, the others together.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import time
from collections import Counter
from collections.abc import Iterator

from rstguard.engine.engine import Engine
from rstguard.engine.flow import Tuple
from rstguard.engine.ruleset import NEEDS, SECOND, Measure, RuleSet
from rstguard.engine.segment import cookie_rst
from rstguard.engine.shedding import Level, Shedding
from rstguard.engine.verdict import PASS, Ban, Condemn, Decision, Reason, Shun, Verdict
from rstguard.engine.wire import KNOWN, SYN, Malformed, Packet, parse
from rstguard.ipc.channel import Channel
from rstguard.ipc.entry import take_priority
from rstguard.ipc.measuring import Measuring
from rstguard.ipc.messages import (
    Counts,
    Explain,
    Explained,
    Learn,
    Nearest,
    NewPolicy,
    Observed,
    Offences,
    Overloaded,
    Productive,
    Ready,
    Reset,
    Start,
    Stop,
    Tell,
    blocked_message,
)
from rstguard.kernel import KernelError, thinning
from rstguard.kernel.elements import element_of
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import LENGTH, MOST, Queue, Queued, states
from rstguard.kernel.nfqueue import Verdict as NumberedVerdict
from rstguard.kernel.sets import Sets
from rstguard.worker.search import Looking

log = logging.getLogger(__name__)

_BATCHES_IN_A_ROW = 8
"""Batches of packets after which the worker looks for messages even if more are waiting.

A batch is what waits already, at most 64 packets: the first of them has its verdict when the last
is judged, well under a millisecond later.
"""
_PRIORITY = -10
"""Each honest client's handshake waits for this."""
_REPORT_EVERY = SECOND // 2
_MOST_REPORTS = 50
"""Refused SYNs and observations of one rule that are told one by one between two counts."""
_NOT_JUDGED = Malformed("not judged")
_DROPPED = Decision(Verdict.DROP, Reason.PASSED)
"""For a packet that could not be judged, under `on_failure: closed`, also in observe mode."""


class Worker:
    """Reads one queue and carries out what the engine decides."""

    def __init__(self, channel: Channel, start: Start) -> None:
        """Bind the queue and take up the policy.

        Raises:
            KernelError: the queue cannot be had.
        """
        self._channel = channel
        self._sets = Sets()
        self._marks = Marks(start.ruleset.marks)
        self._states, self._trust = self._marks.states, self._marks.trust.value
        self._others = 0xFFFFFFFF ^ self._marks.mask
        self._injector = Injector(self._marks)
        self._shedding, self._lost = Shedding(LENGTH), 0
        self._index = start.index
        self._measuring = Measuring(start.ruleset, NEEDS)
        self._take_up(start.ruleset, None)
        self._pending: list[tuple[Packet, Decision]] = []
        self._packets = 0
        self._counts: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._report_at = 0
        self._looking = Looking()
        self._running = True
        self._queue = Queue(start.queue, start.ruleset.fail_open, self._marks)

    def _take_up(self, ruleset: RuleSet, previous: Engine | None) -> None:
        self._engine = Engine(ruleset, previous)
        self._measuring.follow(ruleset)
        self._choose()
        self._enforce = ruleset.enforce
        self._fail_open = ruleset.fail_open
        self._want_scale = any(rule.measure is Measure.STALLED for rule in ruleset.rules)

    def run(self) -> None:
        """Serve until told to stop or until the supervisor is gone."""
        poll = select.poll()
        poll.register(self._queue.fileno(), select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        # The packet path makes no reference cycles, yet the collector would walk its tables again
        # and again: a sixth of a packet's time.  Young garbage goes when nothing is to be done.
        gc.disable()
        take_priority(_PRIORITY)
        self._channel.send(Ready(0, self._queue.reader))
        channel = self._channel.fileno()
        while self._running:
            wait = 0 if self._looking.active else 1 if self._measuring.telling else 500
            ready = dict(poll.poll(wait))
            if not ready and wait == 500:
                gc.collect(1)
            self._look_at_queue(emptied=self._work_off())
            self._report()
            self._measuring.step(self._channel)
            self._looking.step(self._channel)
            for message in self._channel.receive() if channel in ready else ():
                self._obey(message)
        self._queue.close()

    def _work_off(self) -> bool:
        """Judge what waits, with a look at messages now and then; tell whether nothing is left."""
        for _ in range(_BATCHES_IN_A_ROW):
            batch = self._queue.receive(MOST, self._want_scale)
            packets = iter(batch)
            self._judge(packets, until_objection=True)
            if self._pending:
                # The first is carried out at once, those behind it together.
                self._perform()
                self._judge(packets, until_objection=False)
                self._perform()
            self._packets += len(batch)
            if len(batch) < MOST:
                return True
        return False

    def _look_at_queue(self, emptied: bool) -> None:
        """Leave more undone as the queue fills, and less as it empties."""
        before, waiting = self._shedding.level, 0
        if emptied and before is Level.NOTHING:
            return
        if not emptied:
            state = states()[self._queue.number]
            waiting, self._lost = state.waiting, state.dropped_full + state.dropped_reader
        level = self._shedding.look(waiting, self._lost, time.monotonic_ns(), self._packets)
        if level is not before:
            self._choose()
            self._thin(level, before)
            self._channel.send(Overloaded(os.getpid(), level))

    def _choose(self) -> None:
        """Choose what judges the packets; what learns limits does so only while there is time."""
        level = self._shedding.level
        decide = self._engine.at(level)
        self._decide = decide if level else self._measuring.beside(decide)

    def _thin(self, level: Level, before: Level) -> None:
        """Have the kernel keep from the queue what would only be passed on, or no more."""
        try:
            if level is Level.THINNED:
                thinning.thin(self._sets, self._index)
            elif before is Level.THINNED:
                thinning.restore(self._sets, self._index)
        except KernelError as error:
            log.error("%s", error)

    def _judge(self, packets: Iterator[Queued], until_objection: bool) -> None:
        """Judge packets and give their verdicts.  This runs for every diverted packet.

        With `until_objection`, those behind the first that asks for more than a verdict are left.
        """
        decide, now = self._decide, time.monotonic_ns()  # they all were there by now
        verdicts: list[NumberedVerdict] = []
        ours, others, passing = self._marks.mask, self._others, 0
        for number, mark, data in packets:
            try:
                packet = self._parse(data, mark) if isinstance(data, bytes) else data
                decision = decide(packet, now)
            except Exception as error:  # noqa: BLE001 - every packet gets a verdict, come what may
                packet, decision = _NOT_JUDGED, self._failed(error)
            if decision is PASS and not mark & ours:
                passing = number
                continue
            if passing:
                verdicts.append((passing, True, None))
                passing = 0
            verdicts.append((number, *self._verdict(mark & others, decision, packet)))
            if decision.rule:
                self._note(packet, decision)
                if self._pending and until_objection:
                    break
            elif decision.reason is Reason.UNREADABLE:
                self._counts["unreadable"] += 1
        if passing:
            verdicts.append((passing, True, None))
        if verdicts:
            self._queue.give(verdicts)

    def _parse(self, data: bytes, mark: int) -> Packet | Malformed:
        return parse(data, self._states[mark >> self._marks.base & 255], self._want_scale)

    def _verdict(
        self, mark: int, decision: Decision, packet: Packet | Malformed
    ) -> tuple[bool, int | None]:
        """Return whether a packet passes, and with which mark."""
        # A policy that only observes still spares trusted connections the way through the queue.
        verdict = decision.verdict if self._enforce or decision is _DROPPED else Verdict.ACCEPT
        if verdict is Verdict.DROP or (verdict is Verdict.RESET and _by_cookie(packet)):
            return False, None
        if verdict is Verdict.RESET:
            mark |= self._marks.condemned_for[decision.ends]
        elif decision.trust:
            mark |= self._trust
        return True, mark

    def _failed(self, error: Exception) -> Decision:
        """The engine failed on a packet: it passes or not as the policy's on_failure says."""
        self._counts["failed"] += 1
        if self._counts["failed"] == 1:
            text = "a packet could not be judged; on_failure applies (reported once)"
            log.error(text, exc_info=error)
        return PASS if self._fail_open else _DROPPED

    def _note(self, packet: Packet | Malformed, decision: Decision) -> None:
        self._counts[f"verdict.{decision.verdict.name.lower()}"] += 1
        self._counts[f"rule.{decision.rule}"] += 1
        if decision.effects or decision.verdict is not Verdict.DROP or _by_cookie(packet):
            assert isinstance(packet, Packet)
            self._pending.append((packet, decision))

    def _perform(self) -> None:
        """Carry out what the decisions of the last moments ask for, bans first."""
        pending, self._pending = self._pending, []
        blocks = [e for _, d in pending for e in d.effects if isinstance(e, Ban | Shun)]
        if blocks and self._enforce:
            try:
                self._sets.add(map(element_of, blocks))
            except KernelError as error:
                self._counts["block_failed"] += len(blocks)
                log.error("%s", error)
                blocks = []
        for effect in blocks:
            self._channel.send(blocked_message(effect, self._enforce))
        if self._enforce:
            refused = (p for p, d in pending if d.verdict is not Verdict.ACCEPT and _by_cookie(p))
            self._injector.send(map(cookie_rst, refused))
        for packet, decision in pending:
            flow, rule, reason = Tuple(*packet[:4]), decision.rule, decision.reason
            if decision.verdict is Verdict.RESET:
                known = any(isinstance(effect, Condemn) for effect in decision.effects)
                if known or self._worth_telling(rule):
                    message = Reset(flow, decision.ends, rule, reason, self._enforce, known)
                    self._channel.send(message)
            elif decision.verdict is Verdict.DROP or decision.effects:
                continue  # told by what was done about it
            elif self._worth_telling(rule):
                self._channel.send(Observed(flow, rule, reason))

    def _worth_telling(self, rule: str) -> bool:
        """Let some reports of a rule through between two counts; those tell of a flood."""
        told = self._told[rule] = self._told.get(rule, 0) + 1
        self._counts["reports_left_out"] += told > _MOST_REPORTS
        return told <= _MOST_REPORTS

    def _report(self) -> None:
        now = time.monotonic_ns()
        if now >= self._report_at:
            self._report_at = now + _REPORT_EVERY
            self._thin(self._shedding.level, self._shedding.level)
            self._told.clear()
            extra = {
                "packets": self._packets,
                "left_undone": self._engine.left_undone,
                "lost_reports": self._channel.lost,
            }
            self._channel.send(Counts(self._counts | extra))
        self._channel.flush()

    def _obey(self, message: object) -> None:
        if isinstance(message, NewPolicy):
            self._take_up(message.ruleset, self._engine)
            self._queue.set_fail_open(message.ruleset.fail_open)
            self._channel.send(Ready(message.generation, self._queue.reader))
        elif isinstance(message, Explain):
            used = self._engine.explain(message.source, time.monotonic_ns())
            self._channel.send(Explained(message.number, used))
        elif isinstance(message, Nearest):
            if self._looking.ask(message):
                self._looking.begin(self._engine.nearest(message.most, time.monotonic_ns()))
        elif isinstance(message, Productive):
            self._engine.note_productive(message.percents)
        elif isinstance(message, Offences):
            self._engine.restore(message.offences, time.monotonic_ns())
        elif isinstance(message, Learn | Tell):
            self._measuring.obey(message)
            self._choose()
        elif isinstance(message, Stop):
            self._running = False


def _by_cookie(packet: Packet | Malformed) -> bool:
    """Tell whether a SYN is the kernel's own, for a client that has returned a cookie."""
    return packet.__class__ is Packet and packet[6] & 0x17 == SYN and bool(packet[9] & KNOWN)
