"""The sweeper: judges the kernel's connection table, and kills what is to be killed.

Every couple of seconds the guarded connections are read and judged by the engine's sweep rules.
Whatever asks for a connection's death, a sweep rule, a worker's verdict, a ban or an administrator,
ends here, with one `Condemner` that condemns, provokes and confirms.
"""

from __future__ import annotations

import gc
import logging
import select
import time
from collections import Counter
from collections.abc import Iterable, Iterator

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SECOND, SWEEP_MEASURES, RuleSet
from rstguard.engine.sweep import Judgement, Objection, Sweep
from rstguard.engine.verdict import Ends, Reason
from rstguard.ipc.channel import Channel
from rstguard.ipc.measuring import Measuring
from rstguard.ipc.messages import (
    Blocked,
    Counts,
    Explain,
    Explained,
    FoundProductive,
    Kill,
    Killed,
    Learn,
    Nearest,
    NearestAre,
    NewPolicy,
    NotKilled,
    Observed,
    Offences,
    Productive,
    Ready,
    Recheck,
    Reset,
    Start,
    Stop,
    Tell,
    Unconfirmed,
    blocked_message,
)
from rstguard.kernel import KernelError
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.elements import element_of
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.sets import Sets
from rstguard.sweeper.condemner import Condemner, Result, Target
from rstguard.sweeper.condemner import select as chosen
from rstguard.sweeper.older import adopt_existing

log = logging.getLogger(__name__)

_REPORT_EVERY = SECOND
_MOST_WAIT = SECOND // 2
_HALF_OPEN_EVERY = SECOND
_MOST_TOLD = 50
"""Unconfirmed kills that are named one by one in a report."""


