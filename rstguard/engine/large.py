"""Sources that carry a large share of all connections: a CDN, a load balancer, a health checker.

Behind a proxy nearly all connections come from a few addresses, so a rule that counts per source
hits everybody at once.  Which source is a proxy only an administrator can say; until then a source
that *is large* is named, and rules for numbers (`OF_NUMBERS`) go further for it:

- It is **large** if at every sweep for `Shares.after` it held `Shares.least` percent of all live
  connections that its servers have answered with data, and at least `LEAST` of them.  Nobody can
  forge such a connection in another's name, or can be made small but by real ones.
- What it **bore** is the fewest of them that it held at any sweep of such a time in which no
  service was in distress, and no rule for numbers ended one of its connections, banned it or had
  it at its limit; of several such times the most.  So a source that came with a flood, and is kept
  at the limit while it goes on, bears nothing.  Under a policy that enforces no more counts than
  the limit itself: else who is patient would be spared twice as much each time.
- It may hold `TIMES` as many as it bore, where that is more than a rule's limit, and as many as it
  bore while a service is in distress.  Its rates may be `RATE_TIMES` those of a rule.
- Under pressure so many connections are no sign of one visitor who holds many
  (`rstguard.engine.patience`).
- A source that bore nothing is named, and not spared.

It is forgotten `LASTS` after it last carried such a share (if it bore nothing: `Shares.after`).
Times are monotonic nanoseconds; nothing here knows a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from rstguard.engine.address import Networks, Prefix, is_v6, prefix_of, source_key, source_of_key
from rstguard.engine.keys import key_of
from rstguard.engine.limiter import Limiter
from rstguard.engine.ruleset import SECOND, Measure, Per, Rule, RuleSet
from rstguard.engine.verdict import Reason

LEAST: Final = 50
"""Proven connections below which no source is large, whatever its share."""
TIMES: Final = 2
"""How many times what it bore a large source may hold."""
RATE_TIMES: Final = 10
"""How many times a rule's rate it may have: as many as a productive one, unless a rule differs."""
LASTS: Final = 86400 * SECOND
"""How long it is remembered what a source bore: longer than the quiet hours of a day."""
MOST: Final = 16
"""Sources that are remembered: those that bore most, then those that hold most."""

OF_NUMBERS: Final = frozenset({
    Measure.SYN_RATE, Measure.CONNECTION_RATE, Measure.HALF_OPEN, Measure.RESET_RATE,
    Measure.SHORT_CONNECTIONS, Measure.CONNECTIONS, Measure.BYTE_RATE, Measure.PACKET_RATE,
})  # fmt: skip
"""What many clients behind one address show as much of as they are many.  What they try, segments
that no TCP sends, and how a single connection gets on are no matter of their number."""

REASONS_OF_NUMBERS: Final = frozenset(Reason[measure.name] for measure in OF_NUMBERS)
"""Why these rules block."""


class LargeSource(NamedTuple):
    """A large source; it carries `share` percent of all, so many `connections`, now.

    `bore` is 0 if nothing is spared it.  `age` tells for how many nanoseconds it has been watched,
    `quiet` for how many it has not carried a large share.
    """

    source: Prefix
    share: int
    connections: int
    bore: int
    age: int
    quiet: int


def advice(source: str, share: int) -> str:
    """Return what an administrator can say of a source that carries so many percent of all."""
    return (
        f"{source} carries {share}% of all proven connections: if it is a proxy, a load balancer "
        "or a health checker, put it under `trusted`, or under `except` of rules; if it is a "
        "source like any other, under `large_sources: {ordinary: [...]}`"
    )


def spared(sources: Iterable[LargeSource]) -> tuple[Prefix, ...]:
    """Return those of them that rules for numbers spare."""
    return tuple(one.source for one in sources if one.bore)


def is_for_numbers(rule: Rule) -> bool:
    """Tell whether a rule counts what many clients of one source show together."""
    of_one = rule.of_target or rule.per is Per.CONNECTION
    return rule.measure in OF_NUMBERS and not of_one


def looks_for_large(ruleset: RuleSet) -> bool:
    """Tell whether it matters which sources are large: whether a rule counts per source."""
    return any(map(is_for_numbers, ruleset.rules))


