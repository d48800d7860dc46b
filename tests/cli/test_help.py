"""What `--help` says of every command: an example, and a word on each option."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from rstguard.cli import app


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


ALL = dict(commands(typer.main.get_command(app), "rstguard"))


@pytest.mark.parametrize("path", ALL)
def test_help(path: str) -> None:
    command = ALL[path]
    assert command.help
    assert f"{path} " in f"{command.epilog} ".replace(";", " ").replace("|", " ")
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, option.opts
