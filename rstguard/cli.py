"""The command line: ``rstguard``."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rstguard import __version__
from rstguard.daemon.control import ControlError, NoDaemon, ask
from rstguard.daemon.supervisor import Options, Supervisor, claim
from rstguard.engine.ruleset import SECOND
from rstguard.engine.verdict import Reason
from rstguard.kernel import KernelError
from rstguard.kernel.elements import MAX_SECONDS
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.nfqueue import DEFAULT_NUMBER
from rstguard.kernel.preflight import Outcome, checks
from rstguard.lab.cli import app as lab_app
from rstguard.policy.compile import compile_policy, describe
from rstguard.policy.load import Loaded, PolicyError, load, parse
from rstguard.policy.quantities import duration as reader_of_durations

FAILED, USAGE, NO_DAEMON, BAD_POLICY = 1, 2, 3, 4

EPILOG = (
    "Exit status: 0 done, 1 failed or not filtering, 2 wrong use, 3 no guard running, "
    "4 the policy has errors."
)

app = typer.Typer(
    name="rstguard",
    help="Guard a gateway: reset, shun and ban what a policy calls abuse, and say why.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Check, apply and show policies.", no_args_is_help=True)
ban_app = typer.Typer(help="List, add and remove banned sources.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
app.add_typer(ban_app, name="ban")
app.add_typer(lab_app, name="lab")

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
_LENGTH = reader_of_durations(SECOND, MAX_SECONDS * SECOND)


@contextmanager
def _errors_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except PolicyError as error:
        _fail(str(error), BAD_POLICY)
    except NoDaemon as error:
        _fail(str(error), NO_DAEMON)
    except (ControlError, KernelError) as error:
        _fail(str(error), FAILED)


def _fail(sentence: str, status: int) -> None:
    typer.echo(sentence if status == BAD_POLICY else f"rstguard: {sentence}", err=True)
    raise typer.Exit(status)


def _ask(directory: Path, command: str, **request: Any) -> Any:
    with _errors_in_one_sentence():
        return ask(directory, {"command": command, **request})


def _print_json(data: object) -> None:
    typer.echo(json.dumps(data, indent=2))


def _warn(loaded: Loaded) -> None:
    for problem in loaded.warnings:
        typer.echo(str(problem), err=True)


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@app.command(epilog="Example: rstguard run --policy /etc/rstguard/policy.yaml")
def run(
    policy: Annotated[Path, typer.Option("--policy", help="Policy file (YAML).")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    queue: Annotated[
        int, typer.Option(min=0, max=65535, help="Number of the first NFQUEUE to use.")
    ] = DEFAULT_NUMBER,
    keep_bans: Annotated[
        bool, typer.Option("--keep-bans", help="Leave bans and shuns in the kernel when stopping.")
    ] = False,
) -> None:
    """Guard this network namespace until SIGTERM or Ctrl-C; then undo every change."""
    logging.basicConfig(format="rstguard: %(message)s", level=logging.INFO, stream=sys.stderr)
    with _errors_in_one_sentence():
        if os.geteuid() != 0:
            raise KernelError("guarding needs root; use sudo, or start the systemd service")
        loaded = load(policy, _interfaces())
        _warn(loaded)
        directory = _make(runtime_dir)
        options = Options(loaded, str(policy), directory, queue, keep_bans)
        asyncio.run(Supervisor(options).run())


def _make(directory: Path) -> Path:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(
            f"the runtime directory {directory} cannot be made ({error.strerror}); "
            "name another with --runtime-dir"
        ) from None
    return directory


@app.command()
def status(runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False) -> None:
    """Tell how the guard is; exit status 0 only while it filters."""
    data = _ask(runtime_dir, "status")
    if as_json:
        _print_json(data)
    else:
        _show_status(data)
    if not data["filtering"]:
        raise typer.Exit(FAILED)


def _show_status(data: dict[str, Any]) -> None:
    policy, worker, sweeper = data["policy"], data["workers"][0], data["sweeper"]
    counts = data["counts"]
    mark = "filtering" if data["filtering"] else "NOT FILTERING"
    typer.echo(f"{mark}, policy {policy['name']} ({policy['mode']}), up {data['uptime_s']:.0f} s")
    for lack in data["missing"]:
        typer.echo(f"  missing: {lack}")
    typer.echo(
        f"  worker {worker['pid']}: {counts.get('packets', 0)} packets, "
        f"{worker['waiting']} waiting, {worker['overrun']} overrun, {worker['restarts']} restarts"
    )
    typer.echo(
        f"  sweeper {sweeper['pid']}: {counts.get('flows', 0)} connections at the last sweep, "
        f"{sweeper['restarts']} restarts"
    )
    blocked = data["blocked"]
    typer.echo(f"  blocked now: {blocked['ban']} banned, {blocked['shun']} shunned")
    for event in data["recent"][-10:]:
        rule = f" by {event['rule']}" if event["rule"] else ""
        why = f": {event['why']}" if event["why"] else ""
        detail = f" ({event['detail']})" if event["detail"] else ""
        would = "" if event["enforced"] else "would "
        typer.echo(f"  {would}{event['kind']} {event['subject']}{rule}{detail}{why}")


@policy_app.command("check", epilog="Example: rstguard policy check policies/web-edge.yaml")
def policy_check(file: PolicyFile, as_json: Json = False) -> None:
    """Read a policy file and name every mistake in it, with line and column."""
    problems: tuple[Any, ...]
    try:
        problems = load(file, _interfaces()).warnings
        right = True
    except PolicyError as error:
        problems, right = error.problems, False
    if as_json:
        rows = [
            {
                "file": p.file,
                "line": p.line,
                "column": p.column,
                "where": p.where,
                "message": p.message,
                "severity": p.severity,
            }
            for p in problems
        ]
        _print_json({"ok": right, "problems": rows})
    else:
        for problem in problems:
            typer.echo(str(problem), err=True)
        if right:
            typer.echo(f"{file}: the policy is good")
    if not right:
        raise typer.Exit(BAD_POLICY)


@policy_app.command("apply", epilog="Example: rstguard policy apply /etc/rstguard/policy.yaml")
def policy_apply(
    file: PolicyFile, runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False
) -> None:
    """Give the running guard another policy; rules that stay the same keep their counts."""
    with _errors_in_one_sentence():
        loaded = load(file, _interfaces())
    _warn(loaded)
    done = _ask(runtime_dir, "policy-apply", name=str(file.absolute()), text=loaded.text)
    if as_json:
        _print_json(done)
    else:
        typer.echo(f"policy {done['name']} is in force (took {done['took_ms']} ms)")


@policy_app.command("show")
def policy_show(
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Show what the policy means, rule by rule.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the policy in force."""
    data = _ask(runtime_dir, "policy-show")
    if compiled:
        with _errors_in_one_sentence():
            data["compiled"] = describe(compile_policy(parse(data["text"], data["file"]).policy))
    if as_json:
        _print_json(data)
    else:
        typer.echo(data["compiled" if compiled else "text"], nl=False)


