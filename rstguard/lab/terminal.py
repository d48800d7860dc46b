"""What ``rstguard lab`` shows in a terminal while it works, and afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rstguard.lab import LabError, run
from rstguard.lab.report import Result, document, guard_lines, table
from rstguard.lab.scenarios import DEMO, SCENARIOS, Scenario, find
from rstguard.lab.topology import ended_by_signals, require_root


def list_scenarios(*, as_json: bool) -> None:
    """Show the scenarios there are."""
    if as_json:
        rows = [{"name": s.name, "summary": s.summary, "seconds": s.seconds} for s in SCENARIOS]
        typer.echo(json.dumps(rows, indent=2))
        return
    shown = Table()
    for title in ("scenario", "attack", "seconds per half"):
        shown.add_column(title)
    for scenario in SCENARIOS:
        shown.add_row(scenario.name, scenario.summary, str(scenario.seconds))
    Console().print(shown)


def run_demo(*, as_json: bool) -> None:
    """Run those scenarios that say most in little time."""
    run_scenarios(list(DEMO), as_json=as_json, seconds=None)


def run_scenarios(
    names: list[str], *, as_json: bool, seconds: int | None, beside: bool = False
) -> None:
    """Run scenarios and show what came of them; leaves with 1 if the guard fell short.

    `beside` the guard they meet hand-written rules, which need ipset.
    """
    try:
        chosen = list(SCENARIOS) if names == ["all"] else [find(name) for name in names]
        for scenario in chosen:
            _require_length(scenario, seconds)
            scenario.plan(scenario.seconds).require_tools()
        require_root()
        with ended_by_signals(), _progress() as tell:
            results = []
            for scenario in chosen:
                length = seconds or scenario.seconds
                results.append(run.run_scenario(scenario, length, tell, beside))
                if not as_json:
                    _show(results[-1])
    except LabError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("Interrupted; the lab has been removed.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(document(results), indent=2))
    if any(result.problems for result in results):
        raise typer.Exit(1)


def _require_length(scenario: Scenario, seconds: int | None) -> None:
    if seconds is not None and seconds < scenario.least_seconds:
        raise LabError(
            f"{scenario.name} shows nothing in {seconds} s: give it at least "
            f"--seconds {scenario.least_seconds}."
        )


@contextmanager
def _progress() -> Iterator[run.Progress]:
    """Show progress on standard error: a bar on a terminal, otherwise a line for each step."""
    console = Console(stderr=True)
    if not console.is_terminal:
        told: list[str] = []

        def line(text: str, _done: float) -> None:
            if told[-1:] != [text]:
                told.append(text)
                typer.echo(text, err=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=1)

        def bar(text: str, done: float) -> None:
            bars.update(task, description=text, completed=done)

        yield bar


def _show(result: Result) -> None:
    # Of an IPv6 address with ":b:" in it rich would make a picture.
    console = Console(emoji=False)
    if result.without:
        console.print(table(result))
    if result.guarded and result.guarded.guard:
        for line in guard_lines(result.guarded.guard):
            console.print(f"  {line}", markup=False, highlight=False)
    for problem in result.problems:
        console.print(f"  {problem}", style="bold red", markup=False, highlight=False)
    console.print()
