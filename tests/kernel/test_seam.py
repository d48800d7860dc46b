"""Nobody goes past the seam: on the tests' kernel a guard must not touch the real one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rstguard

PACKAGE = Path(rstguard.__file__).parent
BEHIND = (
    "command.run",
    "conntrack.Conntrack",
    "counted",
    "inject.Injector",
    "ipset",
    "iptables",
    "protected.find",
    "links.links",
    "linux",
    "nflog.PacketLog",
    "nfqueue.Queue",
    "nfqueue.states",
    "routes",
    "sets",
    "synproxy",
    "sysctl.altered",
    "sysctl.apply",
    "sysctl.restore",
)
"""What only `rstguard.kernel` itself and the commands may use."""
PARTS = ("worker", "sweeper", "supervisor", "control", "state")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_what_runs_in_a_guard_asks_linux_through_the_seam_only(part: str) -> None:
    behind = tuple(f"rstguard.kernel.{name}" for name in BEHIND)
    for path in sorted((PACKAGE / part).glob("*.py")):
        for name in (
            () if path.name == "__main__.py" else imported(path)
        ):  # where all is put together
            past = any(name == one or name.startswith(f"{one}.") for one in behind)
            assert not past, f"{part}/{path.name} imports {name}"
