"""The commands that start a guard, ask after it, use it, and clear up after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rstguard.cli.common import (
    DEFAULT_DIR,
    DEFAULT_STATE_DIR,
    FAILED,
    Json,
    RuntimeDir,
    StateDir,
    ask_guard,
    errors_in_one_sentence,
    print_json,
    read_policy,
    say,
)
from rstguard.cli.status import lines
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.kernel.queues import DEFAULT_NUMBER

if TYPE_CHECKING:
    from rstguard.ipc.requests import Answer

_TELL_SECONDS = 2.0

EventLogFile = Annotated[
    Path | None,
    typer.Option(
        envvar="RSTGUARD_EVENT_LOG",
        readable=False,
        help="Append events to this file, a line of JSON each; it may be rotated at any time.",
    ),
]
ToJournal = Annotated[
    bool | None,
    typer.Option(
        "--journal/--no-journal",
        help="Send events to systemd's journal with fields of their own; as a service it does.",
    ),
]

HttpAddress = Annotated[
    str | None,
    typer.Option(
        envvar="RSTGUARD_HTTP",
        metavar="ADDRESS:PORT",
        help="Serve a read-only web page and Prometheus metrics, such as at 127.0.0.1:9788.",
    ),
]
HttpAnywhere = Annotated[
    bool, typer.Option("--http-anywhere", help="Let --http be other than loopback.")
]

FirstQueue = Annotated[
    int,
    typer.Option(
        min=0,
        max=65000,
        help="Number of the first NFQUEUE to use: one for each worker, two more for held RSTs.",
    ),
]


def run(
    policy: Annotated[Path, typer.Option("--policy", help="Policy file (YAML).")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    queue: FirstQueue = DEFAULT_NUMBER,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Worker processes, a power of two, with a queue each; usually one a core.",
        ),
    ] = None,
    keep_bans: Annotated[
        bool, typer.Option("--keep-bans", help="Leave bans and shuns in the kernel when stopping.")
    ] = False,
    event_log: EventLogFile = None,
    journal: ToJournal = None,
    http: HttpAddress = None,
    http_anywhere: HttpAnywhere = False,
) -> None:
    """Guard this network namespace until SIGTERM or Ctrl-C; then undo every change."""
    if workers is None:
        workers = _power_of_two(len(os.sched_getaffinity(0)))
    elif workers & workers - 1:
        raise typer.BadParameter(
            "sources are shared out by bits: 1, 2, 4, 8, …", param_hint="--workers"
        )
    import asyncio
    import logging

    from rstguard.supervisor.spawn import spawn_all

    logging.basicConfig(format="rstguard: %(message)s", level=logging.INFO, stream=sys.stderr)
    with errors_in_one_sentence():
        if os.geteuid() != 0:
            raise KernelError("guarding needs root; use sudo, or start the systemd service")
        # While they come up, this process reads the policy: both take a fifth of a second.
        spawned = spawn_all(workers)
        from rstguard.daemon import guard
        from rstguard.kernel.linux import Linux
        from rstguard.supervisor.options import Options

        options = Options(
            kernel=Linux(),
            policy=read_policy(policy),
            file=str(policy.absolute()),
            directory=_make(runtime_dir),
            state=state_dir,
            queue=queue,
            spawned=spawned,
            keep_bans=keep_bans,
            event_log=event_log,
            journal=bool(os.environ.get("JOURNAL_STREAM")) if journal is None else journal,
            web=_web(http, http_anywhere) if http else None,
        )
        asyncio.run(guard(options))


def _web(where: str, anywhere: bool) -> Callable[[Answer], Coroutine[Any, Any, None]]:
    """Listen at an address; return what then serves the page there."""
    from rstguard.control import web

    return partial(web.run, web.listen(where, anywhere))


def _power_of_two(most: int) -> int:
    """Return the largest power of two up to `most`, and up to 16."""
    return 1 << min(most, 16).bit_length() - 1


def _make(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(
            f"the runtime directory {directory} cannot be made ({error.strerror}); "
            "name another with --runtime-dir"
        ) from None
    return directory


def status(
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    degraded_too: Annotated[
        bool,
        typer.Option(
            "--filtering", help="Exit 0 also while it is degraded, for scripts such as VRRP's."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell how the guard is: filtering (exit 0), degraded or not filtering (exit 1).

    Degraded is a guard at work that lacks something; the lines below the first say what.
    """
    data = ask_guard(runtime_dir, "status")
    if as_json:
        print_json(data)
    else:
        for line in lines(data):
            say(line)
    if not (data["filtering"] or (degraded_too and data["state"] == "degraded")):
        raise typer.Exit(FAILED)


