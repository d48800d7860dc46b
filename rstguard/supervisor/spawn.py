"""Starts processes of the guard.  A process that was started waits to be told what to do.

So the first ones can be started before it is known: they come up while the policy is read, which
takes as long.  One that nobody wants after all sees its channel close, and ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final, NamedTuple

from rstguard.ipc.channel import SupervisorEnd, pair, supervisor_end
from rstguard.ipc.entry import CHANNEL_FD, take_priority
from rstguard.kernel.command import spawn as start

_PRIORITY: Final = -5
"""After the workers, but before others: a policy is to change during a flood, too."""


class Spawned(NamedTuple):
    """A process that has heard nothing yet: "worker" or "sweeper", and our end of its channel."""

    kind: str
    process: subprocess.Popen[bytes]
    channel: SupervisorEnd


def spawn(kind: str) -> Spawned:
    """Start a "worker" or a "sweeper"."""
    ours, theirs = pair()
    process = start(
        [sys.executable, "-m", f"rstguard.{kind}"],
        pass_fds=[theirs.fileno()],
        env={**os.environ, CHANNEL_FD: str(theirs.fileno())},
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    return Spawned(kind, process, supervisor_end(ours))


def spawn_all(workers: int) -> tuple[Spawned, ...]:
    """Give this process the supervisor's priority, and start its workers and, last, the sweeper."""
    take_priority(_PRIORITY)
    return tuple(map(spawn, ["worker"] * workers + ["sweeper"]))
