"""Token buckets and counts of targets, against models too simple to be wrong."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.limiter import Distinct, Limiter, Memory
from rstguard.engine.ruleset import SECOND
from rstguard.engine.verdict import Reason
from tests.support.packets import MILLISECOND

KEY = 7

# 20 a second, 5 at once: one token every 50 ms. The form is WireGuard's ratelimiter_test.go.
STEPS: list[tuple[int, bool, str]] = [
    (0, True, "a rested source has a full bucket"),
    (0, True, "second of the burst"),
    (0, True, "third of the burst"),
    (0, True, "fourth of the burst"),
    (0, True, "fifth of the burst"),
    (0, False, "the bucket is empty"),
    (49, False, "just before the next token"),
    (1, True, "the next token"),
    (0, False, "and it was only one"),
    (25, False, "half a token is none"),
    (24, False, "an event over the limit takes nothing"),
    (1, True, "the one after"),
    (100, True, "two tokens have come"),
    (0, True, "the second of them"),
    (0, False, "and no third"),
    (10_000, True, "after a long rest the bucket is full"),
    (0, True, "second"),
    (0, True, "third"),
    (0, True, "fourth"),
    (0, True, "fifth"),
    (0, False, "but holds no more than the burst"),
]


def test_token_bucket_step_by_step() -> None:
    limiter, now = Limiter(limit=20, period=SECOND, burst=5), 123_456_789
    for wait, allowed, text in STEPS:
        now += wait * MILLISECOND
        assert limiter.over(KEY, now) is not allowed, text


def test_keys_have_buckets_of_their_own() -> None:
    limiter = Limiter(limit=1, period=SECOND, burst=1)
    assert not limiter.over(1, 0)
    assert limiter.over(1, 0)
    assert not limiter.over(2, 0)


def test_level_goes_up_with_use_and_down_with_time() -> None:
    limiter = Limiter(limit=4, period=SECOND, burst=4)
    assert limiter.level(KEY, 0) == 0
    limiter.over(KEY, 0)
    assert limiter.level(KEY, 0) == pytest.approx(0.25)
    limiter.over(KEY, 0)
    assert limiter.level(KEY, 0) == pytest.approx(0.5)
    assert limiter.level(KEY, SECOND // 4) == pytest.approx(0.25)
    assert limiter.level(KEY, SECOND) == 0


class NaiveBucket:
    """Tokens as an exact fraction, added up at every event."""

    def __init__(self, cost: int, burst: int) -> None:
        self.cost, self.burst = cost, burst
        self.tokens, self.last = Fraction(burst), 0

    def over(self, now: int) -> bool:
        self.tokens += Fraction(now - self.last, self.cost)
        self.tokens = min(self.tokens, Fraction(self.burst))
        self.last = now
        if self.tokens < 1:
            return True
        self.tokens -= 1
        return False


gaps = st.one_of(st.integers(0, 3), st.integers(0, SECOND // 10), st.integers(0, 3 * SECOND))
events = st.lists(st.tuples(gaps, st.integers(0, 3)), max_size=80)


@given(
    events, st.integers(1, 1000), st.sampled_from([1, 1000, SECOND, 60 * SECOND]), st.integers(1, 9)
)
def test_agrees_with_a_naive_bucket(
    history: list[tuple[int, int]], limit: int, period: int, burst: int
) -> None:
    limiter = Limiter(limit, period, burst)
    models = {key: NaiveBucket(max(1, period // limit), burst) for key in range(4)}
    now = 10 * SECOND
    for gap, key in history:
        now += gap
        assert limiter.over(key, now) is models[key].over(now)


@given(st.lists(st.tuples(gaps, st.integers(1, 100)), max_size=200), st.integers(2, 6))
def test_a_source_seen_within_capacity_insertions_is_not_forgotten(
    history: list[tuple[int, int]], capacity: int
) -> None:
    """The eviction rule: between two events of KEY come fewer than `capacity` of others."""
    limiter, model = Limiter(3, SECOND, 3, capacity), NaiveBucket(SECOND // 3, 3)
    now, others = 10 * SECOND, 0
    for gap, other in history:
        now += gap
        if others < capacity - 1:
            limiter.over(1000 + other, now)
            others += 1
        else:
            assert limiter.over(KEY, now) is model.over(now)
            others = 0


@given(st.lists(st.tuples(gaps, st.integers(0, 500)), max_size=300), st.integers(1, 20))
def test_limiter_is_bounded(history: list[tuple[int, int]], capacity: int) -> None:
    limiter, now = Limiter(2, SECOND, 2, capacity), 0
    for gap, key in history:
        now += gap
        limiter.over(key, now)
        assert len(limiter) <= 2 * capacity


def test_a_flood_of_sources_stays_bounded() -> None:
    limiter = Limiter(10, SECOND, 10, 1000)
    for source in range(50_000):
        assert not limiter.over(source, source)
    assert len(limiter) <= 2000


def test_a_forgotten_source_starts_afresh() -> None:
    limiter = Limiter(1, 3600 * SECOND, 1, capacity=4)
    assert not limiter.over(KEY, 0)
    assert limiter.over(KEY, 1)
    for other in range(100, 109):
        limiter.over(other, 2)
    assert not limiter.over(KEY, 3)


def test_old_entries_go_although_the_table_is_not_full() -> None:
    limiter = Limiter(1, SECOND, 1)
    for minute in range(10):
        limiter.over(minute, minute * 60 * SECOND)
    assert len(limiter) <= 2


class NaiveTargets:
    """Every target with the time of its last try, none ever dropped."""

    def __init__(self, limit: int, within: int) -> None:
        self.limit, self.within = limit, within
        self.tried: dict[int, int] = {}

    def over(self, target: int, now: int) -> bool:
        self.tried[target] = now
        return sum(1 for last in self.tried.values() if last > now - self.within) > self.limit


tries = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 2), st.integers(0, SECOND)), st.integers(0, 3), st.integers(0, 9)
    ),
    max_size=80,
)


@given(tries, st.integers(0, 6), st.integers(1, 2 * SECOND))
def test_distinct_agrees_with_a_naive_count(
    history: list[tuple[int, int, int]], limit: int, within: int
) -> None:
    distinct = Distinct(limit, within)
    models = {key: NaiveTargets(limit, within) for key in range(4)}
    now = 10 * SECOND
    for gap, key, target in history:
        now += gap
        assert distinct.over(key, target, now) is models[key].over(target, now)


@given(tries, st.integers(1, 4))
def test_distinct_with_targets_taken_back_never_counts_too_many(
    history: list[tuple[int, int, int]], limit: int
) -> None:
    distinct = Distinct(limit, SECOND)
    models = {key: NaiveTargets(limit, SECOND) for key in range(4)}
    now = 10 * SECOND
    for step, (gap, key, target) in enumerate(history):
        now += gap
        if step % 3 == 2:
            distinct.forget(key, target)
            models[key].tried.pop(target, None)
        elif distinct.over(key, target, now):
            assert models[key].over(target, now)
        else:
            models[key].over(target, now)


DISTINCT_STEPS: list[tuple[int, int, bool, str]] = [
    (0, 22, True, "the first target"),
    (0, 80, True, "the second"),
    (0, 80, True, "the same again is no third"),
    (0, 443, True, "the third is the last allowed"),
    (0, 8080, False, "a fourth within the time"),
    (0, 22, False, "and it stays too many, also on an old target"),
    (11_000, 25, True, "after the time only the new one counts"),
    (0, 26, True, "the second of the new time"),
    (0, 27, True, "the third"),
    (5_000, 28, False, "the fourth, half a time later"),
    (5_000, 28, True, "the first three are over, the fourth was tried again"),
]


def test_distinct_step_by_step() -> None:
    distinct, now = Distinct(limit=3, within=10 * SECOND), 0
    for wait, target, allowed, text in DISTINCT_STEPS:
        now += wait * MILLISECOND
        assert distinct.over(KEY, target, now) is not allowed, text


def test_distinct_count() -> None:
    distinct = Distinct(limit=5, within=SECOND)
    assert distinct.count(KEY, 0) == 0
    distinct.over(KEY, 1, 0)
    assert distinct.count(KEY, 0) == 1
    distinct.over(KEY, 2, SECOND // 2)
    assert distinct.count(KEY, SECOND // 2) == 2
    assert distinct.count(KEY, SECOND) == 1


def test_one_source_cannot_hold_more_than_its_limit() -> None:
    distinct = Distinct(limit=10, within=SECOND, capacity=100)
    for target in range(5000):
        distinct.over(KEY, target, target)
    assert distinct.count(KEY, 5000) == 11


def test_many_sources_with_many_targets_stay_bounded() -> None:
    distinct = Distinct(limit=10, within=SECOND, capacity=500)
    for step in range(30_000):
        distinct.over(step % 3000, step, step)
    held = sum(distinct.count(key, 0) for key in range(3000))
    assert held <= 2 * (500 + 11)
    assert len(distinct) <= 2 * 500


def test_a_target_taken_back_does_not_count() -> None:
    distinct = Distinct(limit=2, within=SECOND)
    for target in range(100):
        assert not distinct.over(KEY, target, 0)
        distinct.forget(KEY, target)
    assert distinct.count(KEY, 0) == 0
    assert len(distinct) == 0


def test_taking_back_what_was_never_tried_does_nothing() -> None:
    distinct = Distinct(limit=2, within=SECOND)
    distinct.forget(KEY, 1)
    distinct.over(KEY, 1, 0)
    distinct.forget(KEY, 2)
    distinct.forget(8, 1)
    assert distinct.count(KEY, 0) == 1


def test_memory_remembers_forgets_and_is_bounded() -> None:
    memory: Memory[Reason] = Memory(capacity=10)
    assert memory.get("a") is None
    memory.put("a", Reason.IDLE)
    assert memory.get("a") is Reason.IDLE
    memory.put("a", Reason.SLOW)
    assert memory.pop("a") is Reason.SLOW
    assert memory.pop("a") is None
    for key in range(10_000):
        memory.put(key, Reason.AGE)
        assert len(memory) <= 20
        assert all(memory.get(recent) is Reason.AGE for recent in range(max(0, key - 9), key + 1))


def test_memory_gives_the_newer_of_two_values() -> None:
    memory: Memory[int] = Memory(capacity=2)
    memory.put("a", 1)
    memory.put("b", 1)
    memory.put("c", 1)
    memory.put("a", 2)
    assert memory.get("a") == 2
    assert memory.pop("a") == 2
    assert memory.get("a") is None


def test_an_exhausted_key_comes_back_with_its_rate_and_no_burst() -> None:
    limiter = Limiter(100, SECOND, 200)
    while not limiter.over(1, 0):
        pass
    limiter.exhaust(1, 10 * SECOND, 0)
    assert limiter.over(1, 5 * SECOND)
    passed = sum(not limiter.over(1, 10 * SECOND + n * SECOND // 1000) for n in range(1000))
    assert 100 <= passed <= 102
    assert not limiter.over(2, 10 * SECOND)


def test_a_debt_outlives_the_floods_of_others() -> None:
    limiter = Limiter(100, SECOND, 200, capacity=64)
    limiter.exhaust(1, 10 * SECOND, 0)
    for at in range(1, 60):  # one newcomer each tenth of a second: far fewer than a generation
        limiter.over(1000 + at, at * SECOND // 10)
    assert limiter.over(1, 6 * SECOND)