def is_settled(ruleset: RuleSet, source: Prefix) -> bool:
    """Tell whether an administrator has said what a source is.

    It is trusted, protected, `ordinary`, or excepted from every rule for numbers.
    """
    address, scope = source.network, ruleset.scope
    if scope.exempts(address) or any(one.covers(address) for one in ruleset.shares.ordinary):
        return True
    counting = filter(is_for_numbers, ruleset.rules)
    return all(any(one.covers(address) for one in rule.excepted) for rule in counting)


@dataclass(slots=True)
class _Watch:
    """What is known of a source that carries a large share, or did lately."""

    since: int
    seen: int
    connections: int = 0
    share: int = 0
    calm_since: int | None = None
    fewest: int = 0
    bore: int = 0
    named: bool = False

    def look(self, connections: int, share: int, most: int | None, after: int, now: int) -> None:
        """Take in what it holds at a sweep, at which it carries a large share.

        `most` is what it may bear, None for any number; 0 while all is not calm.
        """
        self.seen, self.connections, self.share = now, connections, share
        self.named = self.named or now - self.since >= after
        if most == 0:
            self.calm_since = None
            return
        if self.calm_since is None:
            self.calm_since, self.fewest = now, connections
        self.fewest = min(self.fewest, connections)
        if now - self.calm_since >= after:
            self.bore = max(self.bore, self.fewest if most is None else min(self.fewest, most))
            self.calm_since, self.fewest = now, connections

    def rest(self, connections: int, share: int) -> None:
        """Take in that it does not carry a large share at a sweep."""
        self.connections, self.share, self.calm_since = connections, share, None


