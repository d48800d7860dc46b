"""What a benchmark tells: named figures with a goal each, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: the median of several rounds with the lowest and the highest.

    `goal` is a text, "" if there is none; then `met` is None.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    rounds: int
    goal: str = ""
    met: bool | None = None
    note: str = ""


Benchmark = Callable[[], Iterator[Figure]]


def at_most(limit: float, name: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """Return a figure that is better the lower it is; its median must not exceed `limit`."""
    figure = seen(name, values, unit, note)
    return _with_goal(figure, f"<= {_number(limit)}", figure.value <= limit)


def at_least(limit: float, name: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """Return a figure that is better the higher it is; its median must reach `limit`."""
    figure = seen(name, values, unit, note)
    return _with_goal(figure, f">= {_number(limit)}", figure.value >= limit)


def seen(name: str, values: Sequence[float], unit: str, note: str = "") -> Figure:
    """Return a figure without a goal."""
    return Figure(name, median(values), min(values), max(values), unit, len(values), note=note)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return the ratio of each round: both of a pair were measured right after each other."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def table(figures: Sequence[Figure]) -> Group:
    """Return the figures as a table for a terminal, their notes below it."""
    found = Table(box=SIMPLE_HEAD)
    for title in ("figure", "median", "lowest", "highest", "", "rounds", "goal", "met", ""):
        numeric = title in ("median", "lowest", "highest", "rounds")
        found.add_column(title, justify="right" if numeric else "left", overflow="fold")
    notes: list[str] = []
    for one in figures:
        met = {None: "", True: "[green]yes", False: "[red]NO"}[one.met]
        if one.note and one.note not in notes:
            notes.append(one.note)
        mark = str(notes.index(one.note) + 1) if one.note else ""
        numbers = [_number(number) for number in (one.value, one.low, one.high)]
        found.add_row(one.name, *numbers, one.unit, str(one.rounds), one.goal, met, mark)
    return Group(found, *(f"  {number}  {note}" for number, note in enumerate(notes, 1)))


def as_data(figures: Sequence[Figure]) -> list[dict[str, object]]:
    """Return the figures as plain values for JSON."""
    return [asdict(figure) for figure in figures]


def _with_goal(figure: Figure, goal: str, met: bool) -> Figure:
    return Figure(**{**asdict(figure), "goal": goal, "met": met})


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
