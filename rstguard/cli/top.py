"""``rstguard top``: the guard at work, live in a terminal of 80 columns and 24 lines."""

from __future__ import annotations

import select
import shutil
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from rstguard.cli.common import DEFAULT_DIR, RuntimeDir, ask_guard, print_json
from rstguard.cli.events import line as event_line

Status = dict[str, Any]

_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST = "\x1b[H", "\x1b[J"
_MOST_WORKERS, _MOST_SERVICES, _MOST_SOURCES = 4, 2, 4


def top(
    interval: Annotated[
        float, typer.Option(min=0.2, max=60, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show one picture and leave.")] = False,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: print the data of the picture.")
    ] = False,
) -> None:
    """Watch the guard at work; q or Ctrl-C leaves."""
    if as_json and not once:
        raise typer.BadParameter("goes only with --once", param_hint="--json")
    before: Status = ask_guard(runtime_dir, "status")
    if as_json:
        print_json(before)
        return
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        typer.echo("\n".join(frame(before, before, 1.0, 80, 24)))
        return
    with _screen():
        began = time.monotonic()
        while not _left(interval):
            now: Status = ask_guard(runtime_dir, "status")
            size = shutil.get_terminal_size()
            seconds, began = time.monotonic() - began, time.monotonic()
            lines = frame(now, before, seconds, size.columns, size.lines)
            sys.stdout.write(_HOME + "".join(f"{one}\x1b[K\n" for one in lines[:-1]))
            sys.stdout.write(f"{lines[-1]}\x1b[K{_REST}")
            sys.stdout.flush()
            before = now


@contextmanager
def _screen() -> Iterator[None]:
    """Take the terminal over, and give it back as it was, whatever happens."""
    modes = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        sys.stdout.write(_ALTERNATE)
        yield
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
        sys.stdout.write(_NORMAL)
        sys.stdout.flush()


def _left(seconds: float) -> bool:
    """Wait, and tell whether the user wants to leave meanwhile."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(ready) and sys.stdin.read(1) in ("q", "Q", "\x03", "")


def frame(now: Status, before: Status, seconds: float, width: int, height: int) -> list[str]:
    """Return the lines of one picture, none longer than `width`, at most `height` of them."""
    head = [*_head(now), "", *_rates(now, before, seconds), "", *_workers(now), *_budget(now)]
    sources = _sources(now)
    room = height - len(head) - len(sources) - 1
    events = [event_line(one)[11:] for one in reversed(now["recent"])][: max(room, 0)]
    lines = [*head, *sources, "", *(events or ["nothing has happened yet"])]
    return [one[:width] for one in lines[:height]]


def _head(now: Status) -> Iterator[str]:
    policy = now["policy"]
    state = "filtering" if now["filtering"] else "NOT FILTERING"
    state = "PANIC: all traffic passes" if now["panic"] else state
    named = f"policy {policy['name']} ({policy['mode']})"
    yield f"rstguard: {state}, {named}, up {now['uptime_s']:.0f} s"
    blocked = now["blocked"]
    yield (
        f"{blocked['ban']} banned, {blocked['shun']} shunned, {now['productive']} productive "
        f"sources, {now['counts'].get('flows', 0)} connections at the last sweep"
    )


def _rates(now: Status, before: Status, seconds: float) -> Iterator[str]:
    def rate(*path: str) -> str:
        return f"{(_count(now, path) - _count(before, path)) / max(seconds, 0.001):,.0f}/s"

    yield (
        f"packets {rate('packets')}   dropped {rate('verdict.drop')}   resets {rate('reset')}   "
        f"bans {rate('ban')}   shuns {rate('shun')}"
    )


def _count(status: Status, path: tuple[str, ...]) -> int:
    found = status["counts"].get(path[0], 0)
    return sum(found.values()) if isinstance(found, dict) else int(found)


def _workers(now: Status) -> Iterator[str]:
    for row in now["workers"][:_MOST_WORKERS]:
        left = f", {row['left_undone']}" if row["overload"] else ""
        yield (
            f"worker {row['pid']}: {row['packets']} packets, {row['waiting']} waiting, "
            f"{row['overrun']} overrun, {row['restarts']} restarts{left}"
        )


def _budget(now: Status) -> Iterator[str]:
    budget = now["syn_budget"]
    if budget is None:
        yield "no SYN budget"
        return
    cookies = budget["cookies"]
    yield f"SYN budget {budget['rate']}/s: {cookies['sent']} cookies, {cookies['accepted']} back"
    for row in budget["services"][:_MOST_SERVICES]:
        over = row["engaged_s"]
        state = "within budget" if over is None else f"SYN cookies for {over:.0f} s"
        yield f"  {row['service']}: {state}"


def _sources(now: Status) -> list[str]:
    """Return who crossed rules most often of late."""
    counted: Counter[str] = Counter()
    for event in now["recent"]:
        subject = str(event["subject"]).partition(" ")[0]
        if event["kind"] in ("ban", "shun"):
            counted[subject] += 1
        elif event["kind"] in ("reset", "observed"):
            counted[subject.rpartition(":")[0].strip("[]")] += 1
    most = counted.most_common(_MOST_SOURCES)
    named = ", ".join(f"{source} ({times})" for source, times in most)
    return [f"crossed rules lately: {named}"] if named else []
