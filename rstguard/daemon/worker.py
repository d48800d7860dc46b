"""The worker: one process, one queue.

For every packet: parse, decide, give the verdict, in this order and with exactly one verdict
whatever happens.  What a decision asks for besides (a ban, a report) is carried out right after
the verdict, outside the queue's callback, and batched.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from rstguard.daemon.channel import Channel
from rstguard.daemon.child import run_child, take_priority
from rstguard.daemon.measuring import Measuring
from rstguard.daemon.messages import (
    Blocked,
    Counts,
    Explain,
    Explained,
    Learn,
    Nearest,
    NearestAre,
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
)
from rstguard.engine.engine import Engine
from rstguard.engine.flow import Tuple
from rstguard.engine.nearest import Near, merged
from rstguard.engine.ruleset import NEEDS, SECOND, Measure, RuleSet
from rstguard.engine.segment import cookie_rst
from rstguard.engine.shedding import Level, Shedding
from rstguard.engine.verdict import PASS, Ban, Condemn, Decision, Reason, Shun, Verdict
from rstguard.engine.wire import KNOWN, SYN, Malformed, Packet, parse
from rstguard.kernel import KernelError, thinning
from rstguard.kernel.elements import element_of
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import BASE, CONDEMNED_FOR, MASK, STATES, TRUSTED
from rstguard.kernel.nfqueue import LENGTH, Queue, QueuedPacket, states
from rstguard.kernel.sets import Sets

log = logging.getLogger(__name__)

_MOST_IN_A_ROW = 512
"""Packets after which the worker looks for messages even if more are waiting."""
_MOST_AT_ONCE = 32
"""Packets that may wait for the next one message that lets them all pass.

Each spares a system call.  They wait only while more are being read: for well under a millisecond.
"""
_PRIORITY = -10
"""Each honest client's handshake waits for this."""
_REPORT_EVERY = SECOND // 2
_MOST_REPORTS = 50
"""Refused SYNs and observations of one rule that are told one by one between two counts."""
_OTHER_BITS = 0xFFFFFFFF ^ MASK


class _Pause(Exception):
    """Leave the queue for a moment; raised only after the packet has its verdict."""


