"""Run the kernel's own tools, with a bound on time and errors in one sentence."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from rstguard.kernel import KernelError

_TIMEOUT = 30.0


def run(arguments: Sequence[str], text: str = "") -> str:
    """Run a command with `text` as its input and return what it prints.

    Raises:
        KernelError: the command is missing, failed, or took longer than 30 seconds.
    """
    name = arguments[0]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        with spawn(arguments, text=True, **pipes) as process:
            try:
                printed, complaint = process.communicate(text, _TIMEOUT)
            except BaseException:
                process.kill()
                raise
    except FileNotFoundError:
        raise KernelError(
            f"the command {name} is missing; `rstguard doctor` says how to install it"
        ) from None
    except subprocess.TimeoutExpired:
        raise KernelError(
            f"{name} did not finish within {_TIMEOUT:.0f} s; does another tool hold its lock?"
        ) from None
    if process.returncode:
        said = " ".join(complaint.split()) or f"exit status {process.returncode}"
        raise KernelError(f"{' '.join(arguments)} failed: {said}")
    return str(printed)


def spawn(arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program that a terminal's Ctrl-C does not reach: that is for us to answer.

    What brings the guard up or takes it down must not be cut short.  `options` are those of Popen.
    """
    # It has a process group of its own only a moment after it has begun.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(list(arguments), process_group=0, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