class LargeSources:
    """Keeps which sources are large, sweep by sweep."""

    def __init__(self) -> None:
        self._watches: dict[Prefix, _Watch] = {}
        self._strained = False
        self._hit: set[Prefix] = set()

    def restore(self, sources: Iterable[LargeSource], now: int) -> None:
        """Remember what an earlier sweeper knew, also one of a guard before this."""
        for source, share, connections, bore, age, quiet in sources:
            watch = _Watch(now - age, now - quiet, connections, share, bore=bore, named=True)
            self._watches[source] = watch

    def look(
        self,
        held: Mapping[int, int],
        total: int,
        hit: Networks,
        strained: bool,
        ruleset: RuleSet,
        now: int,
    ) -> None:
        """Take in what a sweep has found.

        Args:
            held: how many proven connections sources hold, by their keys; those of less than
                `LEAST` may be left out.
            total: how many all sources hold.
            hit: whom a rule for numbers hits, or has at its limit; of watched ones also `note_hit`.
            strained: whether a service is in distress.
            ruleset: the policy.
            now: when that was.
        """
        self._strained = strained
        least, after = ruleset.shares.least, ruleset.shares.after
        widths = ruleset.source_ipv4, ruleset.source_ipv6
        counts = {source_of_key(key, *widths): count for key, count in held.items()}
        most = _most(ruleset)
        for source, count in counts.items():
            if count >= LEAST and count * 100 >= total * least:
                if source not in self._watches and is_settled(ruleset, source):
                    continue
                watch = self._watches.setdefault(source, _Watch(now, now))
                calm = not (strained or source in self._hit or hit.meets(source))
                watch.look(count, count * 100 // total, most if calm else 0, after, now)
        for source, watch in self._watches.items():
            if watch.seen != now:
                count = counts.get(source, 0)
                watch.rest(count, count * 100 // max(total, 1))
        self._hit.clear()
        self._forget(ruleset, now)

    @property
    def watched(self) -> Collection[Prefix]:
        """Those that carry a large share, or are remembered."""
        return self._watches.keys()

    def note_hit(self, source: Prefix, reason: Reason) -> None:
        """Take note that a source, or a network that meets it, was banned or reset."""
        if reason in REASONS_OF_NUMBERS:
            hit = Networks([source])
            self._hit.update(one for one in self._watches if hit.meets(one))

    def _forget(self, ruleset: RuleSet, now: int) -> None:
        kept = {
            source: watch
            for source, watch in self._watches.items()
            if source == prefix_of(source.network, ruleset.source_ipv4, ruleset.source_ipv6)
            and not is_settled(ruleset, source)
            and now - watch.seen <= _lasts(watch, ruleset.shares.after)
        }
        if len(kept) > MOST:
            order = sorted(kept, key=lambda one: (-kept[one].bore, -kept[one].connections, one))
            kept = {source: kept[source] for source in order[:MOST]}
        self._watches = kept

    def found(self, now: int) -> tuple[LargeSource, ...]:
        """Return those that are large at `now`, the ones with the most connections first."""
        large = (
            LargeSource(
                source,
                watch.share,
                watch.connections,
                watch.bore,
                age=now - watch.since,
                quiet=now - watch.seen,
            )
            for source, watch in self._watches.items()
            if watch.named
        )
        return tuple(sorted(large, key=lambda one: (-one.connections, one.source)))

    def limits(self, rule: Rule) -> dict[int, int]:
        """Return what keys of a rule that counts connections may hold, where that is more.

        A wider prefix may hold as many as its large sources, and its own limit besides.
        """
        found: dict[int, int] = {}
        if not is_for_numbers(rule):
            return found
        for source, watch in self._spared(rule):
            key = key_of(rule, source.network)
            wide = _length(rule, source) < source.length
            more = watch.bore * (1 if self._strained else TIMES)
            found[key] = found.get(key, rule.limit if wide else 0) + more
        return found

    def spared(self, rule: Rule) -> frozenset[int]:
        """Return the keys of a rule of which the rate may be `RATE_TIMES` its own."""
        if not is_for_numbers(rule):
            return frozenset()
        return frozenset(key_of(rule, source.network) for source, _ in self._spared(rule))

    def borne(self, ipv4: int, ipv6: int) -> dict[int, int]:
        """Return what large sources bore, by keys of these widths of an address."""
        return {
            source_key(source.network, ipv4, ipv6): watch.bore
            for source, watch in self._watches.items()
            if watch.bore
        }

    def _spared(self, rule: Rule) -> list[tuple[Prefix, _Watch]]:
        """Return the large sources that one key of a rule holds whole."""
        return [
            (source, watch)
            for source, watch in self._watches.items()
            if watch.bore and _length(rule, source) <= source.length
        ]


def _lasts(watch: _Watch, after: int) -> int:
    """Return how long a source is remembered since it last carried a large share."""
    if watch.bore:
        return LASTS
    return after if watch.named else 0


def _most(ruleset: RuleSet) -> int | None:
    """Return the lowest limit of connections that is enforced, None if there is none."""
    rules = filter(is_for_numbers, ruleset.keeping_out(Measure.CONNECTIONS))
    return min((max(rule.limit, 1) for rule in rules), default=None)


def _length(rule: Rule, source: Prefix) -> int:
    return rule.ipv6_length if is_v6(source.network) else rule.ipv4_length


class Spared:
    """Lets packets of large sources pass that only a rule for numbers objects to.

    It is asked after a rule was hit, and counts what is beyond it: `RATE_TIMES` its rate in all.
    """

    def __init__(self) -> None:
        self._sources: frozenset[Prefix] = frozenset()
        self._keys: frozenset[int] = frozenset()
        self._widths = 32, 64
        self._beyond: dict[tuple[Rule, bool], Limiter] = {}

    def follow(self, ruleset: RuleSet) -> None:
        """Take up a policy; of rules that stay the counts are kept."""
        self._widths = ruleset.source_ipv4, ruleset.source_ipv6
        self._beyond = {
            (rule, apart): beyond
            for (rule, apart), beyond in self._beyond.items()
            if rule in ruleset.rules
        }
        self.note(self._sources)

    def note(self, sources: Iterable[Prefix]) -> None:
        """Take note of who is to be spared."""
        self._sources = frozenset(sources)
        self._keys = frozenset(source_key(one.network, *self._widths) for one in self._sources)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def spares(self, rule: Rule, source: int, now: int, apart: bool = False) -> bool:
        """Tell whether a packet of a source (a tagged address) passes all the same.

        `apart` tells that the rule was hit by what is counted of proven connections alone.
        """
        key = source_key(source, *self._widths)
        if key not in self._keys or not is_for_numbers(rule):
            return False
        beyond = self._beyond.get((rule, apart))
        if beyond is None:
            beyond = self._beyond[rule, apart] = _beyond(rule)
        return not beyond.over(key, now)


def _beyond(rule: Rule) -> Limiter:
    """Return what counts what is beyond a rule's rate, or beyond what it allows within a time."""
    times = RATE_TIMES - 1
    limit = max(rule.limit, 1)
    burst = rule.burst if rule.period else limit
    return Limiter(limit * times, rule.period or rule.within, burst * times, capacity=MOST)
