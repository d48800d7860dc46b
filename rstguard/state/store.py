"""What outlives the guard: bans, offences and the policies that were in force, in SQLite.

Changes are collected in memory and written together, by `flush`, in one transaction of the
write-ahead log: a process that is killed loses what came after the last one, and never the file
(https://www.sqlite.org/wal.html).  Times are seconds since 1970: they must outlive a reboot.  As
that clock may be set meanwhile, `shift` moves them along with it.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from rstguard.engine.address import parse_prefix
from rstguard.engine.sources import Offence
from rstguard.kernel.elements import MAX_SECONDS, Element, Kind

FILE_NAME: Final = "state.db"
MOST_OFFENCES: Final = 65_536
"""Offences kept, as many as the engine remembers; the latest stay."""
MOST_POLICIES: Final = 200
"""Policies kept in the history."""
_VERSION: Final = 1
_BUSY_SECONDS: Final = 2.0

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
CREATE TABLE IF NOT EXISTS written (id INTEGER PRIMARY KEY CHECK (id = 1), time REAL NOT NULL);
"""
_TABLES: Final = {
    "blocks": ["source", "kind", "rule", "expires", "keep_existing"],
    "offences": ["rule", "source", "count", "last"],
    "policies": ["number", "time", "who", "action", "name", "file", "text", "state"],
    "written": ["id", "time"],
}

_T = TypeVar("_T")
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


class StoreError(Exception):
    """The file cannot be used; the text is one sentence for the user."""


@dataclass(slots=True)
class _Change:
    """One statement that waits to be written."""

    statement: str
    values: tuple[object, ...]


