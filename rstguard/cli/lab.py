"""``rstguard lab``: attacks, scenarios and comparisons in a laboratory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Attack a server behind a guarded gateway, in network namespaces of its own.",
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seconds = Annotated[
    int | None,
    typer.Option("--seconds", min=1, max=600, help="Length of each half instead of the usual."),
]


@app.command("list", epilog="Example: rstguard lab list")
def list_scenarios(as_json: Json = False) -> None:
    """List the scenarios."""
    from rstguard.lab import terminal

    terminal.list_scenarios(as_json=as_json)


@app.command(
    "run",
    epilog="Examples: sudo rstguard lab run all; sudo rstguard lab run syn-flood --json; "
    "sudo rstguard lab run evasion forged-proof poisoned-window cap forged-resets",
)
def run_scenarios(
    names: Annotated[list[str], typer.Argument(metavar="SCENARIO...", help="Names, or 'all'.")],
    as_json: Json = False,
    seconds: Seconds = None,
    beside: Annotated[
        bool,
        typer.Option("--beside", help="Let each attack meet hand-written iptables rules, too."),
    ] = False,
) -> None:
    """Run scenarios, each without and with the guard; exit 1 if the guard fell short."""
    from rstguard.lab import terminal

    terminal.run_scenarios(names, as_json=as_json, seconds=seconds, beside=beside)


@app.command(epilog="Example: sudo rstguard lab demo")
def demo(as_json: Json = False) -> None:
    """Run a chosen few in under two minutes."""
    from rstguard.lab import terminal

    terminal.run_demo(as_json=as_json)


@app.command(epilog="Example: sudo rstguard lab bench --show-configs")
def bench(
    flood: Annotated[
        list[str] | None, typer.Option(help="Only this flood; may be repeated.")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Only this guard; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each pair.")] = 3,
    seconds: Annotated[float, typer.Option(min=2, max=600, help="Length of each flood.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to a file, too.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the tables in Markdown.")] = None,
    svg: Annotated[Path | None, typer.Option("--chart", help="Write a chart (SVG).")] = None,
    show_configs: Annotated[
        bool, typer.Option("--show-configs", help="Show how each guard is configured, and end.")
    ] = False,
) -> None:
    """Compare guards under the same floods; exit 1 if rstguard missed a goal.

    Each round runs each flood against each guard, in an order that changes from round to round.
    All of it takes about 16 minutes.

    Examples: `rstguard lab bench --flood forged --rounds 1`;
    `rstguard lab bench --out bench.json --table bench.md --chart bench.svg`.
    """
    from rstguard.lab.bench import terminal

    if show_configs:
        terminal.show_configs()
        return
    terminal.compare(flood, peer, rounds, seconds, as_json=as_json, out=out, table=table, svg=svg)
