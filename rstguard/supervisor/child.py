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
from rstguard.ipc.values import LATEST
from rstguard.supervisor.backoff import Backoff
from rstguard.supervisor.sending import Sending
from rstguard.supervisor.spawn import REAP_SECONDS, Kind, Process, Spawn, Spawned, fate_of

log = logging.getLogger(__name__)

READY_SECONDS: Final = 15.0
"""How long a process may take from its start until it serves."""
CALM_SECONDS: Final = 10.0
"""So long without a death, and the next one is the first again: its successor starts at once."""
_STOP_SECONDS: Final = 3.0
_PATIENCE: Final = {"worker": 5.0, "asker": 5.0, "sweeper": 60.0}
"""Seconds without a word after which a process that serves is given up.  Worker and asker report
twice a second; one sweep over a million connections takes some ten seconds."""


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
        self._sending: Sending | None = None
        self._ended = asyncio.Event()
        self._settled = asyncio.Event()
        """Set once it serves, or has failed, for the first time."""
        self._said = self._failure = ""
        """Why the present process ends, as it or its supervisor said; why the first one did."""
        self._heard_at = 0.0
        self._stopping = asyncio.Event()
        self._waits: dict[int, asyncio.Future[None]] = {}
        self._backoff = Backoff(at_once=3, first=0.1, longest=0.5, calm=CALM_SECONDS, weary=5.0)
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
            self._before += Counter({n: c for n, c in self._now.items() if n not in LATEST})
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
        self._process, self._channel, self._sending = process, channel, Sending(channel)
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
            self._sending.close()
            channel.close()
            self._channel = self._sending = None
        fate = await fate_of(process)
        return self._said or fate

    def _late(self) -> None:
        if not self.serves:
            self.end(f"was not ready after {READY_SECONDS:.0f} s")

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
        patience = _PATIENCE[self.kind]
        return patience if self.silent_for() > patience else 0.0

    def silent_for(self) -> float:
        """Return for how many seconds a process that should serve has told nothing."""
        return asyncio.get_running_loop().time() - self._heard_at if self.serves else 0.0

    def forgive(self) -> None:
        """Forget a silence: nobody listened meanwhile."""
        self._heard_at = asyncio.get_running_loop().time()

    def end(self, why: str) -> None:
        """Kill a process; its successor is started as after any death."""
        self._said = why
        log.error("the %s %s; killing and restarting it", self.name, why)
        if self._process:
            self._process.kill()
        self._ended.set()

    def send(self, message: ToChild) -> None:
        """Send a message to the process, if there is one: each begins with all that it needs."""
        if self._sending is not None:
            self._sending.send(message)

    async def adopt(self, policy: NewPolicy, seconds: float) -> None:
        """Send a new policy and wait until it is in force, for `seconds` at most.

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
            self._backoff.succeeded(asyncio.get_running_loop().time())
            self._become(State.SERVING, "")
            self._settled.set()
        for generation, adopted in self._waits.items():
            if message.generation in (0, generation) and not adopted.done():
                adopted.set_result(None)

    async def stop(self) -> None:
        """Ask the process to finish; kill it if it does not within three seconds."""
        self._stopping.set()
        if self._first is not None:  # nobody has told it anything yet
            self._first.channel.close()
            self._first.process.kill()
        self.send(Stop())
        loop = asyncio.get_running_loop()
        end = loop.time() + _STOP_SECONDS
        process = self._process
        while process and process.poll() is None:
            if loop.time() > end:
                log.warning("the %s did not stop in time and was killed", self.name)
                process.kill()
                end += REAP_SECONDS
            await asyncio.sleep(0.01)
        self._ended.set()
