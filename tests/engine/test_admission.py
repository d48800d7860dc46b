"""Live counts against a reference that forgets nothing and hears all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import parse_address
from rstguard.engine.admission import (
    MOST_KEYS,
    Admissions,
    Count,
    Paths,
    admitting,
    key_of_path,
    place_of,
    told_from,
)
from rstguard.engine.flow import Name, Tuple
from rstguard.engine.limits import Lenience
from rstguard.engine.ruleset import Measure, Per, Rule, RuleSet, Unless
from rstguard.engine.verdict import Action
from tests.support.packets import ruleset

SERVER = parse_address("203.0.113.10")
LIMIT = 8
OF_SOURCE = Rule("each", Measure.CONNECTIONS, Action.RESET, LIMIT)
OF_PREFIX = replace(OF_SOURCE, name="wide", per=Per.PREFIX, ipv4_length=24, ipv6_length=48)
OF_SERVICE = replace(OF_SOURCE, name="full", per=Per.SERVICE, limit=2 * LIMIT)


NO_LENIENCE = Lenience({}, {})


def path(client: int, port: int, to: int = 80) -> Tuple:
    return Tuple(parse_address("198.51.100.0") + client, SERVER, 1024 + port, to)


@dataclass
class Table:
    """What a sweep finds: all that is live."""

    live: set[Tuple] = field(default_factory=set)

    def counted(self, rule: Rule) -> dict[int, int]:
        return dict(Counter(key_of_path(rule, one) for one in self.live))

    def paths(self, rule: Rule, keys: Collection[int], but: Collection[Name]) -> dict[int, Paths]:
        found: dict[int, list[Tuple]] = {}
        for one in sorted(self.live):
            if (key := key_of_path(rule, one)) in keys:
                found.setdefault(key, []).extend({one} - set(but))
        return dict(found)


@dataclass
class Kernel:
    """The sets with counters and their rules, and what is told of."""

    rules: tuple[Rule, ...]
    counts: dict[tuple[int, int], int] = field(default_factory=dict)
    told: list[tuple[str, Tuple]] = field(default_factory=list)

    def begins(self, one: Tuple) -> bool:
        """Judge a first ACK; tell whether it is let in."""
        keys = [(number, key_of_path(rule, one)) for number, rule in enumerate(self.rules)]
        if any(self.counts.get(key, 0) >= self.rules[key[0]].limit for key in keys):
            return False
        for key in keys:
            self.counts[key] = self.counts.get(key, 0) + 1
        if any(self.counts[key] > told_from(self.rules[key[0]]) for key in keys):
            self.told.append(("began", one))
        return True

    def ends(self, one: Tuple) -> None:
        self.told.append(("ended", one))

    def forget(self) -> None:
        """Let the elements expire of those that nobody watches: the counts below the last ones."""
        self.counts.clear()

    def set(self, counts: Iterable[Count]) -> None:
        for number, key, held in counts:
            self.counts[number, key] = held


class Gateway:
    """Kernel and live counts; messages arrive when they are `heard`, in order."""

    def __init__(self, *rules: Rule) -> None:
        self.ruleset = policy(*rules)
        self.table, self.admissions = Table(), Admissions(self.ruleset)
        self.kernel = Kernel(self.admissions.rules)
        self.sweep()

    def begin(self, one: Tuple) -> None:
        if one not in self.table.live and self.kernel.begins(one):
            self.table.live.add(one)

    def end(self, one: Tuple) -> None:
        if one in self.table.live:
            self.table.live.discard(one)
            self.kernel.ends(one)

    def end_some(self, count: int) -> None:
        for one in sorted(self.table.live)[:count]:
            self.end(one)

    def hear(self, meanwhile: Iterable[Tuple] = ()) -> None:
        """Hear all; some begin `meanwhile`, after the counts are known and before they are set."""
        late = list(meanwhile)
        for what, one in self.kernel.told:
            if what == "began":
                self.admissions.began(one)
            elif one not in self.table.live:  # the tracker is asked
                self.admissions.ended(one)
        self.kernel.told.clear()
        counts = self.admissions.counts()
        for one in late:
            self.begin(one)
        for number, _, held in counts:  # or the kernel would not tell of what begins next
            assert held >= told_from(self.admissions.rules[number])
        self.kernel.set(counts)
        if counts or late:
            self.hear()

    def sweep(self) -> None:
        self.hear()
        self.admissions.look(self.table, NO_LENIENCE)
        self.hear()
        self.kernel.set(self.admissions.renewed())
        self.hear()

    def most(self, rule: Rule) -> int:
        return max(self.table.counted(rule).values(), default=0)


def policy(*rules: Rule) -> RuleSet:
    return replace(ruleset(), enforce=True, rules=rules)


PATHS = st.builds(path, st.integers(0, 3), st.integers(0, 20), st.sampled_from((80, 443)))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), PATHS),
        st.tuples(st.just("begin"), PATHS),
        st.tuples(st.just("end"), PATHS),
        st.tuples(st.just("end_some"), st.integers(1, 10)),
        st.tuples(st.sampled_from(("hear", "sweep"))),
        st.tuples(st.just("hear"), st.lists(PATHS, max_size=5)),
    ),
    max_size=300,
)


@given(STEPS)
def test_nobody_ever_holds_more_than_the_limit(steps: list[tuple[object, ...]]) -> None:
    rules = OF_SOURCE, OF_PREFIX, OF_SERVICE
    gateway = Gateway(*rules)
    for what, *arguments in steps:
        getattr(gateway, str(what))(*arguments)
        for rule in rules:
            assert gateway.most(rule) <= rule.limit
    # Of all that come near the kernel counts what a sweep has found.
    gateway.sweep()
    for number, rule in enumerate(gateway.admissions.rules):
        for key, held in gateway.table.counted(rule).items():
            if 2 * held >= rule.limit:
                assert gateway.kernel.counts[number, key] == held


def test_who_begins_while_a_count_is_set_is_in_it_the_next_time() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(LIMIT):
        gateway.begin(path(1, number))
    gateway.sweep()
    gateway.end_some(4)
    gateway.hear()
    for number in (50, 51):
        gateway.begin(path(1, number))
    gateway.end_some(2)
    gateway.hear(meanwhile=[path(1, 52), path(1, 53)])
    key = key_of_path(OF_SOURCE, path(1, 0))
    assert len(gateway.table.live) == 6
    assert gateway.kernel.counts[0, key] == 6


def test_a_full_key_has_a_place_for_each_that_ends() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(LIMIT):
        gateway.begin(path(1, number))
    gateway.hear()
    assert gateway.admissions.wants_sweep  # the first were not told of
    gateway.sweep()
    for number in range(LIMIT):
        assert gateway.kernel.counts[0, key_of_path(OF_SOURCE, path(1, 0))] == LIMIT
        gateway.end(path(1, number))
        gateway.hear()
        gateway.begin(path(1, 100 + number))
        assert path(1, 100 + number) in gateway.table.live
        gateway.hear()


@given(STEPS)
def test_a_place_is_free_as_soon_as_its_connection_is_known_to_be_over(
    steps: list[tuple[object, ...]],
) -> None:
    gateway = Gateway(OF_SOURCE)
    for what, *arguments in steps:
        getattr(gateway, str(what))(*arguments)
    gateway.sweep()
    for one in sorted(gateway.table.live):
        gateway.end(one)
        gateway.hear()
        gateway.begin(one)
        assert one in gateway.table.live


def test_a_source_that_comes_and_goes_fast_is_never_refused() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(1000):
        one = path(1, number)
        gateway.begin(one)
        gateway.hear()
        assert one in gateway.table.live, number
        gateway.end(one)
        gateway.hear()
        if gateway.admissions.wants_sweep:
            gateway.sweep()


def test_what_is_told_twice_counts_once_and_a_lost_end_only_until_the_next_sweep() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(LIMIT):
        gateway.begin(path(1, number))
    gateway.kernel.told += gateway.kernel.told
    gateway.sweep()
    gateway.end(path(1, 0))
    gateway.kernel.told.clear()
    gateway.hear()
    gateway.begin(path(1, 100))
    assert path(1, 100) not in gateway.table.live
    gateway.sweep()
    gateway.begin(path(1, 100))
    assert path(1, 100) in gateway.table.live


def test_where_beginnings_may_be_missing_nothing_is_set_before_a_sweep() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(LIMIT):
        gateway.begin(path(1, number))
    gateway.hear()
    gateway.admissions.lost = True
    gateway.end(path(1, 0))
    gateway.hear()
    assert gateway.kernel.counts[0, key_of_path(OF_SOURCE, path(1, 0))] == LIMIT
    gateway.sweep()
    assert gateway.kernel.counts[0, key_of_path(OF_SOURCE, path(1, 0))] == LIMIT - 1


def test_who_held_some_before_and_comes_near_is_looked_at_at_once() -> None:
    gateway = Gateway(OF_SOURCE)
    for number in range(2):
        gateway.begin(path(1, number))
    gateway.sweep()
    gateway.kernel.forget()
    for number in range(2, 7):
        gateway.begin(path(1, number))
    gateway.hear()
    assert not gateway.admissions.wants_sweep
    gateway.begin(path(1, 7))
    gateway.hear()
    assert bool(gateway.admissions.wants_sweep)
    gateway.sweep()
    gateway.begin(path(1, 8))
    assert gateway.most(OF_SOURCE) == LIMIT


def test_a_productive_source_may_hold_more() -> None:
    rule = replace(OF_SOURCE, unless=Unless(80, 10))
    gateway = Gateway(rule)
    key = key_of_path(rule, path(1, 0))
    for number in range(20):
        gateway.admissions.look(gateway.table, Lenience({key: 100}, {}))
        gateway.hear()
        gateway.kernel.set(gateway.admissions.renewed())
        gateway.hear()
        gateway.begin(path(1, number))
    assert gateway.most(rule) == 20


def test_what_does_not_count_takes_nobodys_place() -> None:
    gateway = Gateway(OF_SOURCE)
    forged = {path(1, number) for number in range(100, 100 + LIMIT)}
    gateway.table.live |= forged
    gateway.admissions.look(gateway.table, NO_LENIENCE, forged)
    gateway.kernel.set(gateway.admissions.renewed())
    gateway.hear()
    for number in range(LIMIT):
        gateway.begin(path(1, number))
        gateway.hear()
        assert path(1, number) in gateway.table.live


def test_keys_are_bounded() -> None:
    gateway = Gateway(replace(OF_SOURCE, limit=1))
    for client in range(MOST_KEYS + 100):
        gateway.admissions.began(path(client, 1))
    assert gateway.admissions.watched == MOST_KEYS


@pytest.mark.parametrize("mode", ["observe", "action", "none"])
def test_who_only_observes_counts_nothing(mode: str) -> None:
    rules = {
        "observe": replace(policy(OF_SOURCE), enforce=False),
        "action": policy(replace(OF_SOURCE, action=Action.OBSERVE)),
        "none": policy(),
    }
    assert admitting(rules[mode]) == ()


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8:1:2::7"])
@pytest.mark.parametrize("rule", [OF_SOURCE, OF_PREFIX, OF_SERVICE])
def test_a_key_says_where_it_is_counted(rule: Rule, address: str) -> None:
    of = Tuple(parse_address(address), parse_address(address), 1024, 443)
    key = key_of_path(rule, of)
    found, port = place_of(rule, key)
    assert port == (443 if rule.per is Per.SERVICE else -1)
    assert key_of_path(rule, of._replace(source=found)) == key
