"""``rstguard policy replay``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rstguard.cli.common import BAD_POLICY, FAILED, Json, PolicyFile, fail, print_json, say

if TYPE_CHECKING:
    from rstguard.engine.ruleset import RuleSet
    from rstguard.replay.hits import Hit
    from rstguard.replay.play import Replay
    from rstguard.replay.report import Report

_SHOW_AFTER = 2.0
"""Seconds after which a terminal is shown how far it is."""
_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""

CaptureFile = Annotated[
    Path, typer.Argument(metavar="CAPTURE", help="pcap or pcapng, maybe gzipped; - reads a pipe.")
]


class Mode(Enum):
    """What replaces the policy's own mode."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


def policy_replay(
    file: PolicyFile,
    capture: CaptureFile,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="A second policy: tell what differs.")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option(help="Replay in this mode instead of the policy's own.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Rows of each table; 0 shows all.")] = 20,
    events: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each thing done as a line of JSON."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a policy would have done to a capture: to whom, when, and why.

    The guard's own engine judges the packets in the capture's time, and what
    it orders takes effect: a banned source's packets count as not arrived.

    Capture both directions, on the protected interface alone
    (tcpdump -i eth0 -s 128 -w FILE tcp): on `any` a gateway sees each packet
    twice. protect.interfaces is ignored: a packet is inbound if it goes to
    protect.destinations, else by who sent the first SYN.
    """
    from rich.console import Console

    from rstguard.replay.report import compare, comparison_data, report_data
    from rstguard.replay.tables import compared, shown

    files = [file] if against is None else [file, against]
    reports = _played([_ruleset(name, mode) for name in files], capture, events)
    if against is not None and reports[0].policy == reports[1].policy:
        named = zip(files, reports, strict=True)
        reports = [replace(report, policy=str(name)) for name, report in named]
    found = compare(*reports) if against else None
    if as_json:
        data = report_data(reports[0])
        if found is not None:
            data |= {"against": report_data(reports[1])}
            data |= {"differences": comparison_data(found, reports[0].start)}
        print_json(data)
        return
    # Of an IPv6 address with ":b:" in it rich would make a picture.
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    pieces = [piece for report in reports for piece in shown(report, top, brief=bool(against))]
    for piece in pieces + ([*compared(found, top)] if found else []):
        console.print(piece)


def _played(rulesets: list[RuleSet], file: Path, events: Path | None) -> list[Report]:
    """Replay a capture by all policies at once, or say why that is impossible."""
    from rstguard.replay.capture import open_capture
    from rstguard.replay.play import Replay
    from rstguard.replay.report import report_of
    from rstguard.replay.run import play
    from rstguard.replay.unpacking import CaptureError

    replays = [Replay(ruleset) for ruleset in rulesets]
    try:
        with ExitStack() as stack:
            capture = stack.enter_context(open_capture(file))
            if events is not None:
                _write_events(replays[0], stack.enter_context(events.open("w")))
            play(capture, replays, stack.enter_context(progress_on_stderr()))
            return [report_of(one, capture) for one in replays]
    except CaptureError as error:
        fail(str(error), FAILED)
    except OSError as error:
        fail(f"{error.filename or events} cannot be written ({error.strerror})", FAILED)


def _ruleset(file: Path, mode: Mode | None) -> RuleSet:
    """Read a policy; whether its interfaces exist here does not matter to a capture."""
    from rstguard.policy.compile import compile_policy
    from rstguard.policy.load import PolicyError, load

    try:
        loaded = load(file)
    except PolicyError as error:
        fail(str(error), BAD_POLICY)
    for problem in loaded.warnings:
        say(str(problem), err=True)
    ruleset = compile_policy(loaded.policy)
    return replace(ruleset, enforce=mode is Mode.ENFORCE) if mode else ruleset


def _write_events(one: Replay, out: TextIO) -> None:
    """Have each thing that is done written as a line of JSON."""
    from rstguard.replay.report import event_data

    def write(hit: Hit, now: int) -> None:
        out.write(json.dumps(event_data(hit, one.start, now, one.ruleset.enforce)) + "\n")

    one.hits.tell = write


@contextmanager
def progress_on_stderr() -> Iterator[Callable[[float], None] | None]:
    """Give what shows a bar on a terminal once it takes long, or None if there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    began = time.monotonic()
    columns = (TextColumn("reading"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, visible=False)

        def told(done: float) -> None:
            if time.monotonic() - began > _SHOW_AFTER:
                bar.update(task, completed=done, visible=True, total=1.0 if done else None)

        yield told