@ban_app.command("list")
def ban_list(runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False) -> None:
    """List banned and shunned sources, by which rule, and for how long yet."""
    rows = _ask(runtime_dir, "ban-list")
    if as_json:
        _print_json(rows)
        return
    if not rows:
        typer.echo("nobody is banned or shunned")
        return
    table = Table()
    for title in ("source", "kind", "rule", "remaining s"):
        table.add_column(title, justify="right" if title == "remaining s" else "left")
    for row in rows:
        table.add_row(row["source"], row["kind"], row["rule"], str(row["remaining_s"]))
    Console().print(table)


@ban_app.command("add", epilog="Example: rstguard ban add 198.51.100.0/24 --for 2h")
def ban_add(
    source: Annotated[str, typer.Argument(help="Address or network, such as 198.51.100.7.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 10m, 2h, 7d.")] = "10m",
    keep_existing: Annotated[
        bool, typer.Option("--keep-existing", help="Leave the source's connections alone.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
) -> None:
    """Ban a source: everything from it is dropped, and its connections are reset."""
    try:
        seconds = _LENGTH(duration) // SECOND
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from None
    done = _ask(runtime_dir, "ban-add", source=source, seconds=seconds, keep_existing=keep_existing)
    typer.echo(f"{done['source']} is banned for {done['seconds']} s")


@ban_app.command("remove", epilog="Example: rstguard ban remove 198.51.100.7")
def ban_remove(
    source: Annotated[str, typer.Argument(help="Address or network, as `ban list` shows it.")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
) -> None:
    """Lift a ban or shun at once; exit status 1 if there was none."""
    done = _ask(runtime_dir, "ban-remove", source=source)
    if not done["removed"]:
        _fail(f"{done['source']} is neither banned nor shunned", FAILED)
    typer.echo(f"{done['source']} is free")


@app.command(epilog="Example: rstguard kill --source 198.51.100.7 --port 443")
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
    if (source, source_port, destination, port) == (None, None, None, None):
        raise typer.BadParameter(
            "say which connections: --source, --source-port, --destination or --port"
        )
    done = _ask(
        runtime_dir,
        "kill",
        source=source,
        source_port=source_port,
        destination=destination,
        port=port,
    )
    if as_json:
        _print_json(done)
    else:
        typer.echo(f"killed {done['killed']}, confirmed {done['confirmed']}")
        for one in done["unconfirmed"]:
            typer.echo(f"  not confirmed: {one['why']}")
    if done["confirmed"] < done["killed"]:
        raise typer.Exit(FAILED)


@app.command()
def cleanup(
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    keep_bans: Annotated[bool, typer.Option("--keep-bans", help="Leave bans and shuns.")] = False,
    as_json: Json = False,
) -> None:
    """Undo what a guard that was killed left behind: rules, sets, sysctls, socket."""
    with _errors_in_one_sentence():
        if os.geteuid() != 0:
            raise KernelError("cleaning up needs root; use sudo")
        with claim(runtime_dir):
            done = Footprint(runtime_dir, range(1)).remove(keep_bans)
            socket_file = runtime_dir / "control.sock"
            if socket_file.exists():
                socket_file.unlink()
                done.append("control socket removed")
    if as_json:
        _print_json({"done": done})
    else:
        typer.echo("\n".join(done) or "there was nothing to clean up")


@app.command()
def doctor(
    queue: Annotated[int, typer.Option(min=0, max=65535)] = DEFAULT_NUMBER, as_json: Json = False
) -> None:
    """Tell what this machine lacks, and the command that mends it."""
    found = checks(queue)
    if as_json:
        rows = [
            {"name": c.name, "outcome": c.outcome.value, "text": c.sentence, "mend": c.mend}
            for c in found
        ]
        _print_json(rows)
    else:
        for check in found:
            typer.echo(f"{check.outcome.value:8} {check.name}: {check.sentence}")
            if check.mend:
                typer.echo(f"         mend it: {check.mend}")
    if any(check.outcome is Outcome.MISSING for check in found):
        raise typer.Exit(FAILED)


@app.command()
def reasons(as_json: Json = False) -> None:
    """List every reason for which a packet or connection can meet its fate."""
    if as_json:
        _print_json({reason.code: reason.value for reason in Reason})
    else:
        for reason in Reason:
            typer.echo(f"{reason.code:18} {reason.value}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rstguard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    # `su` and cron leave out where iptables and ipset live.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    app()