class Store:
    """The guard's memory on disk.  Every method may be called from any thread."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        """Open or make the file in a directory; one that is damaged is set aside.

        Raises:
            StoreError: the directory or file cannot be made or written.
        """
        self.path = directory / FILE_NAME
        self.set_aside: Path | None = None
        """Where a damaged file was moved to, if there was one."""
        self.unreadable = 0
        """Rows that were left out, as they hold what the guard never wrote."""
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[_Change] = []
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            try:
                self._database = _open(self.path)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
                    raise
                self.set_aside = _set_aside(self.path, clock())
                self._database = _open(self.path)
            self._clock_was_set_back()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"nothing will be remembered over a restart: {self.path} cannot be used ({error}); "
                "name another directory with --state-dir"
            ) from None

    def _clock_was_set_back(self) -> None:
        """Shift all times if the last that was written lies in the future."""
        (last,) = self._database.execute("SELECT max(time) FROM written").fetchone()
        if isinstance(last, float) and math.isfinite(last) and last > self._clock():
            self.shift(self._clock() - last)
            with contextlib.suppress(StoreError):  # the next flush tries again, and says why
                self.flush()

    def close(self) -> None:
        """Write what waits, and close the file."""
        with contextlib.suppress(StoreError):
            self.flush()
        self._database.close()

    def blocked(self, element: Element) -> None:
        """Remember a ban or shun until its time is over."""
        expires = self._clock() + (element.remaining or 0)
        self._later(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?)",
            str(element.source),
            element.kind,
            element.rule,
            expires,
            int(element.keep_existing),
        )

    def unblocked(self, source: str) -> None:
        """Forget the bans and shuns of exactly this source."""
        self._later("DELETE FROM blocks WHERE source = ?", source)

    def offended(self, rule: str, source: str, count: int) -> None:
        """Remember how often a source was banned by a rule that escalates."""
        self._later(
            "INSERT OR REPLACE INTO offences VALUES (?, ?, ?, ?)",
            rule,
            source,
            count,
            self._clock(),
        )

    def shift(self, seconds: float) -> None:
        """Move the times of bans and offences, as the clock was set forward by so much, or back."""
        self._later("UPDATE blocks SET expires = expires + ?", seconds)
        self._later("UPDATE offences SET last = last + ?", seconds)

    def flush(self) -> None:
        """Write what waits; it goes on waiting if that fails.

        Raises:
            StoreError: the file could not be written.
        """
        with self._lock:
            if not self._waiting:
                return
            try:
                with self._database:
                    for change in self._waiting:
                        self._database.execute(change.statement, change.values)
                    self._database.execute(
                        "INSERT OR REPLACE INTO written VALUES (1, ?)", (self._clock(),)
                    )
            except sqlite3.Error as error:
                # What is bounded on disk is bounded here, too.
                del self._waiting[:-MOST_OFFENCES]
                raise StoreError(
                    f"{self.path} could not be written ({error}): bans and history of this moment "
                    "would not survive a restart"
                ) from None
            self._waiting.clear()

    def tidy(self) -> None:
        """Forget expired bans, and the oldest of what would grow without end.

        Raises:
            StoreError: the file could not be written.
        """
        self._later("DELETE FROM blocks WHERE expires <= ?", self._clock())
        for table, key, most in (
            ("offences", "last", MOST_OFFENCES),
            ("policies", "number", MOST_POLICIES),
        ):
            oldest = f"SELECT {key} FROM {table} ORDER BY {key} DESC LIMIT 1 OFFSET ?"  # noqa: S608
            self._later(f"DELETE FROM {table} WHERE {key} <= ({oldest})", most)  # noqa: S608
        self.flush()

    def blocks(self) -> list[Element]:
        """Return the bans and shuns whose time is not over, with what remains of it.

        Raises:
            StoreError: the file could not be read.
        """
        now = self._clock()

        def element(source: str, kind: str, rule: str, expires: float, keep: int) -> Element | None:
            seconds = min(int(expires - now), MAX_SECONDS)
            one = Element(parse_prefix(source), _kind(kind), rule, seconds, bool(keep))
            return one if one.comment and seconds >= 1 else None

        return self._rows("SELECT source, kind, rule, expires, keep_existing FROM blocks", element)

    def offences(self) -> tuple[Offence, ...]:
        """Return who was banned how often by which rule, and how long ago (nanoseconds).

        Raises:
            StoreError: the file could not be read.
        """
        now = self._clock()

        def offence(rule: str, source: str, count: int, last: float) -> Offence:
            age = max(0, int((now - last) * 1e9))
            return Offence(str(rule), parse_prefix(source), int(count), age)

        return tuple(
            self._rows("SELECT rule, source, count, last FROM offences ORDER BY last", offence)
        )

    def add_policy(
        self, who: str, action: str, name: str, file: str, text: str, state: str = KEPT
    ) -> int:
        """Write a policy into the history at once and return its number.

        Raises:
            StoreError: the file could not be written.
        """
        columns = "time, who, action, name, file, text, state"
        return self._write(
            f"INSERT INTO policies ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
            (self._clock(), who, action, name, file, text, state),
        )

    def mark_policy(self, number: int, state: str) -> None:
        """Change what became of a policy of the history.

        Raises:
            StoreError: the file could not be written.
        """
        self._write("UPDATE policies SET state = ? WHERE number = ?", (state, number))

    def undo_policy(self, text: str) -> None:
        """Note that every policy of this text was gone back from.

        Raises:
            StoreError: the file could not be written.
        """
        self._write("UPDATE policies SET state = ? WHERE text = ?", (UNDONE, text))

    def policies(self) -> list[Entry]:
        """Return the history, newest first.

        Raises:
            StoreError: the file could not be read.
        """
        return self._rows("SELECT * FROM policies ORDER BY number DESC", _entry)

    def _later(self, statement: str, *values: object) -> None:
        with self._lock:
            self._waiting.append(_Change(statement, values))

    def _write(self, statement: str, values: tuple[object, ...]) -> int:
        try:
            with self._lock, self._database:
                return self._database.execute(statement, values).lastrowid or 0
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} could not be written ({error})") from None

    def _rows(self, statement: str, make: Callable[..., _T | None]) -> list[_T]:
        """Return what `make` makes of each row; damage that SQLite does not notice is left out."""
        try:
            with self._lock:
                rows = self._database.execute(statement).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} could not be read ({error})") from None
        found, self.unreadable = [], 0
        for row in rows:
            try:
                one = make(*row)
            except (ValueError, TypeError, OverflowError, AttributeError):
                self.unreadable += 1
            else:
                if one is not None:
                    found.append(one)
        return found


def _kind(text: str) -> Kind:
    if text not in ("ban", "shun"):
        raise ValueError(text)
    return "ban" if text == "ban" else "shun"


def _entry(number: int, when: float, *texts: str) -> Entry:
    entry = Entry(number, float(when), *texts)
    time.localtime(entry.time)  # what no calendar holds was not written by the guard
    if entry.state not in (PENDING, KEPT, UNDONE) or not all(isinstance(t, str) for t in texts):
        raise ValueError(entry.state)
    return entry


def before(history: Iterable[Entry], text: str) -> Entry | None:
    """Return the newest policy that was kept and is not the one of this text, or None."""
    return next((e for e in history if e.state == KEPT and e.text != text), None)


def gone_back_from(history: Iterable[Entry], text: str) -> bool:
    """Tell whether the last that was done with this text was to go back from it."""
    last = next((entry for entry in history if entry.text == text), None)
    return last is not None and last.state in (PENDING, UNDONE)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
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
