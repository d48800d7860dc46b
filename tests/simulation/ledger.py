"""What was told and what was promised: the ledger that the guard is held to."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rstguard.kernel.names import BLOCK_SETS
from rstguard.state.database import BUSY_SECONDS
from tests.simulation.world import Incarnation, World

_FOR = re.compile(r"for (\d+) s")
SLACK = 5.0
"""Seconds by which ends may differ: times are whole, and an answer comes 3 s late at most."""


@dataclass(slots=True)
class Promise:
    """A ban or shun that was told."""

    until: float
    rule: str
    told: float
    late: float = 0.0
    """By so many seconds at most it was told late."""
    fragile: bool = False
    """It was told in the moment before its supervisor was killed, and is not on the disk."""


class Ledger:
    """Bans and policies, as the events and answers say."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.bans: dict[tuple[str, str], Promise] = {}
        self.doubts: Counter[tuple[str, str]] = Counter()
        """What may be in force or not: requests for it that have no answer, or it is freed."""
        self.policy = ""
        """The name of the policy in force, as it was told last."""
        self.capped = 0
        self.changed: dict[str, tuple[str, float]] = {}
        """The state of each process, as told last, and when."""
        self.untold: set[str] = set()
        """Sources that a process may have blocked before it died in the middle of a turn."""
        self.pending: tuple[str, float] | None = None
        self.kinds: dict[str, int] = {}
        self.clock_until = 0.0
        """Until then it may not be on the disk yet that somebody has set the clock."""
        world.on_event.append(self._heard)
        world.on_end.append(self._killed)
        world.on_loss.append(self.excuse_fragile)

    def _heard(self, event: dict[str, Any]) -> None:
        now, kind, subject = self._world.loop.time(), event["kind"], event["subject"]
        detail = event["detail"]
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if kind in ("ban", "shun") and event["enforced"]:
            found = _FOR.search(detail)
            assert found
            # Who was stopped himself hears late of what was done.
            late = self._world.late if now < self._world.late_until else 0.0
            self.promise(subject, kind, now + int(found[1]) - late, event["rule"], late)
        elif kind == "unban":
            self._lifted(subject)
        elif (kind == "policy" and not detail.startswith("confirmed")) or kind == "start":
            self.policy = subject
        elif kind in ("capped", "rearmed"):
            self._has_capped(kind == "capped", subject)
        elif kind == "gated":
            self._gated(event)
        elif kind in ("process", "restart"):
            self.changed[subject] = (detail.split(":")[0], now)

    def promise(self, source: str, kind: str, until: float, rule: str, late: float = 0.0) -> None:
        """Somebody was told that a source is blocked until then; the longest counts."""
        before = self.bans.get((source, kind))
        now = self._world.loop.time()
        if before is not None and before.until > until and rule != "manual":
            return
        self.bans[source, kind] = Promise(until, rule, now, late)

    def _lifted(self, subject: str) -> None:
        for kind in ("ban", "shun"):
            self.bans.pop((subject, kind), None)

    def _has_capped(self, capped: bool, rule: str) -> None:
        self.capped += 1
        one = self._world.current
        if one is not None and (rule in one.guard.ruleset.capped) is not capped:
            self._world.broken(f"what is announced of rule {rule} is not true: capped {capped}")

    def _gated(self, event: dict[str, Any]) -> None:
        found = _FOR.search(event["detail"])
        assert found
        until = self._world.loop.time() + int(found[1])
        self.promise(event["subject"], "shun", until, event["rule"])

    def _killed(self, one: Incarnation) -> None:
        """What was told but is not on the disk lives in the sets alone from now on."""
        self.changed.clear()
        kept = self.on_disk()
        now, wall = self._world.loop.time(), self._world.wall()
        for key, promise in self.bans.items():
            left = kept.get(key, wall) - wall
            promise.fragile = left < promise.until - now - SLACK or promise.told > now - 1.5
        if now < self.clock_until:
            self.doubts.update(self.bans.keys())
        # What was lifted while nothing could be written comes back.
        self.doubts.update(kept.keys() - self.bans.keys())

    def on_disk(self) -> dict[tuple[str, str], float]:
        """Return what the file holds: source and kind, and when it ends (seconds since 1970)."""
        path = self._world.state_directory / "state.db"
        if not path.is_file():
            return {}
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        try:
            rows = database.execute("SELECT source, kind, expires FROM blocks").fetchall()
        except sqlite3.Error:
            return {}
        finally:
            database.close()
        return {(str(source), str(kind)): float(expires) for source, kind, expires in rows}

    def note_untold(self) -> None:
        """A process dies: it may have blocked somebody, and not have been heard any more."""
        told = {source for source, _ in self.bans}
        for name in BLOCK_SETS:
            if name in self._world.kernel.ipsets.names:
                held = self._world.kernel.ipsets.get(name).members
                self.untold |= {str(source) for source in held} - told

    def excuse_fragile(self) -> None:
        """Another program took what nobody else knew."""
        for key, promise in list(self.bans.items()):
            if promise.fragile:
                del self.bans[key]
                self.doubts[key] += 1

    def due(self, now: float) -> dict[tuple[str, str], Promise]:
        """Return the promises that must be kept for some seconds yet."""
        return {
            key: promise
            for key, promise in self.bans.items()
            if promise.until > now + SLACK and not self.doubts[key]
        }
