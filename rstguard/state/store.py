"""What outlives the guard: bans, offences, large sources and the policies in force, in SQLite.

Changes are noted in `rstguard.state.waiting` and written together, by `flush`, in one transaction
of the write-ahead log: a process that is killed loses what came after the last one, and never the
file (https://www.sqlite.org/wal.html).  Times are seconds since 1970: they must outlive a reboot.
As that clock may be set meanwhile, a shift moves them along with it.

Every method of `Store` may wait for the disk, and up to `BUSY_SECONDS` for each one that another
process, or another thread, makes it wait: call them off the event loop, by `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

from rstguard.engine.large import MOST, LargeSource
from rstguard.engine.sources import Offence
from rstguard.kernel.elements import Element
from rstguard.state.database import last_number, open_or_set_aside
from rstguard.state.history import (
    KEPT,
    Entry,
    Marked,
    Undone,
    after,
    entry_of,
)
from rstguard.state.rows import KINDS, element_of, large_of, lasts_longer, offence_of
from rstguard.state.waiting import Block, Changes, LargeRow, Offended, Waiting
from rstguard.state.writing import tidy_up, write

FILE_NAME: Final = "state.db"
_T = TypeVar("_T")


class StoreError(Exception):
    """The file cannot be used; the text is one sentence for the user."""


class Store:
    """The guard's memory on disk.  Every method may be called from any thread, and may wait."""

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.time,
        waiting: Waiting | None = None,
    ) -> None:
        """Open or make the file in a directory; one that is damaged is set aside.

        `waiting` is where changes are noted that `flush` is to write.

        Raises:
            StoreError: the directory or file cannot be made or written.
        """
        self.path = directory / FILE_NAME
        self.unreadable = 0
        """Rows that were left out, as they hold what the guard never wrote."""
        self.waiting = waiting or Waiting(clock)
        self._clock = clock
        self._lock = threading.Lock()
        """Held by whoever uses the database, or what follows here."""
        self._unwritten = Changes()
        self._shifted = 0.0
        """How much of the shift has reached the file."""
        try:
            directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            # Where a damaged file was moved to, if there was one, is for whoever opens the store.
            self._database, self.set_aside = open_or_set_aside(self.path, clock())
            self._number = last_number(self._database)
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
            self._shifted = self._collected().shift + last - self._clock()
            with contextlib.suppress(StoreError):  # the next flush tries again, and says why
                self.flush()

    def close(self) -> None:
        """Write what waits, and close the file.

        Raises:
            StoreError: it could not be written, and is lost; the file is closed all the same.
        """
        try:
            self.flush()
        finally:
            with self._lock:
                self._database.close()

    def flush(self, tidy: bool = False) -> int:
        """Write what waits; it goes on waiting if that fails.

        With `tidy`, forget expired bans, and the oldest of what would grow without end.

        Returns:
            How many changes had been dropped, as too many waited.

        Raises:
            StoreError: the file could not be written.
        """
        with self._lock:
            changes = self._collected()
            if not changes and not tidy and changes.shift == self._shifted:
                return 0
            try:
                with self._database as database:
                    write(database, changes, self._shifted, self._clock())
                    if tidy:
                        tidy_up(database, self._clock())
            except sqlite3.Error as error:
                lost = f", and {changes.dropped} were too many to wait" if changes.dropped else ""
                raise StoreError(
                    f"{self.path} could not be written ({error}): {len(changes)} changes wait, and "
                    f"would not survive a restart{lost}"
                ) from None
            self._unwritten, self._shifted = Changes(shift=changes.shift), changes.shift
            return changes.dropped

    def _collected(self) -> Changes:
        """Return all that is not written; to be called with the lock held."""
        self._unwritten.follow(self.waiting.take())
        return self._unwritten

    def blocks(self) -> list[Element]:
        """Return the bans and shuns whose time is not over, with what remains of it.

        What waits to be written counts.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            changes = self._collected()
            further, shift = changes.shift - self._shifted, changes.shift
            columns = "source, kind, rule, expires, keep_existing"
            read = self._rows(f"SELECT {columns} FROM blocks", Block)  # noqa: S608
            now = self._clock()
            rows = {row[:2]: (row, now - further) for row in read}
            for key, row in changes.blocks.items():
                if row is None:
                    rows.pop(key, None)
                elif row.replaces or not lasts_longer(rows.get(key), row, now - shift):
                    rows[key] = row, now - shift
            return self._made(rows.values(), element_of)

    def holds(self, source: str) -> bool:
        """Tell whether exactly this source is banned or shunned, as the file has it and what waits.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            changes = self._collected()
            keys = [(source, kind) for kind in KINDS if (source, kind) in changes.blocks]
            if keys:
                return any(changes.blocks[key] for key in keys)
            least = self._clock() - (changes.shift - self._shifted)
            statement = "SELECT count(*) FROM blocks WHERE source = ? AND expires > ?"
            return self._number_of(statement, source, least) > 0

    def count(self, seconds: float) -> int:
        """Return how many bans last for so many seconds at least, or fewer; shuns do not count.

        It is the file's number: what waits to be written is not counted, and what is to be
        forgotten is taken off, be it in the file or not.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            changes = self._collected()
            least = self._clock() + seconds - (changes.shift - self._shifted)
            gone = sum(
                kind == "ban" and (row is None or row.replaces)
                for (_, kind), row in changes.blocks.items()
            )
            statement = "SELECT count(*) FROM blocks WHERE kind = 'ban' AND expires > ?"
            found = self._number_of(statement, least)
        return max(0, found - gone)

    def offences(self) -> tuple[Offence, ...]:
        """Return who was banned how often by which rule, and how long ago (nanoseconds).

        What waits to be written counts.  The longest ago come first.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            changes = self._collected()
            further, shift = changes.shift - self._shifted, changes.shift
            columns = "rule, source, count, last"
            read = self._rows(f"SELECT {columns} FROM offences ORDER BY last", Offended)  # noqa: S608
            now = self._clock()
            rows = [(row, now - further) for row in read if row[:2] not in changes.offences]
            rows += [(row, now - shift) for row in changes.offences.values()]
            return tuple(self._made(rows, offence_of))

    def large(self) -> tuple[LargeSource, ...]:
        """Return the sources that were large, `MOST` at most, as old as they are now.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            changes = self._collected()
            back, rows = changes.shift, changes.large
            if rows is None:
                back -= self._shifted
                columns = "source, share, connections, bore, since, seen"
                statement = f"SELECT {columns} FROM large_sources ORDER BY bore DESC LIMIT {MOST}"  # noqa: S608
                rows = tuple(self._rows(statement, LargeRow))
            now = self._clock() - back
            return tuple(self._made(((row, now) for row in rows), large_of))

    def add_policy(
        self, who: str, action: str, name: str, file: str, text: str, state: str = KEPT
    ) -> int:
        """Add a policy to the history and return its number.

        It is written at once; while the file cannot be written, it waits as bans do.
        """
        with self._lock:
            self._number += 1
            number = self._number
            entry = Entry(number, self._clock(), who, action, name, file, text, state)
            self._unwritten.step(entry)
        self._write_now()
        return number

    def mark_policy(self, number: int, state: str) -> None:
        """Change what became of a policy of the history, as `add_policy` adds one."""
        with self._lock:
            self._unwritten.step(Marked(number, state))
        self._write_now()

    def undo_policy(self, text: str) -> None:
        """Note that every policy of this text was gone back from, as `add_policy` adds one."""
        with self._lock:
            self._unwritten.step(Undone(text))
        self._write_now()

    def policies(self) -> list[Entry]:
        """Return the history, newest first.

        Raises:
            StoreError: the file could not be read.
        """
        with self._lock:
            rows = self._rows("SELECT * FROM policies", lambda *row: row)
            return after(self._made(rows, entry_of), self._collected().history)

    def _write_now(self) -> None:
        with contextlib.suppress(StoreError):  # it waits; the next flush says why
            self.flush()

    def _number_of(self, statement: str, *values: object) -> int:
        try:
            (found,) = self._database.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} could not be read ({error})") from None
        return int(found)

    def _rows(self, statement: str, kind: Callable[..., _T]) -> list[_T]:
        try:
            return [kind(*row) for row in self._database.execute(statement)]
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} could not be read ({error})") from None

    def _made(self, rows: Iterable[Iterable[object]], make: Callable[..., _T | None]) -> list[_T]:
        """Return what `make` makes of each row; damage that SQLite does not notice is left out."""
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
