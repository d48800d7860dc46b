"""``rstguard events``."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rstguard.cli.common import (
    DEFAULT_DIR,
    FAILED,
    RuntimeDir,
    ask,
    ask_guard,
    fail,
    json_text,
    say,
)
from rstguard.control.protocol import NoDaemon
from rstguard.engine.address import Prefix, parse_address, parse_prefix
from rstguard.ipc.requests import ControlError
from rstguard.observe.events import KINDS, sentence

_LOOK_SECONDS = 0.5
_LONGEST_LINE = 1 << 16

Record = dict[str, Any]


def events(
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind; may be repeated.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="Only by this rule; the same.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Only what concerns this address or network.")
    ] = None,
    most: Annotated[
        int, typer.Option("-n", min=0, max=4096, help="At most so many of the latest.")
    ] = 50,
    file: Annotated[
        Path | None,
        typer.Option("--from", help="Read a file that `run --event-log` wrote.", readable=False),
    ] = None,
    runtime_dir: RuntimeDir = DEFAULT_DIR,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each.")] = False,
) -> None:
    """Show what the guard did, and why; the latest last."""
    for name in kind or ():
        if name not in KINDS:
            raise typer.BadParameter(f"there are {', '.join(KINDS)}", param_hint="--kind")
    if follow and file:
        raise typer.BadParameter("a file is not followed: use tail -f", param_hint="--follow")
    wanted = _Filter(kind, rule, _prefix(source))
    if file is not None:
        _show([record for record in _read(file) if wanted.takes(record)][-most:], as_json)
        return
    records = ask_guard(runtime_dir, "events", after=0, most=4096)
    number = records[-1]["number"] if records else 0
    chosen = [record for record in records if wanted.takes(record)]
    _show(chosen[-most:] if most else [], as_json)
    if follow:
        for records in _following(runtime_dir, number):
            _show(filter(wanted.takes, records), as_json)


def _following(runtime_dir: Path, number: int) -> Iterator[list[Record]]:
    """Yield what happens after the event of a number, as long as the output is read.

    A guard that is started again counts its events anew.
    """
    gone = False
    while not _hung_up():
        time.sleep(_LOOK_SECONDS)
        try:
            records = ask(runtime_dir, {"command": "events", "after": number, "most": 4096})
        except ControlError as error:
            if not isinstance(error, NoDaemon):
                fail(str(error), FAILED)
            if not gone:
                say("rstguard: the guard has stopped; waiting for the next", err=True)
            gone, number = True, 0
            continue
        gone = False
        if records:
            left_out = records[0]["number"] - number - 1
            if left_out > 0:
                say(f"rstguard: {left_out} events came too fast to be shown", err=True)
            number = records[-1]["number"]
            yield records


def _hung_up() -> bool:
    """Tell whether the output is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(1, 0)
    return any(state & select.POLLERR for _, state in poll.poll(0))


class _Filter:
    """Which events are asked for."""

    def __init__(
        self, kinds: list[str] | None, rules: list[str] | None, source: Prefix | None
    ) -> None:
        self._kinds, self._rules, self._source = kinds, rules, source

    def takes(self, record: Record) -> bool:
        """Tell whether all conditions fit."""
        if self._kinds and record["kind"] not in self._kinds:
            return False
        if self._rules and record["rule"] not in self._rules:
            return False
        return self._source is None or _concerns(str(record["subject"]), self._source)


def _concerns(subject: str, wanted: Prefix) -> bool:
    """Tell whether the first address of an event's subject is one of those wanted, or holds one."""
    text = subject.partition(" ")[0]
    try:
        prefix = parse_prefix(text)
    except ValueError:
        text = text.rpartition(":")[0].strip("[]")
        try:
            return wanted.covers(parse_address(text))
        except ValueError:
            return False
    return wanted.covers(prefix.network) or prefix.covers(wanted.network)


def _prefix(text: str | None) -> Prefix | None:
    if text is None:
        return None
    try:
        return parse_prefix(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--source") from None


def _show(records: Iterable[Record], as_json: bool) -> None:
    for record in records:
        say(json_text(record) if as_json else line(record))


def line(record: Record) -> str:
    """Return an event as a line for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["time"]))
    return f"{when}  {sentence(record)}"


def _read(path: Path) -> Iterator[Record]:
    """Yield the events of a file; lines that are none are counted and told."""
    bad = 0
    try:
        with path.open("rb") as file:
            while text := file.readline(_LONGEST_LINE):
                record = _record(text)
                if record is None:
                    bad += 1
                else:
                    yield record
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})", FAILED)
    if bad:
        say(f"{path}: {bad} lines are no events and were left out", err=True)


def _record(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    words = ("kind", "subject", "rule", "detail")
    if not isinstance(record, dict) or not all(isinstance(record.get(w), str) for w in words):
        return None
    when = record.get("time")
    if isinstance(when, bool) or not isinstance(when, int | float) or not 0 <= when < 1 << 33:
        return None
    return {"why": None, "reason": None, "enforced": True, "number": 0} | record
