"""How a process of the guard begins and ends: the part that worker and sweeper share."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, Protocol

from rstguard.ipc.channel import ChildEnd, Closed, child_end
from rstguard.ipc.ending import last_words
from rstguard.ipc.messages import Failed, Start
from rstguard.kernel import KernelError
from rstguard.kernel.confine import confine

log = logging.getLogger(__name__)

CHANNEL_FD = "RSTGUARD_CHANNEL_FD"
"""Environment variable that names the inherited descriptor of the channel."""


def take_priority(nice: int) -> None:
    """Ask for processor time before others: -20 to 19, lower goes first.  Works without, too."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def give_up_privileges(tell: bool) -> None:
    """Confine this process to what it needs once it serves; `tell` what could not be given up.

    To be called when all is open and nothing but `Ready` is still to be said.
    """
    # No module can be loaded afterwards; this needs all that the log of an error does.
    try:
        raise RuntimeError
    except RuntimeError:
        traceback.format_exc()
    lacking = confine()
    if tell:
        for sentence in lacking:
            log.warning("workers and sweeper are confined, but not wholly: %s", sentence)


class Serving(Protocol):
    """A worker or the sweeper, ready to serve."""

    def run(self) -> None:
        """Serve until told to stop."""


def run_child(name: str, begin: Callable[[ChildEnd, Start], Serving]) -> NoReturn:
    """Wait for the supervisor's `Start`, serve, and leave when the supervisor is gone.

    `begin` opens all that is needed and calls `give_up_privileges`.  Exit status 0 after an orderly
    stop, 1 after a failure, of which the log or the supervisor has been told.
    """
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when we stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(format=f"rstguard {name}: %(message)s", level=logging.INFO)
    descriptor = os.environ.get(CHANNEL_FD, "")
    if not descriptor.isdigit():
        sys.exit(f"rstguard {name} is started by `rstguard run`, not by hand")
    channel = child_end(socket.socket(fileno=int(descriptor)))
    status, serving = 0, None
    try:
        start = channel.wait()
        assert isinstance(start, Start)
        # These processes make hardly any cycles, and a sweep holds 100,000 connections at once: to
        # collect at every 700 new objects would take a third of its time.
        gc.freeze()
        gc.set_threshold(100_000, 50, 1000)
        with last_words(channel):
            serving = begin(channel, start)
            serving.run()
    except Closed:
        pass
    except KernelError as error:
        status = 1
        with contextlib.suppress(Closed):
            channel.send(Failed(str(error)))
    except SystemExit:
        status = 1
    # What is open goes with the process.  To tidy up, which begins when `serving` is forgotten,
    # could take calls that are forbidden by now.
    os._exit(status)
