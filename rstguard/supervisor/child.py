"""The supervisor's view of a worker or sweeper process: started, watched, started again."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable

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
from rstguard.supervisor.spawn import Spawned, spawn

log = logging.getLogger(__name__)

_QUICK_DEATHS = 5
_QUICK_SECONDS = 10.0
_BACK_OFF = 1.0
_STOP_SECONDS = 3.0


class StartFailed(Exception):
    """The process reported why it cannot serve, or died before it was ready."""


class Child:
    """One process of the guard.  It is restarted at once when it dies, later if it dies often."""

    def __init__(
        self,
        name: str,
        first: Spawned,
        start: Callable[[], Iterable[ToChild]],
        on_message: Callable[[News | Reply], None],
        on_restart: Callable[[str], None],
    ) -> None:
        """Look after `first` and its successors; `start` gives the first messages to each."""
        self.name = name
        self.restarts = 0
        self.reader = ""
        self.heard_at = 0.0
        self.ready = asyncio.Event()
        self._kind = first.kind
        self._first: Spawned | None = first
        self._start = start
        self._on_message = on_message
        self._on_restart = on_restart
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: SupervisorEnd | None = None
        self._generations: dict[int, asyncio.Future[None]] = {}
        self._failure = ""
        self._last_words = ""
        """What the process said of its end, or did that ended it."""
        self._stopping = False
        self._deaths: list[float] = []
        self._before: Counter[str] = Counter()
        self._now: Counter[str] = Counter()

    @property
    def pid(self) -> int:
        """The process id, or 0 while there is none."""
        return self._process.pid if self._process and self._process.poll() is None else 0

    @property
    def totals(self) -> Counter[str]:
        """What it counted, its dead predecessors included."""
        return self._before + self._now

    def launch(self) -> None:
        """Start the process, and tell it what to do."""
        _, self._process, self._channel = self._first or spawn(self._kind)
        self._first = None
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._readable, self._channel)
        for message in self._start():
            self.send(message)

    def silent_for(self) -> float:
        """Return for how many seconds a process that should serve has told nothing."""
        return time.monotonic() - self.heard_at if self.ready.is_set() and self.pid else 0.0

    def kill(self, why: str) -> None:
        """End a process that hangs; its successor is started as after any death."""
        log.error("the %s %s; it is ended and started again", self.name, why)
        if self._process:
            self._process.kill()

    async def wait_ready(self, seconds: float) -> None:
        """Wait until the process serves.

        Raises:
            StartFailed: it cannot, and why.
        """
        waiting = asyncio.create_task(self.ready.wait())
        done, _ = await asyncio.wait({waiting}, timeout=seconds)
        if not done:
            waiting.cancel()
            raise StartFailed(f"the {self.name} did not start within {seconds:.0f} s")
        if self._failure:
            raise StartFailed(self._failure)

    def send(self, message: ToChild) -> None:
        """Send a message; a process that just died misses nothing: its successor starts anew."""
        if self._channel is None:
            return
        try:
            self._channel.send(message)
        except Closed:
            return
        if self._channel.waiting:
            asyncio.get_running_loop().call_later(0.01, self._flush, self._channel)

    def _flush(self, channel: SupervisorEnd) -> None:
        if channel is self._channel:
            try:
                channel.flush()
            except Closed:
                return
            if channel.waiting:
                asyncio.get_running_loop().call_later(0.01, self._flush, channel)

    async def adopt(self, policy: NewPolicy, seconds: float) -> None:
        """Send a new policy and wait until it is in force.  A restart meanwhile does as well.

        Raises:
            TimeoutError: no answer in time.
        """
        adopted = asyncio.get_running_loop().create_future()
        self._generations[policy.generation] = adopted
        self.send(policy)
        await asyncio.wait_for(adopted, seconds)

    def _readable(self, channel: SupervisorEnd) -> None:
        try:
            messages = channel.receive()
        except Closed as closed:
            if isinstance(closed, Garbled):
                self._last_words = str(closed)
                self.kill(self._last_words)
            self._died(channel)
            return
        self.heard_at = time.monotonic()
        for message in messages:
            if isinstance(message, Ready):
                self.reader = message.reader
                self._is_ready(message.generation)
            elif isinstance(message, Failed):
                self._last_words = message.sentence
                if not self.ready.is_set():
                    self._failure = message.sentence
                    self.ready.set()
            elif isinstance(message, Counts):
                self._now = Counter(message.totals)
            else:
                self._on_message(message)

    def _is_ready(self, generation: int) -> None:
        self.ready.set()
        waiting = list(self._generations.values()) if generation == 0 else []
        if adopted := self._generations.pop(generation, None):
            waiting.append(adopted)
        for future in waiting:
            if not future.done():
                future.set_result(None)
        if generation == 0:
            self._generations.clear()

    def _died(self, channel: SupervisorEnd) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(channel.fileno())
        channel.close()
        self._channel = None
        first_start = not self.ready.is_set()
        if not self._failure and first_start and not self._stopping:
            self._failure = f"the {self.name} died while starting; its output above says why"
        if self._stopping or self._failure:
            self.ready.set()
            return
        self.ready.clear()
        self._before += self._now
        self._now = Counter()
        self.restarts += 1
        now = time.monotonic()
        self._deaths = [d for d in self._deaths if now - d < _QUICK_SECONDS] + [now]
        delay = _BACK_OFF if len(self._deaths) > _QUICK_DEATHS else 0.0
        loop.call_later(delay, self._again)

    def _again(self) -> None:
        status = self._process.wait() if self._process else None
        words, self._last_words = self._last_words or f"status {status}", ""
        self._on_restart(f"the {self.name} died ({words}) and was started again")
        if not self._stopping:
            self.launch()

    async def stop(self) -> None:
        """Ask the process to finish; end it if it does not within three seconds."""
        self._stopping = True
        process = self._process
        if process is None:
            return
        self.send(Stop())
        deadline = time.monotonic() + _STOP_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if process.poll() is None:
            log.warning("the %s did not stop in time and was ended", self.name)
            process.kill()
        process.wait()
