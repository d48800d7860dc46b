"""A worker's judging: batches of packets in, verdicts out, each packet exactly one.

Packets come in batches, of one if no more wait.  Each is parsed and judged, then all get their
verdicts with one system call.  What decisions ask for besides is carried out right after
(`rstguard.worker.acting`), the first of a batch at once, the others together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from rstguard.engine.engine import Decide
from rstguard.engine.ruleset import Measure, RuleSet
from rstguard.engine.verdict import PASS, Decision, Reason, Verdict
from rstguard.engine.wire import HANDSHAKE, KNOWN, SYN, Malformed, Packet, parse
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import MOST, Queued
from rstguard.kernel.nfqueue import Verdict as NumberedVerdict
from rstguard.kernel.seam import PacketQueue

log = logging.getLogger(__name__)

_BATCHES_IN_A_ROW: Final = 8
"""Batches of packets after which the worker looks for messages even if more are waiting.

A batch is what waits already, at most 64 packets: the first of them has its verdict when the last
is judged, well under a millisecond later.
"""
_NOT_JUDGED: Final = Malformed("not judged")
_DROPPED: Final = Decision(Verdict.DROP, Reason.PASSED)
"""For a packet that could not be judged, under `on_failure: closed`, also in observe mode."""


class CarryOut(Protocol):
    """What carries out decisions: `rstguard.worker.acting.Acting`."""

    def note(self, packet: Packet, decision: Decision, refused: bool) -> bool:
        """Take a decision of a rule; tell whether it asks for anything to be done."""

    def carry_out(self) -> None:
        """Do all that was noted and asks for it."""


class Judging:
    """Reads one queue and answers for every packet of it.

    `decide` is what judges, and may be exchanged at any time.  `packets` counts them.
    """

    def __init__(
        self,
        queue: PacketQueue,
        decide: Decide,
        acting: CarryOut,
        counts: Counter[str],
        clock: Callable[[], int],
        marks: Marks,
    ) -> None:
        """Judge the packets of `queue`; `clock` tells monotonic nanoseconds."""
        self._condemned_for, self._trust = marks.condemned_for, marks.trust.value
        self._states, self._base = marks.states, marks.base
        self._ours, self._others = marks.mask, 0xFFFFFFFF ^ marks.mask
        self._queue, self._acting, self._counts, self._clock = queue, acting, counts, clock
        self.decide = decide
        self.packets = 0

    def follow(self, ruleset: RuleSet) -> None:
        """Take up what a policy says of verdicts; its rules come with `decide`."""
        self._enforce = ruleset.enforce
        self._fail_open = ruleset.fail_open
        self._want_scale = any(rule.measure is Measure.STALLED for rule in ruleset.rules)
        self._whole = SYN if self._want_scale else 0

    def work_off(self) -> bool:
        """Judge what waits, some batches of it; tell whether nothing is left."""
        for _ in range(_BATCHES_IN_A_ROW):
            batch = self._queue.receive(MOST, self._whole)
            if batch:
                self._judge(batch)
            self.packets += len(batch)
            if len(batch) < MOST:
                return True
        return False

    def _judge(self, batch: list[Queued]) -> None:
        """Judge a batch, every packet of it, whatever happens on the way."""
        try:
            self._give_verdicts(batch)
        except BaseException:
            # This process is about to end: what has no verdict yet fares as the policy says.
            self._queue.give([(batch[-1][0], self._fail_open, None)])
            raise

    def _give_verdicts(self, batch: list[Queued]) -> None:
        """Judge a batch and give its verdicts.  This runs for every diverted packet."""
        decide, now = self.decide, self._clock()  # they all were there by now
        verdicts: list[NumberedVerdict] = []
        ours, passing, first = self._ours, 0, True
        for number, mark, data in batch:
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
            verdict, asks = self._settle(number, mark, packet, decision)
            verdicts.append(verdict)
            if asks and first:
                self._queue.give(verdicts)
                self._acting.carry_out()
                verdicts, first, now = [], False, self._clock()
        if passing:
            verdicts.append((passing, True, None))
        if verdicts:
            self._queue.give(verdicts)
        if not first:
            self._acting.carry_out()

    def _parse(self, data: bytes, mark: int) -> Packet | Malformed:
        return parse(data, self._states[mark >> self._base & 255], self._want_scale)

    def _settle(
        self, number: int, mark: int, packet: Packet | Malformed, decision: Decision
    ) -> tuple[NumberedVerdict, bool]:
        """Return a packet's verdict, and whether its decision asks for more than that."""
        # A policy that only observes still spares trusted connections the way through the queue.
        verdict = decision.verdict if self._enforce or decision is _DROPPED else Verdict.ACCEPT
        refused, asks = verdict is not Verdict.ACCEPT and _by_cookie(packet), False
        if decision.rule:
            assert isinstance(packet, Packet)
            asks = self._acting.note(packet, decision, refused)
        elif decision.reason is Reason.UNREADABLE:
            self._counts["unreadable"] += 1
        if verdict is Verdict.DROP or refused:
            return (number, False, None), asks
        mark &= self._others
        if verdict is Verdict.RESET:
            mark |= self._condemned_for[decision.ends]
        elif decision.trust:
            mark |= self._trust
        return (number, True, mark), asks

    def _failed(self, error: Exception) -> Decision:
        """The engine failed on a packet: it passes or not as the policy's on_failure says."""
        self._counts["failed"] += 1
        if self._counts["failed"] == 1:
            text = "a packet could not be judged; on_failure applies (reported once)"
            log.error(text, exc_info=error)
        return PASS if self._fail_open else _DROPPED


def _by_cookie(packet: Packet | Malformed) -> bool:
    """Tell whether a SYN is the kernel's own, for a client that has returned a cookie.

    There is no connection that a mark could condemn yet, but a client that believes in one: to
    refuse it is to drop the SYN and to send the client a RST.
    """
    if not isinstance(packet, Packet):
        return False
    return packet.flags & HANDSHAKE == SYN and bool(packet.state & KNOWN)
