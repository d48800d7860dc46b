"""Run the kernel's own tools, with a bound on time and errors in one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Protocol

from rstguard.kernel import Full, InUse, KernelError, NotPermitted, NotThere

_TIMEOUT = 30.0

_MEANINGS: Final = (
    ("peration not permitted", NotPermitted),
    ("ermission denied", NotPermitted),
    ("in use by a kernel component", InUse),
    ("Device or resource busy", InUse),
    ("does not exist", NotThere),
    ("doesn't exist", NotThere),
    ("No chain/target/match by that name", NotThere),
    ("Hash is full", Full),
)
"""What the tools say, and what it means: their exit status does not tell one from the other."""


def own_program(module: str, *words: str) -> list[str]:
    """Return what runs a module of this package as a program of its own.

    Python would look in the present directory first, whoever can write there; -P forbids it
    (https://docs.python.org/3/using/cmdline.html#cmdoption-P).
    """
    return [sys.executable, "-P", "-m", module, *words]


class Commands(Protocol):
    """What runs the kernel's tools: this module itself, or a whole `seam.Kernel`."""

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        """Run a command with `text` as its input and return what it prints."""


def run(arguments: Sequence[str], text: str = "") -> str:
    """Run a command with `text` as its input and return what it prints.

    Raises:
        NotThere: the command is missing, or what it was to work on.
        KernelError: it failed for that or another reason (`refusal`), or took longer than 30 s.
    """
    with _begun(arguments) as process:
        return _printed(arguments, process, text)


def printed_or_nothing(commands: Commands, arguments: Sequence[str]) -> str:
    """Return what a command prints; nothing if it is missing, or fails."""
    try:
        return commands.run(arguments)
    except KernelError:
        return ""


def run_each(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run several commands at once and return what each prints.

    Under load it is waiting for a processor that takes long.

    Raises:
        KernelError: one of them failed, as for `run`.
    """
    with ExitStack() as all_of_them:
        begun = [(words, all_of_them.enter_context(_begun(words))) for words in commands]
        return [_printed(words, process, "") for words, process in begun]


@contextmanager
def _begun(arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a command; whatever goes wrong, it has ended afterwards."""
    name = arguments[0]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    try:
        process = spawn(arguments, text=True, **pipes)
    except FileNotFoundError:
        raise NotThere(
            f"the command {name} is missing; `rstguard doctor` says how to install it"
        ) from None
    except OSError as problem:  # no process or no descriptor is to be had
        raise KernelError(
            f"{name} could not be started ({problem.strerror or problem}); it is tried again"
        ) from None
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _printed(arguments: Sequence[str], process: subprocess.Popen[str], text: str) -> str:
    try:
        printed, complaint = process.communicate(text, _TIMEOUT)
    except subprocess.TimeoutExpired:
        raise KernelError(
            f"{arguments[0]} did not finish within {_TIMEOUT:.0f} s; does another tool hold its "
            "lock?"
        ) from None
    if process.returncode:
        raise refusal(arguments, complaint or f"exit status {process.returncode}")
    return str(printed)


def refusal(arguments: Sequence[str], complaint: str) -> KernelError:
    """Return the error that says what a command complained of, of the class that says why."""
    said = " ".join(complaint.split())
    kind = next((kind for words, kind in _MEANINGS if words in said), KernelError)
    return kind(f"{' '.join(arguments)} failed: {said}")


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
