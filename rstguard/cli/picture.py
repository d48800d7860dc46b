"""What ``rstguard top`` shows: the guard on one screen, as lines of text.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

from rstguard.cli.events import line as event_line
from rstguard.cli.status import fullest, waiting
from rstguard.observe.text import plain

Status = dict[str, Any]
"""What the guard answers to `status`, and with it what it answers to `nearest`."""

_MOST_WORKERS, _MOST_SERVICES, _MOST_PROBLEMS = 4, 2, 2
_FEWEST_NEAREST, _MOST_NEAREST = 3, 15
_FEWEST_EVENTS = 3
_ROOMY = 16
"""Lines from which on some may be empty."""
_DAY, _HOUR, _MINUTE = 86400, 3600, 60


class Style(Enum):
    """How a line is to stand out, where there are colours."""

    PLAIN = ""
    TITLE = "title"
    GOOD = "good"
    BAD = "bad"


class Line(NamedTuple):
    """One line of the screen."""

    text: str
    style: Style = Style.PLAIN


def frame(now: Status, before: Status | None, seconds: float, size: tuple[int, int]) -> list[Line]:
    """Return one picture that fits in `size`, columns and lines, the most important first.

    Rates are what came in the `seconds` between `before` and `now`; without `before` there are none
    yet.
    """
    width, height = size
    earlier, span = before or now, seconds if before else 0.0
    apart = [Line("")] if height >= _ROOMY else []
    upper = [*_head(now), *apart, *_rates(now, earlier, span), *_workers(now, earlier, span)]
    upper += [*_budget(now, earlier, span), *_pressure(now)]
    room = height - len(upper) - len(apart) - 2  # titles
    nearest = now["nearest"][: min(_MOST_NEAREST, max(_FEWEST_NEAREST, room // 2))]
    events = now["recent"][::-1][: max(_FEWEST_EVENTS, room - max(len(nearest), 1))]
    lines = [*upper, *apart, *_nearest(nearest, width), *_events(events)]
    return [Line(_cut(plain(text), width), style) for text, style in lines[:height]]


def outdated(lines: list[Line], sentence: str, seconds: float, width: int) -> list[Line]:
    """Return the lines of a picture that is no longer of now, under one that says so and why."""
    said = f"NO ANSWER for {_lasting(seconds)}, what follows is older: {sentence}"
    return [Line(_cut(plain(said), width), Style.BAD), *(Line(text) for text, _ in lines)]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"[:width]


def _head(now: Status) -> Iterator[Line]:
    policy, filters = now["policy"], now["filtering"]
    state = now["state"] if filters else now["state"].upper()
    state = "PANIC: all traffic passes" if now["panic"] else state
    named = f"policy {policy['name']} ({policy['mode']})"
    style = Style.GOOD if filters else Style.BAD
    yield Line(f"rstguard: {state}, {named}, up {_lasting(now['uptime_s'])}", style)
    if policy["confirm_s"] is not None:
        left = f"rolls back in {policy['confirm_s']:.0f} s; `rstguard policy confirm`"
        yield Line(f"NOT CONFIRMED: {left}", Style.BAD)
    problems = now["problems"][now["panic"] :]  # panic is told above
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
    for problem in problems:
        yield Line(problem, Style.BAD)
    blocked, productive = now["blocked"], now["productive"]
    sources = "source" if productive == 1 else "sources"
    yield Line(
        f"{blocked['ban']:,} banned, {blocked['shun']:,} shunned, {productive:,} productive "
        f"{sources}, {now['counts'].get('flows', 0):,} connections at the last sweep"
    )


def _lasting(seconds: float) -> str:
    """Return a time in its two largest units, such as 3 d 4 h."""
    whole = int(seconds)
    days, hours, minutes = whole // _DAY, whole % _DAY // _HOUR, whole % _HOUR // _MINUTE
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % _MINUTE} s" if minutes else f"{whole} s"


def _rate(now: int, before: int, seconds: float) -> str:
    """Return a rate; nothing goes back but what a guard that was started anew counts."""
    return f"{max(0, now - before) / seconds:,.0f}/s" if seconds else "-"


def _rates(now: Status, before: Status, seconds: float) -> Iterator[Line]:
    def rate(name: str) -> str:
        return _rate(_count(now, name), _count(before, name), seconds)

    yield Line(
        f"packets {rate('packets')}   dropped {rate('verdict.drop')}   resets {rate('reset')}   "
        f"bans {rate('ban')}   shuns {rate('shun')}"
    )


def _count(status: Status, name: str) -> int:
    found = status["counts"].get(name, 0)
    return sum(found.values()) if isinstance(found, dict) else int(found)


def _workers(now: Status, before: Status, seconds: float) -> Iterator[Line]:
    """Tell of the workers, those that are hardest pressed first."""
    packets = {row["queue"]: row["packets"] for row in before["workers"]}
    pressed = sorted(now["workers"], key=lambda row: (-row["overload"], -(row["waiting"] or 0)))
    shown = pressed if len(pressed) <= _MOST_WORKERS else pressed[: _MOST_WORKERS - 1]
    for row in shown:
        rate = _rate(row["packets"], packets.get(row["queue"], 0), seconds)
        lost = f"{_known(row['waiting'])} waiting, {_known(row['overrun'])} lost"
        text = f"worker {row['pid']}: {rate}, {lost}, {row['restarts']} restarts"
        if not row["ready"]:
            yield Line(f"{text}, NOT READY", Style.BAD)
        elif row["overload"]:
            yield Line(f"{text}, OVERLOAD: {row['shed']}", Style.BAD)
        else:
            yield Line(text)
    if rest := pressed[len(shown) :]:
        yield Line(f"and {len(rest)} workers that are less pressed")


def _known(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _budget(now: Status, before: Status, seconds: float) -> Iterator[Line]:
    budget = now["syn_budget"]
    if budget is None:
        yield Line("no SYN budget")
        return
    earlier = (before["syn_budget"] or budget)["cookies"]
    sent, back = (
        _rate(budget["cookies"][key], earlier[key], seconds) for key in ("sent", "accepted")
    )
    yield Line(f"SYN budget {budget['limit']} a service: {sent} cookies, {back} came back")
    over = [row for row in budget["services"] if row["engaged_s"] is not None]
    for row in over[:_MOST_SERVICES]:
        text = f"  {row['service']}: SYN cookies for {_lasting(row['engaged_s'])}"
        yield Line(text + waiting(row), Style.TITLE)
    if rest := over[_MOST_SERVICES:]:
        yield Line(f"  and {len(rest)} more over it")
    elif not over:
        known = f"  services known: {len(budget['services'])}, none over it"
        counted = [row for row in budget["services"] if row["half_open"]]
        most = max(counted, key=lambda row: row["half_open"]["open"], default=None)
        yield Line(f"{known}; {most['service']}{waiting(most)}" if most else known)


def _pressure(now: Status) -> Iterator[Line]:
    """Tell of services in distress."""
    pressed = fullest(now["pressure"])
    for row in pressed[:_MOST_SERVICES]:
        held = f"{row['connections']:,} connections, no patience from {row['end']:,} on"
        yield Line(f"PRESSED {row['service']} for {_lasting(row['pressed_s'])}: {held}", Style.BAD)
    if rest := pressed[_MOST_SERVICES:]:
        yield Line(f"and {len(rest)} more services that are pressed", Style.BAD)


def _nearest(rows: list[Status], width: int) -> Iterator[Line]:
    yield Line("Nearest their limits", Style.TITLE)
    longest = max((len(row["source"]) for row in rows), default=0)
    for row in rows:
        share = f"{row['used_percent']:.0f}%"
        text = f"{share:>5}  {row['source']:<{longest}}  {row['rule']}"
        yield Line(_cut(text, width), Style.BAD if row["used_percent"] >= 100 else Style.PLAIN)
    if not rows:
        yield Line("   nobody has used any of them now")


def _events(events: Iterable[Status]) -> Iterator[Line]:
    yield Line("Latest", Style.TITLE)
    nothing = True
    for event in events:
        nothing = False
        yield Line(event_line(event)[11:])
    if nothing:
        yield Line("   nothing has happened yet")