class Worker:
    """Reads one queue and carries out what the engine decides."""

    def __init__(self, channel: Channel, start: Start) -> None:
        """Bind the queue and take up the policy.

        Raises:
            KernelError: the queue cannot be had.
        """
        self._channel = channel
        self._sets = Sets()
        self._injector = Injector()
        self._shedding, self._lost = Shedding(LENGTH), 0
        self._index = start.index
        self._measuring = Measuring(start.ruleset, NEEDS)
        self._take_up(start.ruleset, None)
        self._pending: list[tuple[Packet, Decision]] = []
        self._packets = 0
        self._counts: Counter[str] = Counter()
        self._told: dict[str, int] = {}
        self._left_in_row = _MOST_IN_A_ROW
        self._passing = self._last_passing = 0
        self._report_at = 0
        self._looking: Iterator[list[Near]] | None = None
        self._found: list[Near] = []
        self._asked: list[Nearest] = []
        self._running = True
        self._queue = Queue(start.queue, self._on_packet, start.ruleset.fail_open)

    def _take_up(self, ruleset: RuleSet, previous: Engine | None) -> None:
        self._engine = Engine(ruleset, previous)
        self._measuring.follow(ruleset)
        self._shed(self._shedding.level)
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
        while self._running:
            wait = 0 if self._looking is not None else 1 if self._measuring.telling else 500
            if not poll.poll(wait) and self._looking is None:
                gc.collect(1)
            self._left_in_row = _MOST_IN_A_ROW
            with contextlib.suppress(_Pause):
                self._queue.drain()
            self._pass_on()
            self._perform()
            self._look_at_queue()
            self._report()
            self._measuring.step(self._channel)
            for message in self._channel.receive():
                self._obey(message)
            if self._looking is not None:
                self._look_on(self._looking)
        self._queue.close()

    def _look_on(self, looking: Iterator[list[Near]]) -> None:
        """Go one step on in looking for who is nearest; packets are judged in between."""
        try:
            self._found += next(looking)
        except StopIteration:
            most = max(asked.most for asked in self._asked)
            nearest = merged(self._found, most)
            for asked in self._asked:
                self._channel.send(NearestAre(asked.number, nearest))
            self._looking, self._found, self._asked = None, [], []

    def _look_at_queue(self) -> None:
        """Leave more undone as the queue fills, and less as it empties."""
        before, waiting = self._shedding.level, 0
        if self._left_in_row <= 0:  # else the queue was empty a moment ago
            state = states()[self._queue.number]
            waiting, self._lost = state.waiting, state.dropped_full + state.dropped_reader
        level = self._shedding.look(waiting, self._lost, time.monotonic_ns(), self._packets)
        if level is not before:
            self._shed(level)
            self._thin(level, before)
            self._channel.send(Overloaded(os.getpid(), level))

    def _shed(self, level: Level) -> None:
        """Choose what judges the packets; what learns limits does so only while there is time."""
        engine = self._engine
        self._decide: Callable[[Packet | Malformed, int], Decision] = (
            partial(engine.decide_under_load, level=level)
            if level
            else self._measuring.beside(engine.decide)
        )

    def _thin(self, level: Level, before: Level) -> None:
        """Have the kernel keep from the queue what would only be passed on, or no more."""
        try:
            if level is Level.THINNED:
                thinning.thin(self._sets, self._index)
            elif before is Level.THINNED:
                thinning.restore(self._sets, self._index)
        except KernelError as error:
            log.error("%s", error)

    def _on_packet(self, queued: QueuedPacket) -> None:
        """Judge one packet and give its verdict.  This runs for every diverted packet."""
        mark = queued.mark
        try:
            packet = parse(queued.get_payload(), STATES[mark >> BASE & 127], self._want_scale)
            decision = self._decide(packet, time.monotonic_ns())
        except Exception as error:  # noqa: BLE001 - every packet gets a verdict, come what may
            self._fail(queued, mark, error)
            raise _Pause from None
        self._packets += 1
        if decision is not PASS:
            self._give(queued, mark & _OTHER_BITS, decision, packet)
            if decision.rule:
                self._note(packet, decision)
            elif decision.reason is Reason.UNREADABLE:
                self._counts["unreadable"] += 1
        elif mark & MASK:
            queued.set_mark(mark & _OTHER_BITS)
            queued.accept()
        else:
            self._last_passing = queued.id
            self._passing += 1
            if self._passing >= _MOST_AT_ONCE:
                self._pass_on()
        self._left_in_row -= 1
        if self._left_in_row <= 0 or self._pending:
            raise _Pause

    def _pass_on(self) -> None:
        """Let the packets pass that wait for it; others already have their verdicts."""
        if self._passing:
            self._passing = 0
            self._queue.accept_up_to(self._last_passing)

    def _give(
        self, queued: QueuedPacket, mark: int, decision: Decision, packet: Packet | Malformed
    ) -> None:
        # A policy that only observes still spares trusted connections the way through the queue.
        verdict = decision.verdict if self._enforce else Verdict.ACCEPT
        if verdict is Verdict.DROP or (verdict is Verdict.RESET and _by_cookie(packet)):
            queued.drop()
            return
        if verdict is Verdict.RESET:
            mark |= CONDEMNED_FOR[decision.ends]
        elif decision.trust:
            mark |= TRUSTED
        queued.set_mark(mark)
        queued.accept()

    def _fail(self, queued: QueuedPacket, mark: int, error: Exception) -> None:
        """The engine failed on a packet: it passes or not as the policy's on_failure says."""
        queued.set_mark(mark & _OTHER_BITS)
        if self._fail_open:
            queued.accept()
        else:
            queued.drop()
        self._counts["failed"] += 1
        if self._counts["failed"] == 1:
            text = "a packet could not be judged; on_failure applies (reported once)"
            log.error(text, exc_info=error)

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
            self._channel.send(Ready(message.generation))
        elif isinstance(message, Explain):
            used = self._engine.explain(message.source, time.monotonic_ns())
            self._channel.send(Explained(message.number, used))
        elif isinstance(message, Nearest):
            self._asked.append(message)
            if self._looking is None:
                self._looking = self._engine.nearest(message.most, time.monotonic_ns())
        elif isinstance(message, Productive):
            self._engine.note_productive(message.percents)
        elif isinstance(message, Offences):
            self._engine.restore(message.offences, time.monotonic_ns())
        elif isinstance(message, Learn | Tell):
            self._measuring.obey(message)
            self._shed(self._shedding.level)
        elif isinstance(message, Stop):
            self._running = False


def _by_cookie(packet: Packet | Malformed) -> bool:
    """Tell whether a SYN is the kernel's own, for a client that has returned a cookie."""
    return packet.__class__ is Packet and packet[6] & 0x17 == SYN and bool(packet[9] & KNOWN)


def blocked_message(effect: Ban | Shun, enforced: bool, by_worker: bool = True) -> Blocked:
    """Return the report of a ban or shun that was carried out (or would have been)."""
    element = element_of(effect)
    return Blocked(
        element.kind,
        effect.source,
        element.remaining or 0,
        effect.rule,
        effect.reason,
        element.keep_existing,
        enforced,
        by_worker,
        effect.offence if isinstance(effect, Ban) else 0,
    )


def _serve(channel: Channel, start: Start) -> None:
    worker = Worker(channel, start)
    channel.send(Ready(0))
    worker.run()


if __name__ == "__main__":
    run_child("worker", _serve)
