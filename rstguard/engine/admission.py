"""How many connections each source, prefix or service holds at this moment.  Pure.

The kernel counts by itself how many connections of a key it has let in
(`rstguard.kernel.admission`) and refuses those beyond the limit; it does not know which are over.
Here that is known of the keys that come near: who is *watched* has a list of its live connections,
begun by a sweep and kept by what the kernel tells of beginnings and ends, and the kernel's count is
set anew wherever it is too high.

All that can go wrong makes a count too high, never too low, until the next sweep: an end of which
nothing was heard; what a key held before it was watched.  So a late reader refuses some, and lets
in nobody.  The one exception, a beginning of which nothing was heard, is known as such (`lost`):
then nothing is set until a sweep has read the table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from heapq import nlargest
from operator import itemgetter
from typing import Final, NamedTuple, Protocol

from rstguard.engine.address import source_key
from rstguard.engine.flow import Name, Tuple
from rstguard.engine.limits import Lenience, limit_of
from rstguard.engine.ruleset import Measure, Per, Rule, RuleSet

MOST_KEYS: Final = 4096
"""Keys that are watched, of all rules; those that hold the most."""
MOST_HELD: Final = 262_144
"""Connections that are kept for them."""
_QUARTER: Final = 4
_HALF: Final = 2
_MARGIN: Final = 8
"""By this part of the limit a count may be too high; so much too high very many are set at once."""


class Count(NamedTuple):
    """What the kernel is to count for a key of a rule from now on (`number`: the rule's place)."""

    number: int
    key: int
    held: int


class Paths(Protocol):
    """Names of connections, each once; it may be that they are made only for who iterates."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tuple]: ...


class Held(Protocol):
    """The part of `rstguard.engine.table.Known` that is needed here."""

    def counted(self, rule: Rule) -> dict[int, int]:
        """Return how many connections each key holds."""

    def paths(self, rule: Rule, keys: Collection[int], but: Collection[Name]) -> dict[int, Paths]:
        """Return the names of the connections of some keys, but these and doubtful ones."""


def admitting(ruleset: RuleSet) -> tuple[Rule, ...]:
    """Return the rules whose connections the kernel counts as they begin.

    A policy that only observes has none.
    """
    return tuple(
        rule
        for rule in ruleset.keeping_out(Measure.CONNECTIONS)
        if 0 < rule.ipv4_length <= rule.ipv6_length  # else its keys would not tell the family
    )


def told_from(rule: Rule) -> int:
    """Return how many beginnings of a key nothing is told of: the later ones are."""
    return rule.limit // _QUARTER


def key_of_path(rule: Rule, path: Tuple) -> int:
    """Return whom a rule counts a connection of this name against."""
    if rule.per is Per.SERVICE:
        return path.destination << 16 | path.destination_port
    address = path.destination if rule.per is Per.DESTINATION else path.source
    return source_key(address, rule.ipv4_length, rule.ipv6_length)


def place_of(rule: Rule, key: int) -> tuple[int, int]:
    """Return the address, tagged, that a key begins with, and its port, or -1 if it has none."""
    if rule.per is Per.SERVICE:
        return key >> 16, key & 0xFFFF
    v6 = key >> rule.ipv6_length == 1
    return key << (128 - rule.ipv6_length if v6 else 32 - rule.ipv4_length), -1


class _Watch:
    """What is known of one key."""

    __slots__ = ("_just_set", "_paths", "base", "kernel", "loose", "unsure")

    def __init__(self, base: int, kernel: int, paths: Paths) -> None:
        self._paths = paths
        self.base = base
        """Connections that it may hold besides: what it held before nobody has told one by one."""
        self.kernel = kernel
        """What the kernel counts, as far as that is known."""
        self.unsure = 0
        """How many of these it may lack, as they began while its count was set."""
        self.loose = False
        """Whether it was set too high on purpose."""
        self._just_set = False

    @property
    def live(self) -> set[Tuple]:
        """The connections of which it is known that they are live: few keys are ever asked for."""
        if not isinstance(self._paths, set):
            self._paths = set(self._paths)
        return self._paths

    @property
    def known(self) -> int:
        """How many these are."""
        return len(self._paths)

    @property
    def count(self) -> int:
        return self.base + self.known

    def began(self, path: Tuple) -> bool:
        """Take in a connection; tell whether it was not known."""
        self.kernel += 1
        self.unsure += self._just_set
        if path in self.live:
            return False
        self.live.add(path)
        return True

    def forget(self, held: int) -> None:
        """Let go of its connections: it holds so many, and nobody has told one by one."""
        self.base, self._paths = held, set()

    def is_due(self, wanted: int, limit: int) -> bool:
        """Tell whether the kernel's count is to be set anew.

        At the limit the kernel lets in nobody, so that none can begin unnoticed while it is set.
        Below it some may: then they are heard of next, and it is set once more.
        """
        self._just_set = False
        if self.kernel >= limit:
            return wanted < limit
        if self.kernel * _HALF < limit and wanted * _HALF < limit:
            return False
        return self.loose or self.unsure > 0 or (self.kernel - wanted) * _MARGIN >= limit

    def set_to(self, count: int, loose: bool = False) -> int:
        """Note what the kernel counts from now on, and return it; `loose`: it is too high."""
        self.kernel, self.unsure, self._just_set, self.loose = count, 0, True, loose
        return count


class Admissions:
    """The live counts of a policy's rules; `rules` are those, in their places."""

    def __init__(self, ruleset: RuleSet, previous: Admissions | None = None) -> None:
        """Take up a policy; what `previous` has of rules that are unchanged in place is kept."""
        self.rules = admitting(ruleset)
        self._ports = tuple(rule.ports for rule in self.rules)
        self._watches: list[dict[int, _Watch]] = [{} for _ in self.rules]
        self._held: list[dict[int, int]] = [{} for _ in self.rules]
        """What each key held at the last sweep."""
        self._lenience = Lenience({}, {})
        self._touched: set[tuple[int, int]] = set()
        self.lost = True
        """Whether beginnings may be missing, as before the first sweep; the next one mends it."""
        self.wants_sweep = bool(self.rules)
        """Whether a key may be at its limit of which that is not known for sure."""
        for number, rule in enumerate(self.rules):
            if previous and number < len(previous.rules) and previous.rules[number] == rule:
                self._watches[number] = previous._watches[number]
                self._held[number] = previous._held[number]
        self._total = sum(w.known for watches in self._watches for w in watches.values())

    @property
    def watched(self) -> int:
        """How many keys are watched."""
        return sum(map(len, self._watches))

    def began(self, path: Tuple) -> None:
        """Take in a connection that the kernel has let in: more than `told_from` of its key did."""
        for number, rule in self._concerned(path):
            key = key_of_path(rule, path)
            watch = self._watches[number].get(key)
            if watch is None:
                watch = self._watch(number, rule, key)
                if watch is None:
                    continue
            self._total += watch.began(path)
            self._touched.add((number, key))
            limit = limit_of(rule, key, self._lenience)
            if watch.count > limit or (watch.base and watch.count >= limit):
                self.wants_sweep = True

    def _watch(self, number: int, rule: Rule, key: int) -> _Watch | None:
        if self.watched >= MOST_KEYS or self._total >= MOST_HELD:
            return None
        untold = told_from(rule)
        watch = _Watch(self._held[number].get(key, 0) + untold, untold, set())
        self._watches[number][key] = watch
        return watch

    def ended(self, path: Tuple) -> None:
        """Let go of a connection that the tracker calls over; one not known does not matter."""
        for number, rule in self._concerned(path):
            key = key_of_path(rule, path)
            watch = self._watches[number].get(key)
            if watch is not None and path in watch.live:
                watch.live.discard(path)
                self._total -= 1
                self._touched.add((number, key))

    def has(self, path: Tuple) -> bool:
        """Tell whether a connection is among those of a watched key."""
        for number, rule in self._concerned(path):
            watch = self._watches[number].get(key_of_path(rule, path))
            if watch is not None and path in watch.live:
                return True
        return False

    def _concerned(self, path: Tuple) -> Iterator[tuple[int, Rule]]:
        for number, rule in enumerate(self.rules):
            ports = self._ports[number]
            if ports is not None and path.destination_port not in ports:
                continue
            if not rule.is_partial or rule.concerns(path.source, path.destination):
                yield number, rule

    def look(self, known: Held, lenience: Lenience, but: Collection[Name] = ()) -> None:
        """Take what a sweep has found, `but` these, in place of all that was known."""
        self._lenience, self.lost, self.wants_sweep = lenience, False, False
        self._held = [dict(known.counted(rule)) for rule in self.rules]
        near: list[tuple[int, int, int]] = []
        for number, rule in enumerate(self.rules):
            held = self._held[number]
            keys = {key for key, count in held.items() if count * _HALF >= rule.limit}
            # What is told of goes on being told of: its count is exact from now on.
            keys |= self._watches[number].keys() & held.keys()
            near += [(held[key], number, key) for key in keys]
        chosen: list[list[int]] = [[] for _ in self.rules]
        room = MOST_HELD
        for count, number, key in nlargest(MOST_KEYS, near, key=itemgetter(0)):
            room -= count
            if room >= 0:
                chosen[number].append(key)
        self._total = 0
        for number, rule in enumerate(self.rules):
            found = known.paths(rule, chosen[number], but)
            self._total += sum(map(len, found.values()))
            self._renew(number, found)

    def _renew(self, number: int, live: Mapping[int, Paths]) -> None:
        before = self._watches[number]
        fresh: dict[int, _Watch] = {}
        for key, of_key in live.items():
            fresh[key] = _Watch(0, before[key].kernel if key in before else 0, of_key)
            self._held[number][key] = len(of_key)
        for key in before.keys() - fresh.keys():
            # It holds nothing, or there is no room: told so once.
            watch = fresh[key] = before[key]
            watch.forget(self._held[number].get(key, 0))
        self._watches[number] = fresh

    def counts(self) -> list[Count]:
        """Return what the kernel is to be told now; it is taken as told."""
        touched, self._touched = self._touched, set()
        found: list[Count] = []
        if self.lost:
            return found
        for number, key in touched:
            watch = self._watches[number].get(key)
            if watch is None:
                continue
            wanted = self._wanted(number, key, watch)
            if watch.is_due(wanted, self.rules[number].limit):
                found.append(Count(number, key, watch.set_to(wanted)))
        return found

    def renewed(self) -> list[Count]:
        """Return what the kernel is to be told after a sweep: the count of every key watched.

        What it counts it forgets with time.  Keys that hold little are let go.
        """
        self._touched.clear()
        found: list[Count] = []
        if self.lost:
            return found
        for number, watches in enumerate(self._watches):
            limit = self.rules[number].limit
            for key, watch in list(watches.items()):
                if watch.count <= told_from(self.rules[number]):
                    self._total -= watch.known
                    del watches[key]
                    found.append(Count(number, key, watch.count))
                    continue
                wanted = self._wanted(number, key, watch)
                safe = min(wanted + limit // _MARGIN, max(wanted, limit))
                found.append(Count(number, key, watch.set_to(safe, loose=True)))
                self._touched.add((number, key))
        return found

    def _wanted(self, number: int, key: int, watch: _Watch) -> int:
        """Return what the kernel is to count, so that it refuses beyond what this key may hold.

        It is never so low that the kernel would keep to itself what begins.
        """
        rule = self.rules[number]
        spare = limit_of(rule, key, self._lenience) - rule.limit
        return max(watch.count - spare, told_from(rule))
