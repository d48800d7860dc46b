"""``rstguard ban``."""

from __future__ import annotations

import sys
from pathlib import Path
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
    say,
)
from rstguard.engine.ruleset import SECOND

_MOST_NAMED = 20

app = typer.Typer(help="List, add, import and remove banned sources.", no_args_is_help=True)


@app.command("list", epilog="Example: rstguard ban list --json")
def ban_list(runtime_dir: RuntimeDir = DEFAULT_DIR, as_json: Json = False) -> None:
    """List banned and shunned sources, by which rule, and for how long yet."""
    rows = ask_guard(runtime_dir, "ban-list")
    if as_json:
        print_json(rows)
        return
    if not rows:
        say("nobody is banned or shunned")
        return
    # As plain as can be: there may be a million, and scripts may read this, too.
    titles = ("source", "kind", "answer", "rule")
    widths = [max(len(title), *(len(row[title]) for row in rows)) for title in titles]
    lines = [(*titles, "seconds left")]
    lines += [(*(r[title] for title in titles), _left(r["remaining_s"])) for r in rows]
    for *words, left in lines:
        cells = [word.ljust(width) for word, width in zip(words, widths, strict=True)]
        say("  ".join([*cells, f"{left:>12}"]))


def _left(seconds: int | None) -> str:
    return "for ever" if seconds is None else str(seconds)


@app.command("add", epilog="Example: rstguard ban add 198.51.100.0/24 --for 2h")
def ban_add(
    source: Annotated[str, typer.Argument(help="Address or network, such as 198.51.100.7.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 90s, 10m, 2h, 7d.")] = "10m",
    keep_existing: Annotated[
        bool, typer.Option("--keep-existing", help="Leave the source's connections alone.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Ban a source: everything from it is dropped, and its connections are reset."""
    seconds = _seconds(duration)
    done = ask_guard(
        runtime_dir, "ban-add", source=source, seconds=seconds, keep_existing=keep_existing
    )
    if as_json:
        print_json(done)
    else:
        kept = "its connections stay" if keep_existing else "its connections are reset"
        say(f"{done['source']} is banned for {done['seconds']} s; {kept}")
        for row in done["protected"]:
            say(f"  but {row['address']} is {row['what']}, which is never banned")


def _seconds(duration: str) -> int:
    from rstguard.kernel.elements import MAX_SECONDS
    from rstguard.policy.quantities import duration as reader

    try:
        return reader(SECOND, MAX_SECONDS * SECOND)(duration) // SECOND
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--for") from None


@app.command(
    "import",
    epilog="Examples: rstguard ban import bad.txt --for 24h; "
    "cscli decisions list -o json | rstguard ban import -",
)
def ban_import(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Plain text, CSV or CrowdSec JSON; - reads a pipe."),
    ],
    duration: Annotated[
        str, typer.Option("--for", help="How long, for entries that do not say: 90s, 10m, 2h, 7d.")
    ] = "24h",
    strict: Annotated[
        bool, typer.Option("--strict", help="Ban nobody if any entry is wrong.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check the list, and ban nobody.")
    ] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Ban all sources of a list; entries that are wrong are named, and the others taken."""
    from rstguard.cli.banlist import Ban, Wrong, read
    from rstguard.control.ban_import import MOST_AT_ONCE

    default = _seconds(duration)
    entries = list(read(_text(file)))
    wrong = [entry for entry in entries if isinstance(entry, Wrong)]
    bans = [entry for entry in entries if isinstance(entry, Ban)]
    for entry in wrong[:_MOST_NAMED]:
        say(f"{file}:{entry.line}: {entry.why}", err=True)
    if len(wrong) > _MOST_NAMED:
        say(f"{file}: {len(wrong) - _MOST_NAMED} more entries are wrong", err=True)
    banned, refused = 0, []
    if not dry_run and not (strict and wrong):
        for start in range(0, len(bans), MOST_AT_ONCE):
            some = [(str(b.source), b.seconds or default) for b in bans[start:][:MOST_AT_ONCE]]
            so_far = f"{banned} of {len(bans)} were banned before this" if banned else ""
            done = ask_guard(runtime_dir, "ban-import", failed=so_far, bans=some)
            banned += done["banned"]
            refused += done["refused"]
            if len(bans) > MOST_AT_ONCE and sys.stderr.isatty():
                say(f"{start + len(some)} of {len(bans)}", err=True)
    if as_json:
        rows = [entry._asdict() for entry in wrong]
        print_json({"read": len(bans), "banned": banned, "refused": refused, "wrong": rows})
    else:
        for row in refused[:_MOST_NAMED]:
            say(f"{row['source']} is not banned: {row['why']}", err=True)
        say(f"{len(bans)} read, {banned} banned, {len(refused)} refused, {len(wrong)} wrong")
    if wrong and (strict or not bans):
        raise typer.Exit(FAILED)


def _text(file: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        fail(f"{file} cannot be read ({error.strerror})", FAILED)
    return data.decode(errors="replace")


@app.command("remove", epilog="Example: rstguard ban remove 198.51.100.7")
def ban_remove(
    source: Annotated[str, typer.Argument(help="Address or network, as `ban list` shows it.")],
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Json = False,
) -> None:
    """Lift a ban or shun at once; exit status 1 if there was none."""
    done = ask_guard(runtime_dir, "ban-remove", source=source)
    if not done["removed"]:
        fail(f"{done['source']} is neither banned nor shunned", FAILED)
    if as_json:
        print_json(done)
    else:
        say(f"{done['source']} is free")
