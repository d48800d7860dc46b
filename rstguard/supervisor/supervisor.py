"""The supervisor: brings the guard up, keeps it up, changes its policy, and takes it down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rstguard.engine.address import Prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.shedding import UNDONE, Level
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import (
    Blocked,
    Explained,
    Killed,
    NearestAre,
    NewPolicy,
    NotKilled,
    Observed,
    Overloaded,
    Productive,
    Reset,
    Start,
)
from rstguard.ipc.requests import Answer, ControlError
from rstguard.kernel import KernelError, cookies
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.sets import Sets
from rstguard.observe.events import Event, EventLog
from rstguard.observe.sinks import Journal, JsonLines
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import Loaded
from rstguard.state.record import Record
from rstguard.supervisor.ban_cap import BanCap
from rstguard.supervisor.child import Child, StartFailed
from rstguard.supervisor.claims import claim
from rstguard.supervisor.inquiry import Inquiry
from rstguard.supervisor.kills import Kills
from rstguard.supervisor.learning import Learning
from rstguard.supervisor.options import Options
from rstguard.supervisor.policies import Policies
from rstguard.supervisor.service import Service, mode_of
from rstguard.supervisor.spawn import Spawned
from rstguard.supervisor.syn_budget import Budget
from rstguard.supervisor.upkeep import Upkeep

log = logging.getLogger(__name__)

_READY_SECONDS = 15.0
_ADOPT_SECONDS = 10.0  # twice, if the old policy must come back, in the time a client waits
_WORKER_PATIENCE = 5.0  # it reports twice a second
_SWEEPER_PATIENCE = 60.0  # one sweep over a million connections takes some ten seconds
_PICKUP_SECONDS = 120.0
"""How long connections that an idle tracker could not know may still be taken up."""


class Supervisor:
    """One guard in one network namespace."""

    def __init__(self, options: Options) -> None:
        """Compile the policy; nothing is changed on the machine before `run`."""
        self.options = options
        self.loaded = options.policy
        self.file = options.file
        self.ruleset: RuleSet = compile_policy(options.policy.policy)
        self.generation = 0
        self.events = EventLog()
        self.record = Record(options.state)
        self.policies = Policies(self)
        self.explained: Inquiry[Explained] = Inquiry()
        self.nearest: Inquiry[NearestAre] = Inquiry()
        self.started = time.monotonic()
        *workers, sweeper = options.spawned
        self.queues = range(options.queue, options.queue + len(workers))
        self.footprint = Footprint(options.directory, self.queues)
        self.workers = list(map(self._child, workers, self.queues))
        self.sweeper = self._child(sweeper, options.queue)
        self.budget = Budget(self.footprint, self.events, self._rewrite)
        self.changing = asyncio.Lock()
        """Held by whoever changes rules or policy: they must not meet half-way."""
        self.upkeep = Upkeep(self)
        self._cap = BanCap()
        self.runaway = ""
        """Why the policy only observes though it says enforce, or ""."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.overload: dict[int, Level] = {}
        self.productive = Productive({})
        self.kills = Kills(self)
        self.learning = Learning(self)
        self._stop = asyncio.Event()
        self.service = Service(options.file, self._mute, self._summary)

    def _child(self, first: Spawned, queue: int) -> Child:
        several = first.kind == "worker" and len(self.queues) > 1
        index = queue - self.options.queue
        return Child(
            f"worker of queue {queue}" if several else first.kind,
            first,
            lambda: (
                Start(self.ruleset, queue, index),
                *self.record.offences(),
                self.productive,
                *self.learning.first(),
            ),
            self._heard,
            self._restarted,
        )

    @property
    def children(self) -> list[Child]:
        """All processes but this one."""
        return [*self.workers, self.sweeper]

    async def run(
        self, answer: Answer, serve: Callable[[Path, Answer], Awaitable[asyncio.Server]]
    ) -> None:
        """Guard until SIGTERM or SIGINT, then undo everything.

        Args:
            answer: carries out the requests of the control socket and of the web page.
            serve: listens at the control socket of a directory.

        Raises:
            KernelError: the guard could not be brought up, or not be taken down whole.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        self.service.listen()
        claims = claim(self.options.directory, self.options.state)
        server: asyncio.Server | None = None
        self._open_sinks()
        self.record.open()
        keeping = asyncio.create_task(self.record.keep())
        try:
            self.loaded, self.file = self.policies.begin(self.loaded, self.file)
            self.upkeep.look_for_lifelines()
            self.ruleset = self.upkeep.spare(compile_policy(self.loaded.policy))
            self.upkeep.spares(self.ruleset)
            await self._bring_up()
            server = await serve(self.options.directory, answer)
            self.events.add(Event("start", self.ruleset.name, detail=mode_of(self.ruleset)))
            watching = [
                asyncio.create_task(self._watch()),
                asyncio.create_task(self.upkeep.watch()),
                asyncio.create_task(self.service.attend(self.policies.reload)),
            ]
            if self.options.web is not None:
                watching.append(asyncio.create_task(self.options.web(answer)))
            await self._stop.wait()
            for task in watching:
                task.cancel()
        finally:
            self.service.notifier.stopping()
            if server is not None:
                server.close()
            keeping.cancel()
            try:
                await self._take_down()
            finally:
                self.record.close()
                self.events.close()
                claims.close()

    def _open_sinks(self) -> None:
        path = self.options.event_log
        try:
            if path is not None:
                self.events.sinks.append(JsonLines(path))
        except OSError as error:
            raise KernelError(
                f"the event log {path} cannot be written ({error.strerror}); name another with "
                "--event-log"
            ) from None
        if self.options.journal:
            with contextlib.suppress(OSError):  # without a journal the text log says it all
                self.events.sinks.append(Journal())
                logging.getLogger("rstguard.events").propagate = False

    async def _watch(self) -> None:
        """End a process that has stopped telling of itself: it answers for no packet either."""
        while True:
            await asyncio.sleep(1)
            self.events.tick()
            for child in self.children:
                patience = self._patience(child)
                if child.silent_for() > patience:
                    child.kill(f"has not been heard of for {patience:.0f} s")

    def _patience(self, child: Child) -> float:
        return _SWEEPER_PATIENCE if child is self.sweeper else _WORKER_PATIENCE

    def _mute(self) -> str:
        """Name a process that does not answer, one that is still being started again too."""
        for child in self.children:
            serves = child.pid and child.ready.is_set()
            if not serves or child.silent_for() > self._patience(child):
                return child.name
        return ""

    def _summary(self) -> str:
        count = len(self.workers)
        workers = "1 worker" if count == 1 else f"{count} workers"
        return f"filtering by policy {self.ruleset.name} ({mode_of(self.ruleset)}), {workers}"

    async def _bring_up(self) -> None:
        tracking = self.footprint.prepare(self.ruleset)
        self.record.bring_back()
        # A pure ACK with a cookie must not be taken for an older connection.
        if tracking or cookies.in_force(self.ruleset):
            self.footprint.forbid_pickup()
        else:
            asyncio.get_running_loop().call_later(_PICKUP_SECONDS, self._forbid_pickup)
        for child in self.children:
            child.launch()
        try:
            # Readers first: from the moment packets are diverted, somebody answers for them.
            for worker in self.workers:
                await worker.wait_ready(_READY_SECONDS)
            await self.upkeep.begin()
            await self.sweeper.wait_ready(_READY_SECONDS)
        except StartFailed as error:
            raise KernelError(str(error)) from None
        self.budget.follow(self.ruleset)

    async def _rewrite(self) -> None:
        async with self.changing:
            if not self.upkeep.panic:
                await asyncio.to_thread(self.footprint.divert, self.ruleset)

    def _forbid_pickup(self) -> None:
        try:
            self.footprint.forbid_pickup()
        except KernelError as error:
            log.error("%s", error)

    async def _take_down(self) -> None:
        self.events.add(Event("stop", self.ruleset.name))
        self.budget.stop()
        (self.options.directory / "control.sock").unlink(missing_ok=True)
        try:
            # Chains go first: the worker then answers what is still queued, and no more comes.
            self.footprint.withdraw()
            await asyncio.gather(*(child.stop() for child in self.children))
        finally:
            self.footprint.remove(self.options.keep_bans)

    def _restarted(self, sentence: str) -> None:
        self.events.add(Event("restart", "process", detail=sentence))
        self.learning.died()

    async def change_policy(self, loaded: Loaded, file: str) -> None:
        """Replace the policy everywhere; unchanged rules keep their counts, no packet is lost.

        Raises:
            ControlError: something refused; the old policy is in force.
        """
        await asyncio.to_thread(self.upkeep.look_for_lifelines)
        new = self.upkeep.spare(compile_policy(loaded.policy))
        await self.change_ruleset(lambda _: new)
        self.loaded, self.file, self.runaway = loaded, file, ""
        self.events.add(Event("policy", self.ruleset.name, detail=mode_of(self.ruleset)))

    async def change_ruleset(self, change: Callable[[RuleSet], RuleSet]) -> None:
        """Replace the compiled policy everywhere, kernel and processes.

        `change` is given the policy in force once nobody else changes it.

        Raises:
            ControlError: something refused; the old one is in force.
        """
        async with self.changing:
            old = self.ruleset
            new = self.ruleset = change(old)
            try:
                await self._adopt(new)
                if cookies.in_force(new):
                    self.footprint.forbid_pickup()
                self.footprint.replace(old, new, divert=not self.upkeep.panic)
                self.budget.follow(new)
                self.upkeep.spares(new)
                self.learning.follow(old, new)
            except (KernelError, TimeoutError) as error:
                self.ruleset = old
                with contextlib.suppress(TimeoutError):
                    await self._adopt(old)
                said = str(error) or "a process of the guard did not answer in time"
                sentence = f"the policy was not applied, the old one stays: {said}"
                raise ControlError(sentence) from None

    async def _run_away(self) -> None:
        """Change nothing any more, and lift the bans of the last minute."""
        most = self.ruleset.bans_per_minute
        self.runaway = (
            f"policy {self.ruleset.name} banned more than {most} sources in a minute and only "
            "observes now: see `rstguard events`, mend it, and apply it again"
        )
        log.error("RUNAWAY POLICY: %s", self.runaway)
        self.events.add(Event("runaway", self.ruleset.name, detail=self.runaway))
        # Whoever applied another policy meanwhile has judged for himself.
        await self.change_ruleset(
            lambda now: replace(now, enforce=now.enforce and not self.runaway)
        )
        lifted = self._cap.take()
        await asyncio.to_thread(self._lift, lifted)
        for source in lifted:
            self.record.unblocked(str(source))

    def _lift(self, sources: list[Prefix]) -> None:
        with Sets() as sets:
            for source in sources:
                sets.remove(source)

    async def _adopt(self, ruleset: RuleSet) -> None:
        self.generation += 1
        message = NewPolicy(ruleset, self.generation)
        await asyncio.gather(*(child.adopt(message, _ADOPT_SECONDS) for child in self.children))

    @property
    def counts(self) -> Counter[str]:
        """What all processes counted since the guard started."""
        return sum((child.totals for child in self.children), Counter())

    def _heard(self, message: Any) -> None:
        """Note what a worker or the sweeper did, and pass on what concerns connections."""
        match message:
            case Blocked() | Reset() | Observed():
                self._decided(message)
            case Explained():
                self.explained.heard(message)
            case NearestAre():
                self.nearest.heard(message)
            case Productive():
                self.productive = message
                for worker in self.workers:
                    worker.send(message)
            case Overloaded():
                self._overloaded(message)
            case Killed():
                self.kills.heard(message)
            case NotKilled():
                for one in message.unconfirmed:
                    self.events.add(Event("not_killed", str(one.flow), detail=one.sentence))
            case _:
                self.learning.heard(message)

    def _decided(self, message: Blocked | Reset | Observed) -> None:
        if isinstance(message, Blocked):
            self.blocked(message)
            return
        kind = "reset" if isinstance(message, Reset) else "observed"
        enforced = not isinstance(message, Reset) or message.enforced
        flow, rule, reason = str(message.flow), message.rule, message.reason
        self.events.add(Event(kind, flow, rule, reason, enforced=enforced))
        if isinstance(message, Reset) and enforced and message.known and message.by_worker:
            self.sweeper.send(message)

    def _overloaded(self, message: Overloaded) -> None:
        alive = {worker.pid for worker in self.workers}
        self.overload = {pid: level for pid, level in self.overload.items() if pid in alive}
        self.overload[message.pid] = message.level
        if message.level:
            self.learning.overrun()
        self.events.add(Event("overload", f"worker {message.pid}", detail=UNDONE[message.level]))

    def blocked(self, message: Blocked) -> None:
        """Note a ban or shun; a ban also ends the source's connections."""
        event = Event(
            message.kind,
            str(message.source),
            message.rule,
            message.reason,
            detail=f"for {message.seconds} s",
            enforced=message.enforced,
        )
        self.events.add(event)
        if message.enforced:
            self.record.blocked(message)
            self._count_ban(message)
            if message.by_worker:
                self.sweeper.send(message)

    def _count_ban(self, message: Blocked) -> None:
        if message.kind != "ban" or message.reason is Reason.KILLED:
            return
        over = self._cap.over(message.source, self.ruleset.bans_per_minute, time.monotonic())
        if over and self.ruleset.enforce and not self.runaway:
            task = asyncio.ensure_future(self._run_away())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
