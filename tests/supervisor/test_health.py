"""How the guard is: each thing that can be wrong, alone and together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from rstguard.engine.shedding import Level
from rstguard.supervisor.child import State
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import RECENT, Condition, health
from tests.supervisor.parts import guard_of

DEGRADED, NOT = Condition.DEGRADED, Condition.NOT_FILTERING


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_all_is_well() -> None:
    how = health(guard_of(), now())
    assert how.condition is Condition.FILTERING
    assert how.filtering
    assert how.at_work
    assert str(how) == "filtering"


def fell(index: int, state: State = State.BACKOFF) -> Callable[[Guard], None]:
    return lambda guard: setattr(guard.children[index], "state", state)


def set_to(name: str, value: object) -> Callable[[Guard], None]:
    return lambda guard: setattr(guard, name, value)


def capped(*rules: str) -> Callable[[Guard], None]:
    def cap(guard: Guard) -> None:
        guard.ruleset = replace(guard.ruleset, capped=frozenset(rules))

    return cap


def both(*changes: Callable[[Guard], None]) -> Callable[[Guard], None]:
    def all_of_them(guard: Guard) -> None:
        for change in changes:
            change(guard)

    return all_of_them


@pytest.mark.parametrize(
    ("change", "condition", "says"),
    [
        (fell(0), DEGRADED, "the worker (queue 0) does not serve (it is started again"),
        (fell(2), DEGRADED, "the sweeper does not serve"),
        (fell(2, State.STARTING), DEGRADED, "the sweeper does not serve (starting)"),
        (both(fell(0), fell(1)), NOT, "no worker serves"),
        (set_to("missing", ("the chain x",)), NOT, "missing: the chain x"),
        (set_to("unmatched", "nothing can match: …"), NOT, "nothing can match: …"),
        (set_to("diverts", False), NOT, "the guard is starting"),
        (set_to("panic", True), DEGRADED, "panic: all traffic passes"),
        (both(set_to("panic", True), fell(0), fell(1)), DEGRADED, "panic: all traffic passes"),
        (
            capped("a", "b"),
            DEGRADED,
            "CAPPED: rule a banned sources of more than 1000 networks",
        ),
        (set_to("unplaced_at", 0.0), DEGRADED, "bans could not be placed in the last minute"),
        (set_to("unjudged_at", 0.0), DEGRADED, "packets passed unjudged in the last minute"),
        (set_to("overload", {7: Level.THINNED}), DEGRADED, "a worker is overrun and sheds load"),
        (set_to("crowded", "the connection table is full"), DEGRADED, "the connection table is"),
        (set_to("memory", lambda: "the disk is full"), DEGRADED, "the disk is full"),
    ],
)
async def test_what_can_be_wrong(
    change: Callable[[Guard], None], condition: Condition, says: str
) -> None:
    guard = guard_of()
    change(guard)
    how = health(guard, now())
    assert how.condition is condition
    assert how.problems[0].startswith(says)
    assert str(how).startswith(f"{condition.value}: {says}")
    assert not how.filtering


async def test_a_worker_that_is_silent_does_not_filter() -> None:
    guard = guard_of()
    await asyncio.sleep(2)
    guard.workers[1].forgive()
    how = health(guard, now())
    assert how == (DEGRADED, ("the worker (queue 0) has been silent for 2 s",))
    await asyncio.sleep(2)
    assert health(guard, now()).condition is NOT


async def test_what_is_over_is_told_for_a_minute() -> None:
    guard = guard_of()
    guard.unplaced_at = guard.unjudged_at = now()
    await asyncio.sleep(RECENT)
    for child in guard.children:
        child.forgive()
    assert health(guard, now()).filtering


async def test_the_worst_comes_first_and_nothing_is_left_out() -> None:
    guard = guard_of()
    guard.missing = "a jump", "a set"
    capped("a")(guard)
    fell(2)(guard)
    how = health(guard, now())
    assert how.problems[2].startswith("CAPPED: rule a banned")
    assert how == (
        NOT,
        (
            "missing: a jump",
            "missing: a set",
            how.problems[2],
            "the sweeper does not serve (it is started again and again)",
        ),
    )
