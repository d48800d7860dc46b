"""What the runs say: medians with lowest and highest, ratios within a round, goals, a chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rstguard.lab.bench.floods import FLOODS
from rstguard.lab.bench.measure import Run
from rstguard.lab.bench.peers import PEERS

Value = Callable[[Run], float | None]

COLUMNS: tuple[tuple[str, str, Value], ...] = (
    ("sent/s", "SYNs of the flood; the machine is shared", lambda r: r.sent_a_second),
    ("known %", "honest requests of known clients served", lambda r: r.known.success_percent),
    ("new %", "the same, of clients never seen before", lambda r: r.new.success_percent),
    ("p50 ms", "connect and GET, known clients", lambda r: r.known.p50_ms),
    ("p99 ms", "the same", lambda r: r.known.p99_ms),
    ("new p99 ms", "the same, new clients", lambda r: r.new.p99_ms),
    ("at server %", "of the flood's SYNs", lambda r: r.arrived_percent),
    ("contained s", "until no 0.1 s saw more than 10 of them", lambda r: r.seconds_to_contain),
    ("CPU %", "of one core, the guard's processes", lambda r: r.cpu_percent),
)
"""Columns of the table: title, meaning, value."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal and what was measured: the median of the rounds with lowest and highest."""

    name: str
    value: float
    low: float
    high: float
    goal: str
    met: bool


def runs_of(runs: Sequence[Run], flood: str, peer: str) -> list[Run]:
    """Return the runs of one flood and peer, in the order of their rounds."""
    found = [run for run in runs if (run.flood, run.peer) == (flood, peer)]
    return sorted(found, key=lambda run: run.round)


def spread(values: Sequence[float | None]) -> str:
    """Return "median (lowest to highest)"; a dash for what never was."""
    there = [value for value in values if value is not None]
    if len(there) < len(values) or not there:
        return "-" if not there else f"in {len(there)} of {len(values)}: {_short(median(there))}"
    low, middle, high = min(there), median(there), max(there)
    if _short(low) == _short(high):
        return _short(middle)
    return f"{_short(middle)} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.1f}"


def goals(runs: Sequence[Run]) -> list[Goal]:
    """Return the goals for which there are runs."""
    return list(_goals(runs))


def _goals(runs: Sequence[Run]) -> Iterator[Goal]:
    ours = {flood.name: runs_of(runs, flood.name, "rstguard") for flood in FLOODS}
    if forged := ours["forged"]:
        yield _least("forged: known clients served", [r.known.success_percent for r in forged], 99)
        yield _least("forged: new clients served", [r.new.success_percent for r in forged], 99)
        yield _most("forged: at the server", [r.arrived_percent for r in forged], 1)
        yield _most("forged: processor time of one core", [r.cpu_percent for r in forged], 20)
        for peer in ("iptables", "synproxy"):
            theirs = runs_of(runs, "forged", peer)
            yield from _p99(forged, theirs, "forged", peer)
            yield from _new_p99(forged, theirs, "forged", peer)
    if absorbed := ours["absorbed"]:
        none = runs_of(runs, "absorbed", "none")
        yield from _p50(absorbed, none, "absorbed", "none")
        yield from _p99(absorbed, none, "absorbed", "none")
    if outside := ours["outside"]:
        none = runs_of(runs, "outside", "none")
        pairs = _same_round(outside, none)
        if more := [mine.success_percent - other.success_percent for mine, other in pairs]:
            yield _least("outside: honest success, percentage points above none", more, 0)
        yield from _p50(outside, none, "outside", "none")
        yield from _p99(outside, none, "outside", "none")
    for name in ("one-source", "prefix", "scattered"):
        if some := ours[name]:
            yield _least(f"{name}: honest clients served", [r.success_percent for r in some], 99)
            times = [r.seconds_to_contain for r in some]
            done = [100.0 * (time is not None) for time in times]
            yield _least(f"{name}: contained, in percent of runs", done, 100)


def _p50(ours: list[Run], theirs: list[Run], flood: str, peer: str) -> Iterator[Goal]:
    return _latency(f"{flood}: p50 of known", lambda run: run.known.p50_ms, ours, theirs, peer)


def _p99(ours: list[Run], theirs: list[Run], flood: str, peer: str) -> Iterator[Goal]:
    return _latency(f"{flood}: p99 of known", lambda run: run.known.p99_ms, ours, theirs, peer)


def _new_p99(ours: list[Run], theirs: list[Run], flood: str, peer: str) -> Iterator[Goal]:
    return _latency(f"{flood}: p99 of new", lambda run: run.new.p99_ms, ours, theirs, peer)


