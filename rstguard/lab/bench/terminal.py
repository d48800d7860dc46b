"""What ``rstguard lab bench`` does, and shows in a terminal and in files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from rstguard.lab import LabError
from rstguard.lab.bench import floods, peers
from rstguard.lab.bench.floods import FLOODS, Flood
from rstguard.lab.bench.measure import Run, measure
from rstguard.lab.bench.peers import PEERS, Peer
from rstguard.lab.bench.report import COLUMNS, chart, document, goals, markdown, runs_of, spread
from rstguard.lab.topology import ended_by_signals, require_root

_FALLS_SHORT, _FAILED, _INTERRUPTED = 1, 2, 130


def compare(
    flood: list[str] | None,
    peer: list[str] | None,
    rounds: int,
    seconds: float,
    *,
    as_json: bool,
    out: Path | None,
    table: Path | None,
    svg: Path | None,
) -> None:
    """Run all rounds, write and show what was measured; leaves with 1 if rstguard missed a goal."""
    runs: list[Run] = []
    failed = 0
    try:
        chosen = [floods.find(name) for name in flood] if flood else list(FLOODS)
        guards = [peers.find(name) for name in peer] if peer else list(PEERS)
        require_root()
        _require_tools(chosen)
        with ended_by_signals():
            runs.extend(_rounds(chosen, _installed(guards), rounds, seconds))
    except LabError as error:
        typer.echo(str(error), err=True)
        failed = _FAILED
    except KeyboardInterrupt:
        typer.echo("Interrupted; the lab has been removed.", err=True)
        failed = _INTERRUPTED
    if failed and not runs:
        raise typer.Exit(failed)
    # What was measured until something failed is worth telling.
    text = json.dumps(document(runs), indent=2)
    for path, make in ((out, lambda: text + "\n"), (table, lambda: markdown(runs)),
                       (svg, lambda: chart(runs))):  # fmt: skip
        _write(path, make)
    if as_json:
        typer.echo(text)
    else:
        _show(runs)
    if failed or not all(goal.met for goal in goals(runs)):
        raise typer.Exit(failed or _FALLS_SHORT)


def _write(path: Path | None, make: Callable[[], str]) -> None:
    if path is None:
        return
    try:
        path.write_text(make(), encoding="utf-8")
    except OSError as error:
        typer.echo(f"{path} could not be written: {error.strerror}.", err=True)
        raise typer.Exit(_FAILED) from error


def _require_tools(chosen: Sequence[Flood]) -> None:
    for program, package, needed in (
        ("trafgen", "netsniff-ng", any(flood.sources for flood in chosen)),
        ("wrk", "wrk", any(not flood.sources for flood in chosen)),
    ):
        if needed and shutil.which(program) is None:
            raise LabError(f"{program} is missing: apt-get install {package}.")


def _installed(guards: Sequence[Peer]) -> list[Peer]:
    for guard in guards:
        if guard.missing:
            typer.echo(f"{guard.name} is left out: {guard.missing}", err=True)
    return [guard for guard in guards if not guard.missing]


def _rounds(
    chosen: Sequence[Flood], guards: Sequence[Peer], rounds: int, seconds: float
) -> Iterator[Run]:
    for number in range(rounds):
        for flood in chosen:
            turned = [*guards[number % len(guards) :], *guards[: number % len(guards)]]
            for guard in turned:
                if guard.applies(flood):
                    typer.echo(f"round {number + 1}: {flood.name}, {guard.name}", err=True)
                    yield measure(flood, guard, number, seconds)
                elif number == 0:
                    typer.echo(f"{guard.name} is not for {flood.name}: {guard.why_not}", err=True)


def _show(runs: Sequence[Run]) -> None:
    console = Console()
    console.width = max(console.width, 160)
    for flood in FLOODS:
        found = [(p.name, runs_of(runs, flood.name, p.name)) for p in PEERS]
        if not any(some for _, some in found):
            continue
        shown = Table(title=f"{flood.name}: {flood.summary}", title_justify="left")
        shown.add_column("guard")
        for title, _, _ in COLUMNS:
            shown.add_column(title, justify="right")
        for name, some in found:
            if some:
                shown.add_row(name, *(spread([value(r) for r in some]) for _, _, value in COLUMNS))
        console.print(shown)
    for goal in goals(runs):
        state = "met" if goal.met else "NOT MET"
        shown_value = spread([goal.low, goal.value, goal.high])
        console.print(f"{state}: {goal.name}: {shown_value}, {goal.goal}", highlight=False)


def show_configs() -> None:
    """Show how each guard is set up."""
    for guard in PEERS:
        for name in guard.files:
            typer.echo(f"# {guard.name}: {name}\n{peers.configuration(name)}")
    typer.echo(f"# lab run --beside: {peers.GATEWAY}\n{peers.configuration(peers.GATEWAY)}")
