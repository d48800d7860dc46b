"""The command line: ``rstguard``."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from rstguard import __version__
from rstguard.cli import ban, doctor, events, guard, install, lab, man, policy, top
from rstguard.cli.common import FAILED, Commands, Json, print_json
from rstguard.engine.verdict import Reason

EPILOG = (
    "Exit status: 0 done, 1 failed or not filtering, 2 wrong use, 3 no guard running, "
    "4 the policy has errors."
)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)

app = typer.Typer(
    name="rstguard",
    help="Guard a gateway: reset, shun and ban what a policy calls abuse, and say why.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=Commands,
)
app.command(epilog="Example: rstguard run --policy /etc/rstguard/policy.yaml")(guard.run)
app.command(epilog="Example: rstguard status --json | jq .blocked")(guard.status)
app.command(
    epilog="Examples: rstguard events -f --kind ban --kind reset; "
    "rstguard events --source 198.51.100.0/24; "
    "rstguard events --from /var/log/rstguard/events.jsonl --json"
)(events.events)
app.command(epilog="Example: rstguard kill --source 198.51.100.7 --port 443")(guard.kill)
app.command(epilog="Examples: rstguard panic; rstguard panic --end")(guard.panic)
app.command(epilog="Examples: rstguard top; rstguard top --once --json")(top.top)
app.command(epilog="Example: rstguard man | man -l -")(man.man)
app.command(epilog="Example: sudo rstguard cleanup --keep-bans")(guard.cleanup)
app.command(epilog="Example: sudo rstguard install --interface eth0")(install.install)
app.command(epilog="Example: sudo rstguard uninstall --purge")(install.uninstall)
app.command(epilog="Example: sudo rstguard doctor")(doctor.doctor)
app.add_typer(policy.app, name="policy")
app.add_typer(ban.app, name="ban")
app.add_typer(lab.app, name="lab")


@app.command(epilog="Example: rstguard reasons --json")
def reasons(as_json: Json = False) -> None:
    """List every reason a packet is dropped or a connection is reset."""
    if as_json:
        print_json({reason.code: reason.value for reason in Reason})
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
    try:
        app()
    except OSError as error:
        if not error.filename and error.errno in _UNWRITABLE:
            with contextlib.suppress(OSError):  # what is left would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo(f"rstguard: the output cannot be written ({error.strerror})", err=True)
            sys.exit(FAILED)
        raise
