"""Lists of bans in the forms that people have them in: plain text, CSV, CrowdSec's decisions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rstguard.engine.address import Prefix, parse_prefix
from rstguard.kernel.elements import MAX_SECONDS

_SOURCES = ("source", "ip", "address", "value", "network", "cidr", "range", "prefix")
_DURATIONS = ("duration", "seconds", "remaining", "for", "timeout", "ttl")
_GO_DURATION = re.compile(
    r"-?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+)(?:\.\d+)?s)?(?:\d+(?:\.\d+)?ms)?"
)
_COMMENT = re.compile(r"[#;].*")


class Ban(NamedTuple):
    """One entry: whom to ban, and for how many seconds; 0 for the default."""

    source: Prefix
    seconds: int


class Wrong(NamedTuple):
    """A line (or entry) that is none, and why."""

    line: int
    why: str


Entry = Ban | Wrong


def read(text: str) -> Iterator[Entry]:
    """Read a list, whatever its form: JSON if it begins as such, CSV if a line has a comma."""
    text = text.removeprefix("\ufeff")
    start = text.lstrip()[:1]
    if start in ("[", "{") or text.strip() == "null":
        yield from _json(text)
    elif any("," in _COMMENT.sub("", line) for line in text.splitlines()):
        yield from _csv(text)
    else:
        yield from _plain(text)


def _plain(text: str) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        words = _COMMENT.sub("", line).split()
        if words:
            yield _entry(number, words[0], "")


def _csv(text: str) -> Iterator[Entry]:
    rows = csv.reader(io.StringIO(text))
    source, duration = 0, -1
    first = True
    try:
        for row in rows:
            if not row or not row[0].strip() or row[0].lstrip().startswith("#"):
                continue
            if first:
                first = False
                names = [cell.strip().lower() for cell in row]
                found = next((names.index(name) for name in _SOURCES if name in names), -1)
                if found >= 0:
                    source = found
                    duration = next((names.index(n) for n in _DURATIONS if n in names), -1)
                    continue
            if len(row) <= source:
                yield Wrong(rows.line_num, "it has too few columns")
                continue
            given = row[duration] if 0 <= duration < len(row) else ""
            yield _entry(rows.line_num, row[source].strip(), given.strip())
    except csv.Error as error:
        yield Wrong(rows.line_num, f"it is no CSV ({error})")


def _json(text: str) -> Iterator[Entry]:
    """CrowdSec: `cscli decisions list -o json` has alerts, the local API a list of decisions."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield Wrong(getattr(error, "lineno", 1), "it is no JSON")
        return
    decisions = _decisions(data)
    for number, decision in enumerate(decisions, 1):
        if not isinstance(decision, dict):
            yield Wrong(number, "it is no decision")
            continue
        kind, scope = decision.get("type", "ban"), str(decision.get("scope", "ip")).lower()
        if kind != "ban" or scope not in ("ip", "range"):
            yield Wrong(number, f"a decision of type {kind} and scope {scope} cannot be imported")
            continue
        if decision.get("simulated") is True:
            yield Wrong(number, "it is only simulated")
            continue
        yield _entry(number, str(decision.get("value", "")), str(decision.get("duration", "")))


def _decisions(data: Any) -> list[Any]:
    if isinstance(data, dict):
        data = data.get("new", data.get("decisions", [data]))
    if not isinstance(data, list):
        return []
    found: list[Any] = []
    for one in data:
        inner = one.get("decisions") if isinstance(one, dict) else None
        found += inner if isinstance(inner, list) else [one]
    return found


def _entry(line: int, source: str, duration: str) -> Entry:
    try:
        prefix = parse_prefix(source)
    except ValueError as error:
        return Wrong(line, f"{source[:60]!r} is no address or network ({error})")
    if prefix.length == 0:
        return Wrong(line, f"{source} would ban everybody")
    seconds = 0
    if duration:
        read_seconds = _duration(duration)
        if read_seconds is None:
            return Wrong(line, f"{duration[:60]!r} is no time")
        if read_seconds < 1:
            return Wrong(line, "its time is over")
        seconds = min(read_seconds, MAX_SECONDS)
    return Ban(prefix, seconds)


def _duration(text: str) -> int | None:
    """Read seconds, or a time as Go writes it: 3h59m51.2s, or with days before."""
    if len(text) > 40:
        return None
    readers: tuple[Callable[[str], int], ...] = (int, lambda value: int(float(value)))
    for reader in readers:
        try:
            return reader(text)
        except (ValueError, OverflowError):
            continue
    match = _GO_DURATION.fullmatch(text)
    if match is None or not text.strip("-"):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = 86_400 * days + 3600 * hours + 60 * minutes + seconds
    return -total if text.startswith("-") else total
