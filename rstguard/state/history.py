"""The policies that were in force: what was done with them, and what there is to go back to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, NamedTuple

MOST_POLICIES: Final = 200
"""Policies kept in the history."""
PENDING, KEPT, UNDONE = "pending", "kept", "undone"


class Entry(NamedTuple):
    """One policy of the history.

    `action` is start, apply, rollback, confirm or "not confirmed"; `state` is pending (it waits
    for its confirmation), kept or undone (it was gone back from).
    """

    number: int
    time: float
    who: str
    action: str
    name: str
    file: str
    text: str
    state: str


class Marked(NamedTuple):
    """The policy of this number is now in this state."""

    number: int
    state: str


class Undone(NamedTuple):
    """Every policy of this text was gone back from."""

    text: str


Step = Entry | Marked | Undone
"""What may happen to the history: a policy more, or another state of those that are there."""


def entry_of(number: int, when: float, *texts: str) -> Entry:
    """Return the entry of a row that was read.

    Raises:
        ValueError, TypeError, OverflowError: the guard never wrote such a row.
    """
    entry = Entry(number, float(when), *texts)
    time.localtime(entry.time)  # what no calendar holds was not written by the guard
    if entry.state not in (PENDING, KEPT, UNDONE) or not all(isinstance(t, str) for t in texts):
        raise ValueError(entry.state)
    return entry


def after(entries: Iterable[Entry], steps: Iterable[Step]) -> list[Entry]:
    """Return a history as it is after some steps more, newest first."""
    found = {entry.number: entry for entry in entries}
    for step in steps:
        match step:
            case Entry():
                found[step.number] = step
            case Marked(number, state):
                if number in found:
                    found[number] = found[number]._replace(state=state)
            case Undone(text):
                for entry in [entry for entry in found.values() if entry.text == text]:
                    found[entry.number] = entry._replace(state=UNDONE)
    return [found[number] for number in sorted(found, reverse=True)]


def before(history: Iterable[Entry], text: str) -> Entry | None:
    """Return the newest policy that was kept and is not the one of this text, or None."""
    return next((e for e in history if e.state == KEPT and e.text != text), None)


def gone_back_from(history: Iterable[Entry], text: str) -> bool:
    """Tell whether the last that was done with this text was to go back from it."""
    last = next((entry for entry in history if entry.text == text), None)
    return last is not None and last.state in (PENDING, UNDONE)