def kill(
    source: Annotated[
        str | None, typer.Option(help="Client address or network of the connections.")
    ] = None,
    source_port: Annotated[int | None, typer.Option(help="Client port.", min=1, max=65535)] = None,
    destination: Annotated[
        str | None, typer.Option(help="Server address or network, before or behind DNAT.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Server port.", min=1, max=65535)] = None,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Reset connections at both ends, idle ones too; exit 1 if any could not be confirmed.

    All conditions given must fit; at least one is needed.
    """
    if all(condition is None for condition in (source, source_port, destination, port)):
        raise typer.BadParameter(
            "say which connections: --source, --source-port, --destination or --port"
        )
    done = ask_guard(
        runtime_dir,
        "kill",
        source=source,
        source_port=source_port,
        destination=destination,
        port=port,
    )
    if as_json:
        print_json(done)
    else:
        say(f"killed {done['killed']}, confirmed {done['confirmed']}")
        for one in done["unconfirmed"]:
            say(f"  not confirmed: {one['why']}")
    if done["confirmed"] < done["killed"]:
        raise typer.Exit(FAILED)


def panic(
    end: Annotated[
        bool, typer.Option("--end", help="Put the guard to work again, within seconds.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Let all traffic pass at once: takes the guard's rules away, whatever state it is in.

    The guard itself runs on, and puts nothing back until `--end`, its end, or a reboot.
    Bans and history are kept.
    """
    from rstguard.kernel.footprint import Footprint
    from rstguard.kernel.linux import Linux
    from rstguard.supervisor.upkeep import PANIC_NAME

    with errors_in_one_sentence():
        if os.geteuid() != 0:
            raise KernelError("this needs root; use sudo")
        file = runtime_dir / PANIC_NAME
        if end:
            there = file.exists()
            file.unlink(missing_ok=True)
            _tell_guard(runtime_dir)
            _say(there, "the guard takes up its work" if there else "there was no panic", as_json)
            return
        problem = _note(file)
        # First of all, whatever the file system says.
        Footprint(Linux(), runtime_dir, range(1)).withdraw()
        if problem:
            raise KernelError(f"all traffic passes now, but {problem}")
        _tell_guard(runtime_dir)
    said = "all traffic passes; `rstguard panic --end` puts the guard to work again"
    _say(True, said, as_json)


def _tell_guard(directory: Path) -> None:
    """Have a guard that answers take note at once; else it looks for the file by itself."""
    from rstguard.control.protocol import ask

    with suppress(ControlError):
        ask(directory, {"command": "panic"}, _TELL_SECONDS)


def _note(file: Path) -> str:
    """Make the file that a running guard looks for, or return why it will not see it."""
    from rstguard.control.protocol import listens
    from rstguard.supervisor.claims import is_claimed

    back = "the guard that runs here puts its rules back within seconds: "
    try:
        _make(file.parent)
        file.touch(mode=0o644)  # it is believed only if nobody else may write to it
    except (KernelError, OSError) as error:
        return f"{back}stop it, as {file} cannot be made ({getattr(error, 'strerror', error)})"
    if not listens(file.parent) and is_claimed():
        return f"{back}it has another runtime directory, name that with --runtime-dir"
    return ""


def _say(done: bool, sentence: str, as_json: bool) -> None:
    if as_json:
        print_json({"changed": done, "said": sentence})
    else:
        say(sentence)


def cleanup(
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    keep_bans: Annotated[bool, typer.Option("--keep-bans", help="Leave bans and shuns.")] = False,
    as_json: Json = False,
) -> None:
    """Undo what a guard that was killed left behind: rules, sets, sysctls, socket."""
    from rstguard.kernel.footprint import Footprint
    from rstguard.kernel.linux import Linux
    from rstguard.supervisor.claims import claim

    with errors_in_one_sentence():
        if os.geteuid() != 0:
            raise KernelError("cleaning up needs root; use sudo")
        with claim(runtime_dir):
            done = Footprint(Linux(), runtime_dir, range(1)).remove(keep_bans)
            socket_file = runtime_dir / "control.sock"
            if socket_file.exists():
                socket_file.unlink()
                done.append("control socket removed")
    if as_json:
        print_json({"done": done})
    else:
        for sentence in done or ["there was nothing to clean up"]:
            say(sentence)