class Sweeper:
    """Sweeps at the policy's pace, and serves requests to kill at any time."""

    def __init__(self, channel: Channel, start: Start) -> None:
        """Open the kernel's interfaces and take in connections older than the guard.

        Raises:
            KernelError: the connection table or raw sockets cannot be had.
        """
        self._channel = channel
        self._table = Conntrack()
        self._sets = Sets()
        self._marks = Marks(start.ruleset.marks)
        self._condemner = Condemner(self._table, Injector(self._marks), self._marks)
        self._sweep = Sweep(start.ruleset)
        self._measuring = Measuring(start.ruleset, SWEEP_MEASURES)
        self._ruleset: RuleSet = start.ruleset
        self._counts: Counter[str] = Counter()
        self._kills: dict[int, Killed] = {}
        self._percents: dict[int, int] = {}
        self._kill_of: dict[Tuple, set[int]] = {}
        self._half_open_of: dict[Prefix, Blocked] = {}
        self._sweep_at = self._report_at = self._half_open_at = 0
        self._running = True
        self._counts["adopted"] = adopt_existing(self._table, start.ruleset.scope, self._marks)
        self._finish_predecessors_work()
        self._end_connections_of_banned()

    def run(self) -> None:
        """Serve until told to stop or until the supervisor is gone."""
        poll = select.poll()
        poll.register(self._channel.fileno(), select.POLLIN)
        while self._running:
            poll.poll(self._milliseconds_to_wait())
            messages = self._channel.receive()
            for message in messages:
                if isinstance(message, Learn | Tell):
                    self._measuring.obey(message)
            self._obey(messages)
            now = time.monotonic_ns()
            try:
                if now >= self._sweep_at:
                    self._sweep_at = now + self._ruleset.sweep_every
                    self._judge(now)
                if self._half_open_of and now >= self._half_open_at:
                    self._end_half_open(now)
                    # A table full of forged SYNs makes this dear; it may take a tenth of a core.
                    took = time.monotonic_ns() - now
                    self._half_open_at = now + max(_HALF_OPEN_EVERY, 10 * took)
                if self._condemner.next_step_at is not None:
                    self._step()
            except KernelError as error:
                self._counts["failed"] += 1
                log.error("%s", error)
                poll.poll(100)
            self._report(now)
            self._measuring.step(self._channel)

    def _milliseconds_to_wait(self) -> int:
        if self._measuring.telling:
            return 1
        now = time.monotonic_ns()
        at = min(self._sweep_at, now + _MOST_WAIT, self._condemner.next_step_at or now + _MOST_WAIT)
        return max(0, (at - now + 999_999) // 1_000_000)

    def _finish_predecessors_work(self) -> None:
        """Provoke what a sweeper that died had condemned, and no end of which was told."""
        begun = [
            Target(flow, Ends.BOTH, "", Reason.KILLED)
            for flow in self._table.dump(*self._marks.unfinished)
        ]
        self._condemner.start(begun, time.monotonic_ns())

    def _end_connections_of_banned(self) -> None:
        """Who was banned before now, by a predecessor or an earlier guard, holds none any more."""
        banned = [
            Blocked("ban", element.source, 0, element.rule, Reason.BANNED, element.keep_existing)
            for element in self._sets.list()
            if element.kind == "ban"
        ]
        if self._ruleset.enforce:
            self._condemn_sources(banned, time.monotonic_ns())

    def _judge(self, now: int) -> None:
        """One sweep: read, judge, carry out."""
        ruleset, measuring = self._ruleset, self._measuring
        if not (ruleset.sweeps or ruleset.lenient or measuring.active):
            return
        began = time.process_time_ns()
        gc.disable()  # a sweep makes hundreds of thousands of objects, and no cycle
        try:
            flows = list(self._table.dump(*self._marks.swept))
            judgement = self._sweep.judge(flows, now)
        finally:
            gc.enable()
        self._carry_out(judgement, now)
        percents = self._sweep.standings.percents()
        if percents != self._percents:
            self._percents = percents
            self._send(Productive(percents))
        if measuring.active:
            found = measuring.productive
            measuring.look(flows, now)
            if measuring.productive != found:
                self._send(FoundProductive(measuring.productive))
        self._counts["sweeps"] += 1
        self._counts["sweep_cpu_us"] += (time.process_time_ns() - began) // 1000
        self._counts["flows"] = len(flows)

    def _carry_out(self, judgement: Judgement, now: int) -> None:
        enforce = self._ruleset.enforce
        for objection in judgement.observed:
            rule = objection.rule
            self._count(objection)
            self._send(Observed(objection.flow.original, rule.name, REASONS[rule.measure]))
        targets = []
        for objection in judgement.condemned:
            flow, rule = objection
            self._count(objection)
            reason = REASONS[rule.measure]
            targets.append(Target(flow, rule.ends, rule.name, reason))
            self._send(Reset(flow.original, rule.ends, rule.name, reason, enforce, by_worker=False))
        if enforce:
            self._sets.add(map(element_of, judgement.blocks))
            self._condemner.start(targets, now)
        for effect in judgement.blocks:
            self._counts[f"rule.{effect.rule}"] += 1
            message = blocked_message(effect, enforce, by_worker=False)
            self._send(message)
            if enforce:
                self._condemn_sources([message], now)

    def _count(self, objection: Objection) -> None:
        self._counts[f"rule.{objection.rule.name}"] += 1

    def _obey(self, messages: Iterable[object]) -> None:
        now = time.monotonic_ns()
        banned: list[Blocked] = []
        reset: list[Reset] = []
        recheck = False  # once for all: an import of a long list asks again and again
        for message in messages:
            if isinstance(message, Blocked):
                self._half_open_of[message.source] = message
                if message.kind == "ban":
                    banned.append(message)
            elif isinstance(message, Reset):
                reset.append(message)
            elif isinstance(message, Kill):
                self._kill(message, now)
            elif isinstance(message, Recheck):
                recheck = True
            else:
                self._attend(message, now)
        try:
            if recheck:
                self._end_connections_of_banned()
            self._condemn_sources(banned, now)
            self._condemn_known(reset, now)
        except KernelError as error:
            self._counts["failed"] += 1
            log.error("%s", error)

    def _attend(self, message: object, now: int) -> None:
        """Do what concerns no connection."""
        if isinstance(message, Explain | Nearest):
            self._tell(message)
        elif isinstance(message, NewPolicy):
            self._ruleset = message.ruleset
            self._sweep = Sweep(message.ruleset, self._sweep)
            self._measuring.follow(message.ruleset)
            self._sweep_at = min(self._sweep_at, now + message.ruleset.sweep_every)
            self._send(Ready(message.generation))
        elif isinstance(message, Offences):
            self._sweep.restore(message.offences, now)
        elif isinstance(message, Stop):
            self._running = False

    def _tell(self, question: Explain | Nearest) -> None:
        if isinstance(question, Explain):
            used = self._sweep.explain(question.source)
            self._send(Explained(question.number, used))
        else:
            nearest = self._sweep.nearest(question.most)
            self._send(NearestAre(question.number, nearest))

    def _condemn_sources(self, banned: list[Blocked], now: int) -> None:
        """A source that is banned is gone with all its connections."""
        banned = [message for message in banned if not message.keep_existing]
        if not banned:
            return
        # What never was established holds no socket, and a forged flood leaves a table full of it.
        flows = self._table.dump(*self._marks.uncondemned, assured=True)
        targets = [
            Target(flow, Ends.BOTH, message.rule, Reason.BANNED)
            for flow, message in _of_sources(flows, banned)
            if not self._ruleset.scope.spares(flow.original.source)
        ]
        self._counts["ended_by_ban"] += len(targets)
        self._condemner.start(targets, now)

    def _end_half_open(self, now: int) -> None:
        """Free the server of the handshakes that a blocked source can no longer finish."""
        blocked, self._half_open_of = list(self._half_open_of.values()), {}
        flows = self._table.dump(*self._marks.half_open)
        half_open = (flow for flow in flows if flow.state == TcpState.SYN_RECV)
        targets = [
            Target(flow, Ends.DESTINATION, message.rule, message.reason)
            for flow, message in _of_sources(half_open, blocked)
            if not self._ruleset.scope.spares(flow.original.source)
        ]
        self._counts["half_open_ended"] += len(targets)
        self._condemner.start(targets, now)

    def _condemn_known(self, reset: list[Reset], now: int) -> None:
        """A worker condemned a connection by its verdict; the other end is to hear of it too."""
        if not reset:
            return
        flows = self._table.read([_named(message.flow) for message in reset])
        self._condemner.start(
            [
                Target(flow, message.ends, message.rule, message.reason)
                for flow, message in zip(flows, reset, strict=True)
                if flow is not None
            ],
            now,
        )

    def _kill(self, kill: Kill, now: int) -> None:
        flows = chosen(
            self._table.dump(), kill.source, kill.source_port, kill.destination, kill.port
        )
        self._kills[kill.number] = Killed(kill.number, len(flows), 0)
        for flow in flows:
            self._kill_of.setdefault(flow.original, set()).add(kill.number)
        self._condemner.start([Target(flow, Ends.BOTH, "", Reason.KILLED) for flow in flows], now)
        self._finish_kills({kill.number})

    def _step(self) -> None:
        progress = self._condemner.step(time.monotonic_ns())
        unconfirmed = []
        touched: set[int] = set()
        for result in progress.results:
            self._counts["confirmed" if result.confirmed else "unconfirmed"] += 1
            numbers = self._kill_of.pop(result.target.flow.original, set())
            for number in numbers:
                self._kills[number] = _with(self._kills[number], result)
            touched |= numbers
            if not numbers and not result.confirmed:
                unconfirmed.append(Unconfirmed(result.target.flow.original, result.text))
        if unconfirmed:
            self._send(NotKilled(len(unconfirmed), tuple(unconfirmed[:_MOST_TOLD])))
        self._finish_kills(touched)

    def _finish_kills(self, numbers: set[int]) -> None:
        open_ones = set().union(*self._kill_of.values())
        for number in numbers - open_ones:
            self._send(self._kills.pop(number))

    def _report(self, now: int) -> None:
        if now >= self._report_at:
            self._report_at = now + _REPORT_EVERY
            extra = {"pending": self._condemner.pending, "lost_reports": self._channel.lost}
            self._send(Counts(self._counts | extra))
        self._channel.flush()

    def _send(self, message: object) -> None:
        self._channel.send(message)


def _of_sources(
    flows: Iterable[Flow], blocked: Iterable[Blocked]
) -> Iterator[tuple[Flow, Blocked]]:
    """Yield the connections of blocked sources, each with the block that its source met."""
    by_key = {(m.source.shift, m.source.network >> m.source.shift): m for m in blocked}
    shifts = sorted({shift for shift, _ in by_key})
    for flow in flows:
        address = flow.original.source
        for shift in shifts:
            message = by_key.get((shift, address >> shift))
            if message is not None:
                yield flow, message
                break


def _with(killed: Killed, result: Result) -> Killed:
    if result.confirmed:
        return Killed(killed.number, killed.matched, killed.confirmed + 1, killed.unconfirmed)
    unconfirmed = killed.unconfirmed
    if len(unconfirmed) < _MOST_TOLD:
        unconfirmed = (*unconfirmed, Unconfirmed(result.target.flow.original, result.text))
    return Killed(killed.number, killed.matched, killed.confirmed, unconfirmed)


def _named(original: Tuple) -> Flow:
    """Return a flow that bears nothing but its name, to ask the table for the rest."""
    return Flow(0, original, original, 0, 0, False, 0, 0, 0, 0, -1, 0, 0)
