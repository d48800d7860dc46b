"""What waits to be written: noted at once by whoever decides, written later by another thread.

Whoever notes a change waits for nothing but another note.  Of several changes of the same thing
only the last waits, so that a file which cannot be written for a while costs no more memory than
there are sources; each table is bounded, and what fell out is counted.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from rstguard.engine.large import LargeSource
from rstguard.engine.ruleset import SECOND
from rstguard.kernel.elements import Element
from rstguard.state.history import MOST_POLICIES, Step

MOST_BLOCKS: Final = 1 << 18
"""Bans and shuns that may wait; of more, those that waited longest are dropped."""
MOST_OFFENCES: Final = 65_536
"""Offences kept, as many as the engine remembers; the latest stay."""

_Key = TypeVar("_Key", bound=Hashable)
_Row = TypeVar("_Row")


class Block(NamedTuple):
    """One row of the blocks; `expires` is in seconds since 1970, before any shift."""

    source: str
    kind: str
    rule: str
    expires: float
    keep_existing: int
    replaces: bool = False
    """Whether it takes the place of one that lasts longer, which otherwise stays, as in a set."""


class Offended(NamedTuple):
    """One row of the offences; `last` is in seconds since 1970, before any shift."""

    rule: str
    source: str
    times: int
    last: float


class LargeRow(NamedTuple):
    """One row of the large sources; `since` and `seen` in seconds since 1970, before any shift."""

    source: str
    share: int
    connections: int
    bore: int
    since: float
    seen: float


@dataclass(slots=True)
class Changes:
    """Changes that belong into the file together."""

    blocks: OrderedDict[tuple[str, str], Block | None] = field(default_factory=OrderedDict)
    """By source and kind; None: there is none any more."""
    offences: OrderedDict[tuple[str, str], Offended] = field(default_factory=OrderedDict)
    large: tuple[LargeRow, ...] | None = None
    """All that are large, where that is new."""
    history: list[Step] = field(default_factory=list)
    shift: float = 0.0
    """Seconds by which the clock was set forward since the guard began, all taken together."""
    dropped: int = 0
    """Changes that had to make room for later ones."""

    def block(self, key: tuple[str, str], row: Block | None) -> None:
        """Add a ban or shun, or its end; of two the longer one stays, unless the later replaces."""
        if row is not None and key in self.blocks:
            before = self.blocks[key]
            if before is None:
                row = row._replace(replaces=True)
            elif not row.replaces:
                longer = row if row.expires >= before.expires else before
                row = longer._replace(replaces=before.replaces)
        self._put(self.blocks, key, row, MOST_BLOCKS)

    def offence(self, row: Offended) -> None:
        """Add an offence."""
        self._put(self.offences, (row.rule, row.source), row, MOST_OFFENCES)

    def step(self, step: Step) -> None:
        """Add a step of the policies' history."""
        self.history.append(step)
        if len(self.history) > MOST_POLICIES:
            del self.history[0]
            self.dropped += 1

    def _put(self, table: OrderedDict[_Key, _Row], key: _Key, row: _Row, most: int) -> None:
        table[key] = row
        table.move_to_end(key)
        if len(table) > most:
            table.popitem(last=False)
            self.dropped += 1

    def follow(self, later: Changes) -> None:
        """Take up changes that were made after these."""
        for key, row in later.blocks.items():
            self.block(key, row)
        for offence in later.offences.values():
            self.offence(offence)
        if later.large is not None:
            self.large = later.large
        for step in later.history:
            self.step(step)
        self.shift = later.shift
        self.dropped += later.dropped

    def __len__(self) -> int:
        large = self.large is not None
        return len(self.blocks) + len(self.offences) + large + len(self.history)


class Waiting:
    """Collects changes.  Every method may be called from any thread, and none waits for a disk."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Stamp what is noted by `clock`, in seconds since 1970."""
        self._clock = clock
        self._lock = threading.Lock()
        """Held for a few dictionary operations at a time, never while anything is written."""
        self._changes = Changes()

    def blocked(self, element: Element, replaces: bool = False) -> None:
        """Note a ban or shun.

        What lasts longer already stays, as in the kernel's sets; with `replaces` it does not, and
        neither does another kind of block of the same source.
        """
        with self._lock:
            source, kind = str(element.source), element.kind
            expires = self._now() + (element.remaining or 0)
            row = Block(source, kind, element.rule, expires, int(element.keep_existing), replaces)
            self._changes.block((source, kind), row)
            if replaces:
                self._changes.block((source, "shun" if kind == "ban" else "ban"), None)

    def unblocked(self, source: str) -> None:
        """Note that exactly this source is neither banned nor shunned any more."""
        with self._lock:
            self._changes.block((source, "ban"), None)
            self._changes.block((source, "shun"), None)

    def offended(self, rule: str, source: str, count: int) -> None:
        """Note how often a source was banned by a rule that escalates."""
        with self._lock:
            self._changes.offence(Offended(rule, source, count, self._now()))

    def large(self, sources: Iterable[LargeSource]) -> None:
        """Note which sources are large, all of them."""
        with self._lock:
            now = self._now()
            self._changes.large = tuple(
                LargeRow(
                    str(one.source),
                    one.share,
                    one.connections,
                    one.bore,
                    now - one.age / SECOND,
                    now - one.quiet / SECOND,
                )
                for one in sources
            )

    def shift(self, seconds: float) -> None:
        """Note that the clock was set forward by so much, or back: all times move along with it."""
        with self._lock:
            self._changes.shift += seconds

    def take(self) -> Changes:
        """Return what was noted since the last time."""
        with self._lock:
            taken = self._changes
            self._changes = Changes(shift=taken.shift)
            return taken

    def _now(self) -> float:
        # Times are kept as if the clock had never been set, and are shifted when they are written:
        # one number then moves them all.
        return self._clock() - self._changes.shift
