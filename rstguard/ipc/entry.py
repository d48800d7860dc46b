"""How a process of the guard begins and ends: the part that worker and sweeper share."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

from rstguard.ipc.channel import ChildEnd, Closed, child_end
from rstguard.ipc.messages import Failed, Start
from rstguard.kernel import KernelError

CHANNEL_FD = "RSTGUARD_CHANNEL_FD"
"""Environment variable that names the inherited descriptor of the channel."""


def take_priority(nice: int) -> None:
    """Ask for processor time before others: -20 to 19, lower goes first.  Works without, too."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def run_child(name: str, serve: Callable[[ChildEnd, Start], None]) -> None:
    """Wait for the supervisor's `Start`, serve, and leave when the supervisor is gone.

    Exit status 0 after an orderly stop, 1 after a failure that was reported to the supervisor.
    """
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format=f"rstguard {name}: %(message)s", level=logging.INFO)
    descriptor = os.environ.get(CHANNEL_FD, "")
    if not descriptor.isdigit():
        sys.exit(f"rstguard {name} is started by `rstguard run`, not by hand")
    channel = child_end(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(Closed):
        start = channel.wait()
        assert isinstance(start, Start)
        # These processes make hardly any cycles, and a sweep holds 100,000 connections at once: to
        # collect at every 700 new objects would take a third of its time.
        gc.freeze()
        gc.set_threshold(100_000, 50, 1000)
        try:
            serve(channel, start)
        except KernelError as error:
            channel.send(Failed(str(error)))
            sys.exit(1)
