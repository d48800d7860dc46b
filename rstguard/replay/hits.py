"""What a replayed policy did: one record for each source or connection that a rule hit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.verdict import Reason

KINDS = ("ban", "shun", "reset", "refuse", "drop", "observe")
"""What can happen, the most severe first.

A source is banned, shunned, refused (its SYNs are answered with a RST), or has packets dropped; a
connection is reset; a rule that only observes notes a source.
"""

MOST = 100_000
"""Records that are kept one by one; what comes later is only counted."""

_EACH = frozenset({"ban", "shun", "reset"})
"""What is told each time, and not only the first."""

Subject = Prefix | Tuple
Key = tuple[str, Subject, str]
"""Kind, source or connection, and rule."""


@dataclass(slots=True)
class Hit:
    """One source or connection that a rule hit, by one kind of action.

    `first` and `last` are times of the replay (nanoseconds), `times` how often.  `packets`
    and `connections` would not have arrived, or would have ended, because of it.  `productive`
    counts connections that the source had brought to a good end before.
    """

    kind: str
    subject: Subject
    rule: str
    reason: Reason
    first: int
    last: int
    times: int = 0
    packets: int = 0
    connections: int = 0
    productive: int = 0
    seconds: int = 0
    """How long a ban or shun lasts, from the last time on."""

    @property
    def key(self) -> Key:
        """What makes it the same hit."""
        return self.kind, self.subject, self.rule


@dataclass(slots=True)
class Total:
    """What one rule did altogether."""

    rule: str
    times: dict[str, int] = field(default_factory=dict)
    subjects: dict[str, int] = field(default_factory=dict)
    """Different sources or connections, by kind, of those whose records are kept."""
    packets: int = 0
    connections: int = 0


Tell = Callable[[Hit, int], None]
"""Is given a hit each time something is done, and the time of it."""


class Hits:
    """All that was done, bounded; totals by rule are always whole.

    `tell` may be set: it is told of each ban, shun and reset, and of the first hit of any other
    kind.  At most `most` records are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self.totals: dict[str, Total] = {}
        self.left_out = 0
        self._kept: dict[Key, Hit] = {}
        self.tell: Tell | None = None
        self._most = most

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, kind: str, subject: Subject, rule: str, reason: Reason, now: int) -> Hit:
        """Note that something is done at `now`; return its record."""
        total = self.totals.get(rule)
        if total is None:
            total = self.totals[rule] = Total(rule)
        total.times[kind] = total.times.get(kind, 0) + 1
        key = (kind, subject, rule)
        hit = self._kept.get(key)
        if hit is None:
            if len(self._kept) >= self._most:
                return self._beyond(Hit(kind, subject, rule, reason, now, now, 1), now)
            hit = self._kept[key] = Hit(kind, subject, rule, reason, now, now)
            total.subjects[kind] = total.subjects.get(kind, 0) + 1
        hit.times += 1
        hit.last = now
        if self.tell is not None and (hit.times == 1 or kind in _EACH):
            self.tell(hit, now)
        return hit

    def _beyond(self, hit: Hit, now: int) -> Hit:
        self.left_out += 1
        if self.tell is not None and hit.kind in _EACH:
            self.tell(hit, now)
        return hit

    def lost(self, hit: Hit, packets: int = 0, connections: int = 0) -> None:
        """Note that packets would not have arrived, or connections not been, because of a hit."""
        hit.packets += packets
        hit.connections += connections
        total = self.totals[hit.rule]
        total.packets += packets
        total.connections += connections
