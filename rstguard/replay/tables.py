"""A replay's report for people: tables, cut to as many rows as one can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from rstguard.engine.address import Prefix
from rstguard.engine.ruleset import SECOND
from rstguard.observe.text import plain
from rstguard.replay.hits import KINDS, Hit
from rstguard.replay.play import BASE
from rstguard.replay.report import Comparison, Report, capture_time, offset

_WORDS = {
    "ban": "banned",
    "shun": "shunned",
    "reset": "reset",
    "refuse": "refused",
    "drop": "dropped",
    "observe": "observed",
}
_SOURCE = ("", "source", "by rule", "after s", "times", "packets", "connections", "good before")
_CONNECTION = ("", "connection", "by rule", "after s", "times", "packets", "connections", "")


def shown(report: Report, top: int, *, brief: bool = False) -> Iterator[RenderableType]:
    """Yield a report piece by piece; `top` rows of each table, 0 for all.

    `brief` leaves out who was hit, for a report that is to be compared with another.
    """
    seconds = report.length / SECOND
    began = f" from {capture_time(report.start, BASE)}" if report.start else ""
    yield escape(
        f"{plain(report.policy)} over {plain(str(report.capture))}: "
        f"{report.frames:,} packets in {seconds:,.1f} s"
        f"{began}; {report.judged:,} were judged"
    )
    if not report.enforce:
        yield "The policy only observes: nothing takes effect, so nothing is kept away."
    for note in report.notes:
        yield escape(f"Note: {note}.")
    if not any(total.times for total in report.totals):
        yield "No rule would have done anything."
        return
    yield _totals(report)
    if brief:
        return
    yield from _whys(report)
    sources = [hit for hit in report.hits if isinstance(hit.subject, Prefix)]
    connections = [hit for hit in report.hits if not isinstance(hit.subject, Prefix)]
    yield from _hits(_SOURCE, sources, top)
    yield from _hits(_CONNECTION, connections, top)
    if report.left_out:
        yield f"{report.left_out:,} more hits have no record of their own: the totals have them."
    yield (
        "packets, connections: what would not have arrived, or would have ended; good before: "
        "connections that the source had brought to a good end with data both ways"
    )


def compared(found: Comparison, top: int) -> Iterator[RenderableType]:
    """Yield a comparison piece by piece."""
    if not (found.only_first or found.only_second or found.other_time):
        yield escape(f"{found.first} and {found.second} do the same to this capture.")
        return
    for name, hits in ((found.first, found.only_first), (found.second, found.only_second)):
        if hits:
            yield escape(f"Only {name} would have hit {len(hits):,}:")
        yield from _hits(("", "who", *_SOURCE[2:]), hits, top)
    if not found.other_time:
        return
    yield f"Both would have hit {len(found.other_time):,}, but not at the same time:"
    table = _table("", "who", f"{found.first} after s", f"{found.second} after s", numbers=2)
    for one, other in found.other_time[: top or None]:
        times = (f"{offset(hit.first):,.3f}" for hit in (one, other))
        table.add_row(_WORDS[one.kind], str(one.subject), *times)
    yield table
    yield from _more(len(found.other_time), top)


def _totals(report: Report) -> Table:
    kinds = [kind for kind in KINDS if any(kind in total.times for total in report.totals)]
    words = [_WORDS[kind] for kind in kinds]
    table = _table("rule", *words, "packets", "connections", numbers=len(kinds) + 2)
    for total in report.totals:
        # Of dropped packets their number says more than of whom they were.
        cells = [
            (total.times if kind in ("drop", "observe") else total.subjects).get(kind, 0)
            for kind in kinds
        ]
        table.add_row(total.rule, *map(_number, (*cells, total.packets, total.connections)))
    return table


def _whys(report: Report) -> Iterator[str]:
    """Say once for each rule what its hits were for."""
    for total in report.totals:
        reasons = {hit.reason: None for hit in report.hits if hit.rule == total.rule}
        yield from (escape(f"{total.rule}: {reason.value}") for reason in reasons)


def _hits(titles: Sequence[str], hits: Sequence[Hit], top: int) -> Iterator[RenderableType]:
    if not hits:
        return
    table = _table(*titles, numbers=5)
    for hit in hits[: top or None]:
        good = str(hit.productive) if hit.kind in ("ban", "shun") else ""
        table.add_row(
            _WORDS[hit.kind],
            str(hit.subject),
            hit.rule,
            f"{offset(hit.first):,.3f}",
            *map(_number, (hit.times, hit.packets, hit.connections)),
            good,
        )
    yield table
    yield from _more(len(hits), top)


def _more(count: int, top: int) -> Iterator[str]:
    if top and count > top:
        yield f"and {count - top:,} more: --top 0 shows all"


def _table(*titles: str, numbers: int) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, title in enumerate(titles):
        right = index >= len(titles) - numbers
        # What names somebody stays in one piece, to be found and copied.
        table.add_column(
            escape(title), justify="right" if right else "left", overflow="fold", no_wrap=not right
        )
    return table


def _number(value: int) -> str:
    return f"{value:,}" if value else ""
