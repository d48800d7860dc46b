"""The life of one process of the guard, as a machine of named states.

    STARTING --Ready--> SERVING
    STARTING, SERVING --it died, failed or fell silent--> BACKOFF --after a while--> STARTING
    STARTING --the first start of all did not succeed--> FAILED
    any --stop--> STOPPED

Each change is told with its reason.  A process that cannot be started is tried again for as long as
the guard runs; only at the guard's own start is it an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final

from rstguard.ipc.channel import Closed, Garbled, SupervisorEnd
from rstguard.ipc.messages import (
    Counts,
    Failed,
    NewPolicy,
    News,
    Ready,
    Reply,
    Stop,
    ToChild,
)
from rstguard.kernel.confine import cause_of_death
from rstguard.supervisor.backoff import Backoff
from rstguard.supervisor.spawn import Kind, Process, Spawn, Spawned

log = logging.getLogger(__name__)

READY_SECONDS: Final = 15.0
"""How long a process may take from its start until it serves."""
_STOP_SECONDS: Final = 3.0
_REAP_SECONDS: Final = 5.0
_FLUSH_SECONDS: Final = 0.01
_PATIENCE: Final = {"worker": 5.0, "sweeper": 60.0}
"""Seconds without a word after which a process that serves is given up.  A worker reports twice a
second; one sweep over a million connections takes some ten seconds."""


class State(Enum):
    """Where a process is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPED = "stopped"


class StartFailed(Exception):
    """A process cannot serve at the guard's start; the text says why."""


