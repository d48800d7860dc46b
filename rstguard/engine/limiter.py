"""Bounded memory of sources: token buckets, and counts of different targets.

Every table here has two generations.  Entries are written to the young one; what is found only in
the old one moves over when it is used.  When the young one is full, or old enough that nothing in
the old one can matter any more, the old one is dropped whole and the young one takes its place.  So
the eviction rule is: **an entry not used during the last `capacity` insertions may be forgotten**,
no scan is ever needed, and a table never holds more than twice its capacity.  Forgetting favours
the source: it starts afresh.

A token bucket is kept as one integer, the time at which it will be full again (the "theoretical
arrival time" of the generic cell rate algorithm, ITU-T I.371 annex A).  An entry whose time has
passed says nothing, so dropping it loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from heapq import nlargest
from operator import itemgetter
from typing import Generic, TypeVar

from rstguard.engine.nearest import largest

Value = TypeVar("Value")

CAPACITY = 1 << 16
"""Default entries per generation of what is counted."""
_AT_ONCE = 1 << 13
"""Keys that are looked at one by one in a step: a millisecond at most."""
REMEMBERED = 1 << 15
"""Default entries per generation of what is remembered: these hold objects, not just numbers."""


class Limiter:
    """Token buckets, one per key: `limit` events per `period`, at most `burst` at once.

    Args:
        limit: events per `period`, at least 1.
        period: nanoseconds, at least 1.
        burst: how many events a rested source may send at once, at least 1.
        capacity: keys per generation.
    """

    __slots__ = ("_capacity", "_cost", "_depth", "_kept", "_old", "_turn_at", "_young")

    def __init__(self, limit: int, period: int, burst: int, capacity: int = CAPACITY) -> None:
        self._cost = max(1, period // limit)
        self._depth = self._kept = self._cost * burst
        self._capacity = capacity
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._turn_at = 0

    def over(self, key: int, now: int) -> bool:
        """Count one event of `key` at `now` (nanoseconds); True if it is one too many.

        An event over the limit takes no token, so a source that slows down to the limit is let in
        again.
        """
        full_at = self._young.get(key)
        if full_at is None:
            full_at = self._old.get(key, 0)
            if len(self._young) >= self._capacity or now >= self._turn_at:
                self._old = self._young
                self._young = {}
                self._turn_at = now + self._kept
        if full_at < now:
            full_at = now
        after = full_at + self._cost
        if after - now > self._depth:
            self._young[key] = full_at
            return True
        self._young[key] = after
        return False

    def exhaust(self, key: int, until: int, now: int) -> None:
        """Leave `key` nothing saved up before `until`: from then on it has the plain rate only."""
        full_at = until + self._depth - self._cost
        self._young[key] = full_at
        self._kept = max(self._kept, full_at - now)

    def level(self, key: int, now: int) -> float:
        """Return how much of the burst `key` has used at `now`, from 0 to 1."""
        full_at = self._young.get(key) or self._old.get(key, 0)
        return min(max(0, full_at - now) / self._depth, 1.0)

    def nearest(self, most: int, now: int) -> Iterator[list[tuple[int, float]]]:
        """Yield keys that have used the most, with their levels: the `most` of each generation.

        Each step looks through one generation; whoever counts may go on between two.
        """
        for generation in (self._young, self._old):
            found = largest(generation, most)
            yield [(key, self.level(key, now)) for key, full_at in found if full_at > now]

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class Distinct:
    """Counts the different targets that each key tried lately.

    Args:
        limit: how many different targets are allowed, at least 0.
        within: a target counts for this long after it was last tried, in nanoseconds.
        capacity: targets per generation, all keys together.

    A key holds at most `limit` + 1 targets; the longest unused goes first.
    """

    __slots__ = ("_capacity", "_limit", "_old", "_stored", "_within", "_young")

    def __init__(self, limit: int, within: int, capacity: int = CAPACITY) -> None:
        self._limit = limit
        self._within = within
        self._capacity = capacity
        # Nearly every key of a forged flood tries one target once: a pair is smaller than a dict.
        self._young: dict[int, tuple[int, int] | dict[int, int]] = {}
        self._old: dict[int, tuple[int, int] | dict[int, int]] = {}
        self._stored = 0

    def over(self, key: int, target: int, now: int) -> bool:
        """Note that `key` tried `target`; True if that makes too many different ones."""
        young = self._young
        tried = young.get(key)
        if tried is None:
            tried = self._old.pop(key, None)
            if self._stored >= self._capacity:
                self._old = young
                self._young = young = {}
                self._stored = 0
            if tried is None:
                young[key] = (target, now)
                self._stored += 1
                return self._limit < 1
            self._stored += 1 if type(tried) is tuple else len(tried)
            young[key] = tried
        if type(tried) is tuple:
            if tried[0] == target:
                young[key] = (target, now)
                return self._limit < 1
            tried = young[key] = {tried[0]: tried[1]}
        assert isinstance(tried, dict)
        return self._tried_more(tried, target, now)

    def _tried_more(self, tried: dict[int, int], target: int, now: int) -> bool:
        before = len(tried)
        tried.pop(target, None)
        tried[target] = now  # the dict stays ordered by time of the last try
        if len(tried) > self._limit:
            horizon = now - self._within
            while tried[oldest := next(iter(tried))] <= horizon:
                del tried[oldest]
        over = len(tried) > self._limit
        if len(tried) > self._limit + 1:
            del tried[next(iter(tried))]
        self._stored += len(tried) - before
        return over

    def forget(self, key: int, target: int) -> None:
        """Take a target back (a handshake that was completed after all)."""
        for generation in (self._young, self._old):
            tried = generation.get(key)
            if type(tried) is tuple and tried[0] == target:
                del generation[key]
            elif isinstance(tried, dict):
                tried.pop(target, None)
                if not tried:
                    del generation[key]

    def forget_those(self, key: int, wanted: Callable[[int], bool]) -> None:
        """Take all targets of `key` back of which `wanted` says so."""
        for generation in (self._young, self._old):
            tried = generation.get(key)
            if tried is not None:
                targets = (tried[0],) if isinstance(tried, tuple) else tuple(tried)
                for target in filter(wanted, targets):
                    self.forget(key, target)

    def count(self, key: int, now: int) -> int:
        """Return how many different targets of `key` count at `now`."""
        tried = self._young.get(key) or self._old.get(key)
        if tried is None:
            return 0
        times = [tried[1]] if isinstance(tried, tuple) else list(tried.values())
        return sum(1 for time in times if time > now - self._within)

    def nearest(self, most: int, now: int) -> Iterator[list[tuple[int, float]]]:
        """Yield keys that tried the most targets, with the share of the limit, as `Limiter` does.

        Each step looks at some of the keys.  One that tried only one target is not among them:
        nearly all did.
        """
        horizon, limit = now - self._within, max(self._limit, 1)
        for generation in (self._young, self._old):
            keys, values = list(generation), list(generation.values())
            for at in range(0, len(keys), _AT_ONCE):
                end = at + _AT_ONCE
                live = [
                    (key, tried)
                    for key, tried in zip(keys[at:end], values[at:end], strict=True)
                    if type(tried) is dict and next(reversed(tried.values()), horizon) > horizon
                ]
                live = nlargest(most, live, key=lambda item: len(item[1]))
                found = [(key, self.count(key, now) / limit) for key, _ in live]
                yield sorted(found, key=itemgetter(1), reverse=True)

    def __len__(self) -> int:
        return len(self._young) + len(self._old)


class Memory(Generic[Value]):
    """A bounded dictionary with two generations, for whatever else is known of a key."""

    __slots__ = ("_capacity", "_old", "_young")

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self._capacity = capacity
        self._young: dict[Hashable, Value] = {}
        self._old: dict[Hashable, Value] = {}

    def get(self, key: Hashable) -> Value | None:
        """Return what is known of `key`, or None."""
        value = self._young.get(key)
        return self._old.get(key) if value is None else value

    def put(self, key: Hashable, value: Value) -> None:
        """Remember `value`, forgetting the longest unused generation if the table is full."""
        if len(self._young) >= self._capacity and key not in self._young:
            self._old = self._young
            self._young = {}
        self._young[key] = value

    def pop(self, key: Hashable) -> Value | None:
        """Forget `key` and return what was known of it, or None."""
        old = self._old.pop(key, None)
        value = self._young.pop(key, None)
        return old if value is None else value

    def __len__(self) -> int:
        return len(self._young) + len(self._old)
