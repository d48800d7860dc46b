"""Processes that a test plays itself: real channels, no programs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from rstguard.ipc.channel import Closed, child_end, pair, supervisor_end
from rstguard.ipc.messages import FromChild, NewPolicy, Ready, Start, Stop
from rstguard.supervisor.child import Child
from rstguard.supervisor.spawn import Kind, Spawned

EPERM = 1


class Played:
    """One process: it says what the test has it say, and ends when it is killed or told so."""

    def __init__(self, pid: int) -> None:
        ours, theirs = pair()
        self.pid = pid
        self.ours, self.theirs = supervisor_end(ours), child_end(theirs)
        self.status: int | None = None
        self.heard: list[object] = []

    def poll(self) -> int | None:
        """Return its exit status, as Popen does."""
        return self.status

    def kill(self) -> None:
        """End it, as SIGKILL does."""
        self.end(-9)

    def end(self, status: int) -> None:
        """End with an exit status; the kernel closes its channel."""
        if self.status is None:
            self.status = status
            self.theirs.close()

    def say(self, message: FromChild) -> None:
        """Send a message to the supervisor."""
        self.theirs.send(message)

    def listen(self) -> list[object]:
        """Return what it was told so far."""
        if self.status is None:
            with suppress(Closed):
                self.heard += self.theirs.receive()
        return self.heard


class Stage:
    """Starts played processes, and keeps them all; the last one is on stage."""

    def __init__(self) -> None:
        self.all: list[Played] = []
        self.refusals: list[OSError] = []
        """What the next starts end with instead."""
        self.on_start: Callable[[Played], None] = lambda _: None

    @property
    def last(self) -> Played:
        """The process that was started last."""
        return self.all[-1]

    def spawn(self, kind: Kind) -> Spawned:
        """Start one, or fail as a machine without processes or descriptors does."""
        if self.refusals:
            raise self.refusals.pop(0)
        one = Played(1000 + len(self.all))
        self.all.append(one)
        asyncio.get_running_loop().call_soon(self.on_start, one)
        return Spawned(kind, one, one.ours)


def obedient(one: Played) -> None:
    """Have a process serve, adopt policies, and stop when told, as real ones do."""

    def look() -> None:
        for message in one.listen()[:]:
            one.heard.remove(message)
            if isinstance(message, Start):
                one.say(Ready(0))
            elif isinstance(message, NewPolicy):
                one.say(Ready(message.generation))
            elif isinstance(message, Stop):
                asyncio.get_running_loop().remove_reader(one.theirs.fileno())
                one.end(0)
                return

    loop = asyncio.get_running_loop()
    descriptor = one.theirs.fileno()
    loop.add_reader(descriptor, look)
    kill = one.end

    def end(status: int) -> None:
        if one.status is None:
            loop.remove_reader(descriptor)
        kill(status)

    one.end = end  # type: ignore[method-assign]


class Told(list[tuple[str, str]]):
    """The changes of state that were told: the state and the reason."""

    def __call__(self, child: Child, reason: str) -> None:
        self.append((child.state.value, reason))

    @property
    def states(self) -> list[str]:
        """The states alone."""
        return [state for state, _ in self]