class Child:
    """One worker or the sweeper, and its successors."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        spawn: Spawn,
        first: Spawned | None,
        start: Callable[[], Iterable[ToChild]],
        hear: Callable[[News | Reply], None],
        changed: Callable[[Child, str], None],
    ) -> None:
        """Nothing happens before `live`.

        Args:
            name: what people call it.
            kind: what program it is.
            spawn: starts a process of a kind.
            first: a process that was started already, which is taken first.
            start: returns the first messages to each.
            hear: takes every message that does not concern the process's own life.
            changed: is told each change of `state`, and the reason or "".
        """
        self.name = name
        self.kind: Final = kind
        self.state = State.STARTING
        self.restarts = 0
        self.reader = ""
        """What a worker's packets are read by."""
        self._spawn = spawn
        self._first = first
        self._start = start
        self._hear = hear
        self._changed = changed
        self._process: Process | None = None
        self._channel: SupervisorEnd | None = None
        self._ended = asyncio.Event()
        self._settled = asyncio.Event()
        """Set once it serves, or has failed, for the first time."""
        self._said = self._failure = ""
        """Why the present process ends, as it or its supervisor said; why the first one did."""
        self._heard_at = 0.0
        self._stopping = asyncio.Event()
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._backoff = Backoff(at_once=3, first=0.1, longest=0.5, calm=10, weary=5.0)
        self._before: Counter[str] = Counter()
        self._now: Counter[str] = Counter()

    @property
    def pid(self) -> int:
        """The process id, or 0 while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    @property
    def serves(self) -> bool:
        """Whether it is at work, as far as is known."""
        return self.state is State.SERVING

    @property
    def totals(self) -> Counter[str]:
        """What it counted, its dead predecessors included."""
        return self._before + self._now

    async def live(self) -> None:
        """Keep a process running; returns after `stop`, or if the first one cannot serve."""
        loop = asyncio.get_running_loop()
        while True:
            reason = await self._one_life()
            if self._stopping.is_set():
                break
            if not self._settled.is_set():
                self._failure = self._said or f"the {self.name} {reason} before it could serve"
                self._become(State.FAILED, reason)
                self._settled.set()
                return
            self._before += self._now
            self._now = Counter()
            self.restarts += 1
            delay = self._backoff.failed(loop.time())
            again = f"{reason}; started again" + (f" in {delay:g} s" if delay else "")
            self._become(State.BACKOFF, again)
            log.warning("the %s %s", self.name, again)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
                break
        self._become(State.STOPPED, "")

    async def _one_life(self) -> str:
        """Start a process and return why it has ended."""
        self._said = ""
        self._ended.clear()
        self._become(State.STARTING, "")
        try:
            spawned, self._first = self._first or self._spawn(self.kind), None
        except OSError as error:
            return f"could not be started ({error.strerror or error})"
        _, process, channel = spawned
        self._process, self._channel = process, channel
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        loop.add_reader(channel.fileno(), self._readable, channel)
        for message in self._start():
            self.send(message)
        late = loop.call_later(READY_SECONDS, self._late)
        try:
            await self._ended.wait()
        finally:
            late.cancel()
            loop.remove_reader(channel.fileno())
            channel.close()
            self._channel = None
        return self._said or await self._fate(process)

    def _late(self) -> None:
        if self.state is State.STARTING:
            self.end(f"was not ready after {READY_SECONDS:.0f} s")

    async def _fate(self, process: Process) -> str:
        """Return how a process ended that has closed its channel; one that lives on is killed."""
        end = asyncio.get_running_loop().time() + _REAP_SECONDS
        while (status := process.poll()) is None:
            if asyncio.get_running_loop().time() > end - _REAP_SECONDS / 2:
                process.kill()
            if asyncio.get_running_loop().time() > end:
                return "closed its channel, and does not end"
            await asyncio.sleep(0.005)
        return cause_of_death(status)

    def _become(self, state: State, reason: str) -> None:
        if state is not self.state or state is State.STARTING:
            self.state = state
            self._changed(self, reason)

    async def wait_served(self) -> None:
        """Wait until it serves for the first time.

        Raises:
            StartFailed: it cannot, and why.
        """
        await self._settled.wait()
        if self.state is State.FAILED:
            raise StartFailed(self._failure)

    def overdue(self) -> float:
        """Return its patience (seconds) if a process that serves was silent for longer, else 0.

        What waits in its channel is read first: the supervisor may itself have been stopped, or
        starved, all the while.
        """
        if self._channel is None or not self.serves:
            return 0.0
        self._readable(self._channel)
        silent = asyncio.get_running_loop().time() - self._heard_at
        return _PATIENCE[self.kind] if silent > _PATIENCE[self.kind] else 0.0

    def silent_for(self) -> float:
        """Return for how many seconds a process that should serve has told nothing."""
        return asyncio.get_running_loop().time() - self._heard_at if self.serves else 0.0

    def forgive(self) -> None:
        """Forget a silence: nobody listened meanwhile."""
        self._heard_at = asyncio.get_running_loop().time()

    def end(self, why: str) -> None:
        """Kill a process; its successor is started as after any death."""
        self._said = why
        log.error("the %s %s; it is killed and started again", self.name, why)
        if self._process:
            self._process.kill()
        self._ended.set()

    def send(self, message: ToChild) -> None:
        """Send a message; a process that just died misses nothing: its successor starts anew."""
        channel = self._channel
        if channel is None:
            return
        with contextlib.suppress(Closed):
            channel.send(message)
        self._flush_later(channel)

    def _flush_later(self, channel: SupervisorEnd) -> None:
        if channel.waiting and channel is self._channel:
            asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self._flush, channel)

    def _flush(self, channel: SupervisorEnd) -> None:
        if channel is self._channel:
            with contextlib.suppress(Closed):
                channel.flush()
                self._flush_later(channel)

    async def adopt(self, policy: NewPolicy, seconds: float) -> None:
        """Send a new policy and wait until it is in force.

        One that is starting may have been started with the old policy: it reads this after that,
        and is not waited for.

        Raises:
            TimeoutError: no answer in time.
        """
        self.send(policy)
        if not self.serves:
            return
        adopted = self._waits[policy.generation] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(adopted, seconds)
        finally:
            self._waits.pop(policy.generation, None)

    def _readable(self, channel: SupervisorEnd) -> None:
        try:
            messages = channel.receive()
        except Garbled as garbled:
            self.end(str(garbled))
            return
        except Closed:
            self._ended.set()
            return
        if messages:
            self.forgive()
        for message in messages:
            if isinstance(message, Ready):
                self._ready(message)
            elif isinstance(message, Failed):
                self._said = message.sentence
            elif isinstance(message, Counts):
                self._now = Counter(message.totals)
            else:
                self._hear(message)

    def _ready(self, message: Ready) -> None:
        self.reader = message.reader
        if message.generation == 0:
            self._become(State.SERVING, "")
            self._settled.set()
        for generation, adopted in self._waits.items():
            if message.generation in (0, generation) and not adopted.done():
                adopted.set_result(None)

    async def stop(self) -> None:
        """Ask the process to finish; kill it if it does not within three seconds."""
        self._stopping.set()
        self.send(Stop())
        loop = asyncio.get_running_loop()
        end = loop.time() + _STOP_SECONDS
        process = self._process
        while process and process.poll() is None:
            if loop.time() > end:
                log.warning("the %s did not stop in time and was killed", self.name)
                process.kill()
                end += _REAP_SECONDS
            await asyncio.sleep(0.01)
        self._ended.set()