def _same_round(ours: list[Run], theirs: list[Run]) -> Iterator[tuple[Run, Run]]:
    other = {run.round: run for run in theirs}
    return ((run, other[run.round]) for run in ours if run.round in other)


def _latency(name: str, of: Value, ours: list[Run], theirs: list[Run], peer: str) -> Iterator[Goal]:
    """Compare latencies of the same round; a round in which nobody was served has none."""
    pairs = ((of(mine), of(other)) for mine, other in _same_round(ours, theirs))
    found = [mine / other for mine, other in pairs if mine and other]
    if found:
        yield _most(f"{name} clients, rstguard / {peer}", found, 1.5)


def _least(name: str, values: Sequence[float], limit: float) -> Goal:
    middle = median(values)
    return Goal(name, middle, min(values), max(values), f">= {limit:g}", middle >= limit)


def _most(name: str, values: Sequence[float], limit: float) -> Goal:
    middle = median(values)
    return Goal(name, middle, min(values), max(values), f"<= {limit:g}", middle <= limit)


def document(runs: Sequence[Run]) -> dict[str, Any]:
    """Return everything as plain values for JSON."""
    return {
        "runs": [{**asdict(run), "arrived_percent": run.arrived_percent} for run in runs],
        "goals": [asdict(goal) for goal in goals(runs)],
    }


def summary(runs: Sequence[Run]) -> list[str]:
    """Return a short table in Markdown: by flood and guard, who was served, and how soon."""
    names = [peer.name for peer in PEERS if any(run.peer == peer.name for run in runs)]
    lines = [f"| flood | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for flood in FLOODS:
        cells = [_served(runs_of(runs, flood.name, name)) for name in names]
        if any(cells):
            lines.append(f"| {flood.name} | {' | '.join(cells)} |")
    return lines


def _served(runs: list[Run]) -> str:
    if not runs:
        return ""
    percent = _short(median(run.success_percent for run in runs))
    late = [run.known.p99_ms for run in runs if run.known.p99_ms is not None]
    return f"{percent} %, {_short(median(late))} ms" if late else f"{percent} %"


def markdown(runs: Sequence[Run]) -> str:
    """Return tables in Markdown: a summary, all figures by flood and peer, and the goals."""
    titles = [title for title, _, _ in COLUMNS]
    lines = [*summary(runs), ""]
    lines += [f"| flood | guard | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for flood in FLOODS:
        for peer in PEERS:
            if found := runs_of(runs, flood.name, peer.name):
                cells = [spread([value(run) for run in found]) for _, _, value in COLUMNS]
                lines.append(f"| {flood.name} | {peer.name} | {' | '.join(cells)} |")
    lines += ["", "| goal | measured | limit | met |", "|---|---|---|---|"]
    for goal in goals(runs):
        shown = spread([goal.low, goal.value, goal.high])
        lines.append(f"| {goal.name} | {shown} | {goal.goal} | {'yes' if goal.met else '**no**'} |")
    return "\n".join(lines) + "\n"


_COLOURS = {
    "none": "#8c8c8c",
    "rstguard": "#1f77b4",
    "iptables": "#e08214",
    "synproxy": "#b15928",
    "suricata": "#9467bd",
    "fail2ban": "#2ca02c",
}
_BAR, _LEFT, _WIDE = 13, 150, 420


def chart(runs: Sequence[Run]) -> str:
    """Return an SVG with the share of honest requests that succeeded, by flood and guard."""
    rows: list[str] = []
    y = 30
    for flood in FLOODS:
        shown = [(peer.name, runs_of(runs, flood.name, peer.name)) for peer in PEERS]
        if not any(found for _, found in shown):
            continue
        rows.append(f'<text x="8" y="{y + 10}" font-weight="bold">{flood.name}</text>')
        for name, found in shown:
            if found:
                percent = median(run.success_percent for run in found)
                rows += _bar(name, percent, y)
                y += _BAR + 2
        y += 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDE + 70} {y}" '
        'font-family="sans-serif" font-size="11" fill="#808080">'
    )
    title = '<text x="8" y="16" font-size="13">Honest requests that succeeded, %</text>'
    return "\n".join([head, title, *rows, "</svg>"]) + "\n"


def _bar(name: str, percent: float, y: int) -> list[str]:
    width = max(1, round(_WIDE * percent / 100))
    return [
        f'<text x="{_LEFT - 6}" y="{y + 10}" text-anchor="end">{name}</text>',
        f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR}" fill="{_COLOURS[name]}"/>',
        f'<text x="{_LEFT + width + 5}" y="{y + 10}">{percent:.1f}</text>',
    ]
