"""Starts processes of the guard.  A process that was started waits to be told what to do.

So the first ones can be started before it is known: they come up while the policy is read, which
takes as long.  One that nobody wants after all sees its channel close, and ends.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, Protocol

from rstguard.ipc.channel import SupervisorEnd, pair, supervisor_end
from rstguard.ipc.entry import CHANNEL_FD, take_priority
from rstguard.kernel import KernelError
from rstguard.kernel.command import own_program
from rstguard.kernel.command import spawn as start
from rstguard.kernel.confine import cause_of_death

_PRIORITY: Final = -5
"""After the workers, but before others: a policy is to change during a flood, too."""

_GRACE_SECONDS: Final = 0.2
"""How long a process may live on that has closed its channel."""
REAP_SECONDS: Final = 5.0
"""How long the kernel may take to end a process that was killed."""

Kind = Literal["worker", "sweeper", "asker"]


class Process(Protocol):
    """The part of `subprocess.Popen` that is needed here."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit status, less than 0 for a signal, or None while it runs."""

    def kill(self) -> None:
        """End it at once; nothing happens if it has ended."""


class Spawned(NamedTuple):
    """A process that has heard nothing yet, and our end of its channel."""

    kind: Kind
    process: Process
    channel: SupervisorEnd


Spawn = Callable[[Kind], Spawned]
"""Starts a process; raises OSError if that is not possible at the moment."""


def spawn(kind: Kind) -> Spawned:
    """Start a "worker", a "sweeper" or an "asker".

    Raises:
        OSError: no process, or no descriptor, is to be had.
    """
    ours, theirs = pair()
    try:
        process: subprocess.Popen[bytes] = start(
            own_program(f"rstguard.{kind}"),
            pass_fds=[theirs.fileno()],
            env={**os.environ, CHANNEL_FD: str(theirs.fileno())},
            stdin=subprocess.DEVNULL,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(kind, process, supervisor_end(ours))


async def fate_of(process: Process) -> str:
    """Return how a process ended that has closed its channel; one that lives on is killed."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while (status := process.poll()) is None:
        if loop.time() - began > _GRACE_SECONDS:
            process.kill()
        if loop.time() - began > REAP_SECONDS:
            return "closed its channel, and does not end"
        await asyncio.sleep(0.005)
    return cause_of_death(status)


def spawn_all(workers: int) -> tuple[Spawned, ...]:
    """Give this process the supervisor's priority, and start its workers and, last, the sweeper.

    Raises:
        KernelError: no process, or no descriptor, is to be had.
    """
    take_priority(_PRIORITY)
    kinds: list[Kind] = ["worker"] * workers
    try:
        return tuple(map(spawn, [*kinds, "sweeper"]))
    except OSError as error:
        raise KernelError(
            f"the guard's processes cannot be started ({error.strerror or error}): raise the limit "
            "of processes and open files, or ask for fewer --workers"
        ) from None
