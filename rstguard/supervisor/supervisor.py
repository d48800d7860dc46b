"""The supervisor: brings the guard up, keeps it up, and takes it down whole."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rstguard.ipc.requests import Answer
from rstguard.kernel import KernelError
from rstguard.kernel.footprint import Footprint
from rstguard.observe.events import Event
from rstguard.observe.sinks import Journal, JsonLines
from rstguard.policy.compile import compile_policy
from rstguard.state.record import Record
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.capped import Capped
from rstguard.supervisor.change import Change
from rstguard.supervisor.child import StartFailed
from rstguard.supervisor.foreign import ForeignMarks
from rstguard.supervisor.fullness import Fullness
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.ingress import Ingress
from rstguard.supervisor.interfaces import Interfaces
from rstguard.supervisor.onesided import OneSided
from rstguard.supervisor.options import Options
from rstguard.supervisor.policies import Policies
from rstguard.supervisor.processes import Processes
from rstguard.supervisor.protected import Protected
from rstguard.supervisor.service import Service
from rstguard.supervisor.settings import Settings
from rstguard.supervisor.syn_budget import Budget
from rstguard.supervisor.upkeep import Upkeep

log = logging.getLogger(__name__)

Serve = Callable[[Path, Answer], Awaitable[asyncio.Server]]


class Parts(NamedTuple):
    """What a supervisor is made of; `rstguard.daemon` builds them."""

    guard: Guard
    processes: Processes
    footprint: Footprint
    record: Record
    protected: Protected
    change: Change
    bans: Bans
    capped: Capped
    policies: Policies
    upkeep: Upkeep
    settings: Settings
    one_sided: OneSided
    interfaces: Interfaces
    fullness: Fullness
    budget: Budget
    ingress: Ingress
    foreign: ForeignMarks
    service: Service


class _Stopped(Exception):
    """Somebody asked the guard to stop."""


class Supervisor:
    """One guard in one network namespace, from its start to its end."""

    def __init__(self, options: Options, parts: Parts) -> None:
        """Nothing is changed on the machine before `run`."""
        self._options = options
        self._parts = parts
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Have `run` end in order."""
        self._stop.set()

    async def run(self, answer: Answer, serve: Serve) -> None:
        """Guard until `stop`, then undo everything.

        Args:
            answer: carries out the requests of the control socket and of the web page.
            serve: listens at the control socket of a directory.

        Raises:
            KernelError: the guard could not be brought up, or not be taken down whole, or one of
                its tasks has failed.
        """
        options, parts = self._options, self._parts
        with options.claim(options.directory, options.state):
            self._open_sinks()
            await parts.record.open()
            try:
                async with asyncio.TaskGroup() as processes:
                    await self._guard(processes, answer, serve)
            except ExceptionGroup as group:
                raise _one(group) from None
            finally:
                await parts.record.close()
                parts.guard.events.close()

    async def _guard(self, processes: asyncio.TaskGroup, answer: Answer, serve: Serve) -> None:
        parts, server = self._parts, None
        try:
            await self._bring_up(processes)
            server = await serve(self._options.directory, answer)
            parts.guard.events.add(
                Event("start", parts.guard.ruleset.name, detail=parts.guard.mode)
            )
            await self._work(answer)
        finally:
            parts.service.notifier.stopping()
            if server is not None:
                server.close()
            await self._take_down()

    def _open_sinks(self) -> None:
        path, events = self._options.event_log, self._parts.guard.events
        try:
            if path is not None:
                events.sinks.append(JsonLines(path))
        except OSError as error:
            raise KernelError(
                f"the event log {path} cannot be written ({error.strerror}); name another with "
                "--event-log"
            ) from None
        if self._options.journal:
            with contextlib.suppress(OSError):  # without a journal the text log says it all
                events.sinks.append(Journal())
                logging.getLogger("rstguard.events").propagate = False

    async def _bring_up(self, processes: asyncio.TaskGroup) -> None:
        parts, guard = self._parts, self._parts.guard
        await parts.policies.begin()
        await parts.protected.look()
        guard.ruleset = parts.protected.within(compile_policy(guard.loaded.policy))
        await parts.protected.follow(guard.ruleset, guard.ruleset)
        await asyncio.to_thread(parts.footprint.prepare, guard.ruleset)
        parts.settings.tell_start()
        await parts.record.bring_back()
        guard.note_large(parts.record.large_before, asyncio.get_running_loop().time())
        for child in guard.children:
            processes.create_task(child.live(), name=child.name)
        parts.processes.asking.begin(processes)
        try:
            # Readers first: from the moment packets are diverted, somebody answers for them.
            await parts.processes.begun([*guard.workers, *guard.askers])
            await parts.upkeep.begin()
            await parts.processes.begun(guard.sweepers)
        except StartFailed as error:
            raise KernelError(str(error)) from None
        await parts.budget.follow(guard.ruleset, guard.ruleset)

    async def _work(self, answer: Answer) -> None:
        """Do all that goes on beside the processes, until `stop`.

        Raises:
            ExceptionGroup: one of the tasks failed; all others were ended.
        """
        parts = self._parts
        works: list[Coroutine[Any, Any, None]] = [
            self._until_stopped(),
            parts.record.keep(),
            parts.processes.watch(),
            parts.protected.watch(parts.change.rules),
            parts.bans.gate(),
            parts.capped.watch(),
            parts.policies.watch(),
            parts.upkeep.watch_rules(),
            parts.upkeep.watch_panic(),
            parts.settings.watch(),
            parts.one_sided.watch(),
            parts.interfaces.watch(),
            parts.fullness.watch(),
            parts.budget.apply(),
            parts.budget.look(),
            parts.ingress.watch(),
            parts.foreign.watch(),
            parts.service.attend(parts.policies.reload),
        ]
        if self._options.web is not None:
            works.append(self._options.web(answer))
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in works:
                    tasks.create_task(work)
        except ExceptionGroup as group:
            _, failed = group.split(_Stopped)
            if failed is not None:
                raise failed from None

    async def _until_stopped(self) -> None:
        await self._stop.wait()
        raise _Stopped

    async def _take_down(self) -> None:
        parts = self._parts
        parts.guard.events.add(Event("stop", parts.guard.ruleset.name))
        parts.guard.diverts = False
        (self._options.directory / "control.sock").unlink(missing_ok=True)
        try:
            # Chains go first: the worker then answers what is still queued, and no more comes.
            await asyncio.to_thread(parts.footprint.end)
            await parts.processes.stop()
        finally:
            parts.budget.end()
            await asyncio.to_thread(parts.footprint.remove, self._options.keep_bans)


def _one(group: ExceptionGroup[Exception]) -> KernelError:
    """Return what went wrong as one error; what nobody expected is logged in full."""
    sentences = []
    for error in _leaves(group):
        if isinstance(error, KernelError):
            sentences.append(str(error))
        else:
            log.error("a part of the guard failed, so it stops", exc_info=error)
            sentences.append(f"the guard stopped, as a part of it failed: {error!r}")
    return KernelError("; ".join(dict.fromkeys(sentences)))


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
