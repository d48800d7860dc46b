"""The file itself: made, opened, checked, and set aside if it is damaged."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Final

BUSY_SECONDS: Final = 2.0
"""How long a thread waits for a file that another process has locked."""
_VERSION: Final = 1
_LAST_NUMBER: Final = 1 << 53

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS blocks (
  source TEXT NOT NULL, kind TEXT NOT NULL, rule TEXT NOT NULL, expires REAL NOT NULL,
  keep_existing INTEGER NOT NULL, PRIMARY KEY (source, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS offences (
  rule TEXT NOT NULL, source TEXT NOT NULL, count INTEGER NOT NULL, last REAL NOT NULL,
  PRIMARY KEY (rule, source)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS policies (
  number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, who TEXT NOT NULL,
  action TEXT NOT NULL, name TEXT NOT NULL, file TEXT NOT NULL, text TEXT NOT NULL,
  state TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS large_sources (
  source TEXT PRIMARY KEY, share INTEGER NOT NULL, connections INTEGER NOT NULL,
  bore INTEGER NOT NULL, since REAL NOT NULL, seen REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS written (id INTEGER PRIMARY KEY CHECK (id = 1), time REAL NOT NULL);
"""
_TABLES: Final = {
    "blocks": ["source", "kind", "rule", "expires", "keep_existing"],
    "offences": ["rule", "source", "count", "last"],
    "policies": ["number", "time", "who", "action", "name", "file", "text", "state"],
    "large_sources": ["source", "share", "connections", "bore", "since", "seen"],
    "written": ["id", "time"],
}


def open_or_set_aside(path: Path, now: float) -> tuple[sqlite3.Connection, Path | None]:
    """Open or make the file; one that is damaged is moved away, and where to is returned as well.

    Raises:
        OSError, sqlite3.Error: it cannot be made, read or written, or is locked.
    """
    try:
        return _open(path), None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            raise
        aside = _set_aside(path, now)
        return _open(path), aside


def last_number(database: sqlite3.Connection) -> int:
    """Return the highest number that a policy of the history has had; 0 if there was none."""
    (found,) = database.execute(
        "SELECT max((SELECT coalesce(max(number), 0) FROM policies),"
        " coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'policies'), 0))"
    ).fetchone()
    if not isinstance(found, int) or not 0 <= found < _LAST_NUMBER:
        raise sqlite3.DatabaseError("its history has no sensible numbers")
    return found


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    database.text_factory = lambda text: text.decode(errors="replace")
    try:
        path.chmod(0o640)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if said != "ok" or version not in (0, _VERSION):
            raise sqlite3.DatabaseError(said if said != "ok" else f"it is of version {version}")
        database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        for table, columns in _TABLES.items():
            found = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            if found != columns:
                raise sqlite3.DatabaseError(f"its table {table} is another one's")
        last_number(database)
    except BaseException:
        database.close()
        raise
    return database


def _is_damage(error: sqlite3.OperationalError) -> bool:
    """Tell a file that is none of SQLite's from a full disk, a lock or a missing permission."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # Python's own have none
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _set_aside(path: Path, now: float) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    path.replace(aside)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    return aside
