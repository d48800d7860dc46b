"""What the commands share: options, errors in one sentence, and talking to the guard.

A command imports what only it needs when it runs: `rstguard kill` is for people in a hurry.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rstguard.control import protocol
from rstguard.control.lines import misunderstood
from rstguard.control.protocol import NoDaemon
from rstguard.ipc.requests import ControlError, Request
from rstguard.kernel import KernelError
from rstguard.observe.text import plain, plain_lines

if TYPE_CHECKING:
    from rstguard.policy.load import Loaded

FAILED, USAGE, NO_DAEMON, BAD_POLICY = 1, 2, 3, 4

RuntimeDir = Annotated[
    Path,
    typer.Option(
        "--runtime-dir",
        envvar="RSTGUARD_RUNTIME_DIR",
        readable=False,  # the socket in it says who may do what, in a sentence of its own
        help="Directory of the guard that is meant; each guard has its own.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Policy file (YAML).")]
DEFAULT_DIR = Path("/run/rstguard")
StateDir = Annotated[
    Path,
    typer.Option(
        "--state-dir",
        envvar="RSTGUARD_STATE_DIR",
        readable=False,
        help="Directory for what outlives the guard: bans, offences, and the history of policies.",
    ),
]
_STDIN = "/dev/stdin"
_MOST_PARENTS = 32
_LONGEST_LINE = 1 << 16
_ASKED = ContextVar("_ASKED", default=False)
"""Whether the command that runs has been answered by a guard."""
DEFAULT_STATE_DIR = Path("/var/lib/rstguard")


def read_policy(file: Path) -> Loaded:
    """Read a policy, print its warnings, or name its mistakes and leave with status 4."""
    from rstguard.policy.load import PolicyError

    try:
        loaded = load_here(file)
    except PolicyError as error:
        fail(str(error), BAD_POLICY)
    for problem in loaded.warnings:
        say(str(problem), err=True)
    return loaded


class Commands(TyperGroup):
    """Commands whose errors are one sentence, also where an answer is not what it should be."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        _ASKED.set(False)
        try:
            with errors_in_one_sentence():
                return super().invoke(ctx)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if not _ASKED.get():
                raise
            why = misunderstood(f"{type(error).__name__}: {error}")
            fail(why, FAILED)


@contextmanager
def errors_in_one_sentence(more: str = "") -> Iterator[None]:
    """Turn the errors that are the user's to fix into a sentence and an exit status.

    `more` is said after the sentence.
    """
    more = f"; {more}" if more else ""
    try:
        yield
    except NoDaemon as error:
        fail(f"{error}{more}", NO_DAEMON)
    except (ControlError, KernelError) as error:
        # The guard refuses a policy with a mistake on each line.
        _fail_by_line(f"rstguard: {error}{more}", FAILED)


def fail(sentence: str, status: int) -> NoReturn:
    """Say what is wrong, and leave with `status`; a bad policy has a mistake on each line."""
    if status == BAD_POLICY:
        _fail_by_line(sentence, status)
    say(f"rstguard: {sentence}", err=True)
    raise typer.Exit(status)


def _fail_by_line(sentences: str, status: int) -> NoReturn:
    for line in sentences.split("\n"):
        say(line, err=True)
    raise typer.Exit(status)


def say(text: str, err: bool = False) -> None:
    """Print one line for people, with nothing in it that a terminal obeys, whoever wrote it."""
    typer.echo(plain(text, _LONGEST_LINE), err=err)


def print_text(text: str) -> None:
    """Print a text to the letter for a file or a pipe; on a terminal each line as `say` does."""
    sys.stdout.write(plain_lines(text, _LONGEST_LINE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def ask(directory: Path, request: Request, patience: float = 30.0) -> Any:
    """Ask the running guard; `patience` is in seconds.

    Raises:
        NoDaemon: there is none.
        ControlError: the guard refused, or its answer cannot be understood.
    """
    answer = protocol.ask(directory, request, patience)
    _ASKED.set(True)
    return answer


def ask_guard(
    directory: Path, command: str, failed: str = "", *, patience: float = 30.0, **request: Any
) -> Any:
    """Ask the running guard and return its answer, or say why there is none, and `failed`.

    `patience` is in seconds.
    """
    with errors_in_one_sentence(failed):
        return ask(directory, {"command": command, **request}, patience)


def ssh_client() -> str:
    """Return the address that this command's user is logged in from, or "".

    sudo takes SSH_CONNECTION out of the environment, so a parent may be the one to have it.
    """
    from rstguard.kernel.protected import ssh_connection

    process = Path("/proc/self")
    for _ in range(_MOST_PARENTS):
        if connection := ssh_connection(process / "environ"):
            return connection[0]
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            return ""
        if parent == "0":
            return ""
        process = Path("/proc", parent)
    return ""


def who() -> str:
    """Return what is known of who gives this command, beyond the account: sudo and SSH."""
    by, client = os.environ.get("SUDO_USER"), ssh_client()
    parts = (f"sudo by {by}" if by else "", f"from {client}" if client else "")
    return ", ".join(filter(None, parts))


def print_json(data: object) -> None:
    """Print data for scripts."""
    typer.echo(json_text(data, indent=2))


def json_text(data: object, indent: int | None = None) -> str:
    """Return data as JSON in printable ASCII."""
    return json.dumps(data, indent=indent).replace("\x7f", "\\u007f")


def load_here(file: Path) -> Loaded:
    """Read a policy, and look whether it can match where this machine stands.

    Raises:
        PolicyError: the file cannot be read, or is no valid policy.
    """
    from rstguard.kernel.linux import Linux
    from rstguard.policy.load import load
    from rstguard.supervisor.around import around

    return load(_STDIN if file == Path("-") else file, around(Linux()), one_sided())


def one_sided() -> list[str]:
    """Return the services of which a guard of this namespace sees only one side."""
    from rstguard.kernel import KernelError
    from rstguard.kernel.linux import Linux
    from rstguard.kernel.oneway import services

    try:
        return [str(service) for service in services(Linux())]
    except KernelError:  # without root nobody knows
        return []
