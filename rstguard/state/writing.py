"""Changes written to the file, in the order and with the effect in which they were noted."""

from __future__ import annotations

import sqlite3
from typing import Final

from rstguard.state.history import MOST_POLICIES, UNDONE, Entry, Marked, Step, Undone
from rstguard.state.rows import there
from rstguard.state.waiting import MOST_OFFENCES, Changes

_MOST_BLOCKS: Final = 1 << 21
"""Bans and shuns kept: as many as the kernel's sets of both families hold."""
_BOUNDS: Final = (
    ("blocks", "expires", _MOST_BLOCKS),
    ("offences", "last", MOST_OFFENCES),
    ("policies", "number", MOST_POLICIES),
)
"""Table, the column by which the oldest are found, and how many rows stay."""
_COLUMNS: Final = 5
_REPLACE: Final = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)"
_PROLONG: Final = (
    "INSERT INTO blocks VALUES (?, ?, ?, ?, ?) ON CONFLICT (source, kind) DO UPDATE SET"
    " rule = excluded.rule, expires = excluded.expires, keep_existing = excluded.keep_existing"
    " WHERE excluded.expires > blocks.expires"
)
"""Of two bans of one source the longer stays, as the kernel's sets have it."""


def write(database: sqlite3.Connection, changes: Changes, shifted: float, now: float) -> None:
    """Write changes; the file's times were shifted by `shifted` seconds before, and it is `now`.

    Raises:
        sqlite3.Error: the file could not be written.
    """
    shift, further = changes.shift, changes.shift - shifted
    if further:
        database.execute("UPDATE blocks SET expires = expires + ?", (further,))
        database.execute("UPDATE offences SET last = last + ?", (further,))
        moved = "UPDATE large_sources SET since = since + ?, seen = seen + ?"
        database.execute(moved, (further, further))
    gone = (key for key, row in changes.blocks.items() if row is None)
    database.executemany("DELETE FROM blocks WHERE source = ? AND kind = ?", gone)
    for row in there(changes):
        values = row._replace(expires=row.expires + shift)[:_COLUMNS]
        database.execute(_REPLACE if row.replaces else _PROLONG, values)
    offences = (row._replace(last=row.last + shift) for row in changes.offences.values())
    database.executemany("INSERT OR REPLACE INTO offences VALUES (?, ?, ?, ?)", offences)
    if changes.large is not None:
        large = (r._replace(since=r.since + shift, seen=r.seen + shift) for r in changes.large)
        database.execute("DELETE FROM large_sources")
        database.executemany("INSERT INTO large_sources VALUES (?, ?, ?, ?, ?, ?)", large)
    for step in changes.history:
        _write_step(database, step)
    database.execute("INSERT OR REPLACE INTO written VALUES (1, ?)", (now,))


def tidy_up(database: sqlite3.Connection, now: float) -> None:
    """Forget expired bans, and the oldest of what would grow without end.

    Raises:
        sqlite3.Error: the file could not be written.
    """
    database.execute("DELETE FROM blocks WHERE expires <= ?", (now,))
    for table, key, most in _BOUNDS:
        oldest = f"SELECT {key} FROM {table} ORDER BY {key} DESC LIMIT 1 OFFSET ?"  # noqa: S608
        database.execute(f"DELETE FROM {table} WHERE {key} <= ({oldest})", (most,))  # noqa: S608


def _write_step(database: sqlite3.Connection, step: Step) -> None:
    match step:
        case Entry():
            marks = ", ".join("?" * len(step))
            database.execute(f"INSERT OR REPLACE INTO policies VALUES ({marks})", step)  # noqa: S608
        case Marked(number, state):
            database.execute("UPDATE policies SET state = ? WHERE number = ?", (state, number))
        case Undone(text):
            database.execute("UPDATE policies SET state = ? WHERE text = ?", (UNDONE, text))
