"""Run the kernel's own tools, with a bound on time and errors in one sentence."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from rstguard.kernel import KernelError

_TIMEOUT = 30.0


def run(arguments: Sequence[str], text: str = "") -> str:
    """Run a command with `text` as its input and return what it prints.

    Raises:
        KernelError: the command is missing, failed, or took longer than 30 seconds.
    """
    name = arguments[0]
    try:
        done = subprocess.run(
            list(arguments),
            input=text,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise KernelError(
            f"the command {name} is missing; `rstguard doctor` says how to install it"
        ) from None
    except subprocess.TimeoutExpired:
        raise KernelError(
            f"{name} did not finish within {_TIMEOUT:.0f} s; does another tool hold its lock?"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise KernelError(f"{' '.join(arguments)} failed: {said}")
    return done.stdout
