"""``rstguard top``: the guard at work, live in a terminal of 80 columns and 24 lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rstguard.cli.common import (
    DEFAULT_DIR,
    RuntimeDir,
    ask,
    errors_in_one_sentence,
    print_json,
    say,
)
from rstguard.cli.picture import Status, frame, outdated
from rstguard.cli.screen import Screen, is_terminal, taken
from rstguard.ipc.requests import ControlError

_PIPE = (80, 24)


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
    """Watch the guard at work, and who is nearest to which limit; q or Ctrl-C leaves.

    A source at 100% has used all that a rule allows at once: what it sends beyond that crosses it.
    """
    if as_json and not once:
        raise typer.BadParameter("goes only with --once", param_hint="--json")
    with errors_in_one_sentence():
        before = _look(runtime_dir)
        if as_json:
            print_json(before)
        elif once or not is_terminal():
            began = time.monotonic()
            time.sleep(interval)
            now = _look(runtime_dir)
            lines = frame(now, before, time.monotonic() - began, _PIPE)
            for line in lines:
                say(line.text)
        else:
            with taken() as screen:
                Live(screen, runtime_dir, before).run(interval)


def _look(runtime_dir: Path) -> Status:
    status: Status = ask(runtime_dir, {"command": "status"})
    status["nearest"] = ask(runtime_dir, {"command": "nearest"})
    return status


class Live:
    """The pictures of one terminal, until its user leaves."""

    def __init__(self, screen: Screen, runtime_dir: Path, first: Status) -> None:
        self._screen, self._runtime_dir = screen, runtime_dir
        self._now, self._before, self._seconds = first, first, 0.0
        self._looked = time.monotonic()
        self._trouble = ""

    def run(self, interval: float) -> None:
        """Look again and again.  A guard that is gone may come back: that is waited for."""
        self._draw()
        while not self._screen.wait(interval, self._draw):
            try:
                now = _look(self._runtime_dir)
            except ControlError as error:
                self._trouble = str(error)
            else:
                self._before, self._now, self._trouble = self._now, now, ""
                looked = time.monotonic()
                self._seconds, self._looked = looked - self._looked, looked
            self._draw()

    def _draw(self) -> None:
        width, height = self._screen.size
        before = self._before if self._seconds else None
        lines = frame(self._now, before, self._seconds, (width, height - bool(self._trouble)))
        if self._trouble:
            lines = outdated(lines, self._trouble, time.monotonic() - self._looked, width)
        self._screen.show(lines)
