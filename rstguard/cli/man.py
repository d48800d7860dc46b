"""``rstguard man``: the manual page, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

_FILES = (
    ("/etc/rstguard/policy.yaml", "the policy of the service"),
    ("/run/rstguard/control.sock", "where commands reach the guard; for root and group rstguard"),
    ("/var/lib/rstguard/state.db", "bans, offences and the history of policies"),
)
_ENVIRONMENT = (
    ("RSTGUARD_RUNTIME_DIR", "stands for --runtime-dir"),
    ("RSTGUARD_STATE_DIR", "stands for --state-dir"),
    ("RSTGUARD_EVENT_LOG", "stands for --event-log"),
    ("RSTGUARD_HTTP", "stands for --http"),
)


def man(context: typer.Context) -> None:
    """Print the manual page of all commands; see it with `rstguard man | man -l -`."""
    from rstguard import __version__

    root: Any = context.find_root().command
    typer.echo("\n".join(_page(root, __version__, root.epilog)))


def _page(root: Any, version: str, exit_status: str) -> Iterator[str]:
    yield f'.TH RSTGUARD 1 "" "rstguard {version}" "Gateway administration"'
    yield ".SH NAME"
    yield r"rstguard \- a firewall that resets, shuns and bans what a policy calls abuse"
    yield ".SH SYNOPSIS"
    yield r".B rstguard"
    yield r".I command"
    yield r"[\fIoption\fR ...]"
    yield ".SH DESCRIPTION"
    yield _text(root.help or "")
    yield ".SH COMMANDS"
    yield from _commands(root, "rstguard")
    yield ".SH EXIT STATUS"
    yield _text(exit_status)
    for title, rows in (("ENVIRONMENT", _ENVIRONMENT), ("FILES", _FILES)):
        yield f".SH {title}"
        for name, meaning in rows:
            yield from (".TP", rf".B {_text(name)}", _text(meaning))


def _commands(group: Any, path: str) -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield from _command(command, f"{path} {name}")


def _command(command: Any, path: str) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    named = " ".join(one.metavar or one.name.upper() for one in arguments)
    yield f'.SS "{_text(f"{path} {named}".strip())}"'
    yield _text(command.help or "")
    for option in options:
        if option.hidden or "--help" in option.opts:
            continue
        words = ", ".join([*option.opts, *option.secondary_opts])
        yield from (".TP", rf"\fB{_text(words)}\fR", _text(option.help or "See above."))
    if command.epilog:
        yield from (".PP", _text(command.epilog))


def _text(text: str) -> str:
    """Escape what roff would obey: backslashes, hyphens, and a dot or quote that begins a line."""
    lines = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{lines}" if lines[:1] in (".", "'") else lines
