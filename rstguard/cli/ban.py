"""``rstguard ban``."""

from __future__ import annotations

from typing import Annotated

import typer

from rstguard.cli.common import (
    DEFAULT_DIR,
    FAILED,
    Json,
    RuntimeDir,
    ask_guard,
    fail,
    print_json,
)
from rstguard.engine.ruleset import SECOND

app = typer.Typer(help="List, add and remove banned sources.", no_args_is_help=True)


@app.command("list")
def ban_list(runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False) -> None:
    """List banned and shunned sources, by which rule, and for how long yet."""
    rows = ask_guard(runtime_dir, "ban-list")
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo("nobody is banned or shunned")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("source", "kind", "rule", "remaining s"):
        table.add_column(title, justify="right" if title == "remaining s" else "left")
    for row in rows:
        table.add_row(row["source"], row["kind"], row["rule"], str(row["remaining_s"]))
    Console().print(table)


@app.command("add", epilog="Example: rstguard ban add 198.51.100.0/24 --for 2h")
def ban_add(
    source: Annotated[str, typer.Argument(help="Address or network, such as 198.51.100.7.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 10m, 2h, 7d.")] = "10m",
    keep_existing: Annotated[
        bool, typer.Option("--keep-existing", help="Leave the source's connections alone.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
) -> None:
    """Ban a source: everything from it is dropped, and its connections are reset."""
    from rstguard.kernel.elements import MAX_SECONDS
    from rstguard.policy.quantities import duration as reader

    try:
        seconds = reader(SECOND, MAX_SECONDS * SECOND)(duration) // SECOND
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from None
    done = ask_guard(
        runtime_dir, "ban-add", source=source, seconds=seconds, keep_existing=keep_existing
    )
    typer.echo(f"{done['source']} is banned for {done['seconds']} s")


@app.command("remove", epilog="Example: rstguard ban remove 198.51.100.7")
def ban_remove(
    source: Annotated[str, typer.Argument(help="Address or network, as `ban list` shows it.")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
) -> None:
    """Lift a ban or shun at once; exit status 1 if there was none."""
    done = ask_guard(runtime_dir, "ban-remove", source=source)
    if not done["removed"]:
        fail(f"{done['source']} is neither banned nor shunned", FAILED)
    typer.echo(f"{done['source']} is free")
