"""The life of one process, its states and their reasons: played processes, virtual time."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from rstguard.ipc.messages import Counts, Failed, NewPolicy, Ready, Start, Stop
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from rstguard.supervisor.child import READY_SECONDS, Child, StartFailed, State
from tests.supervisor.children import Played, Stage, Told, obedient

POLICY = "version: 1\nname: p\nprotect: {interfaces: [eth0]}\nrules: []\n"
RULESET = compile_policy(parse(POLICY, "p").policy)
START = Start(RULESET, 5640)


@asynccontextmanager
async def living(
    stage: Stage, kind: str = "worker", on_start: Callable[[Played], None] = obedient
) -> AsyncIterator[tuple[Child, Told]]:
    told, heard = Told(), list[object]()
    stage.on_start = on_start
    child = Child(
        kind, "worker" if kind == "worker" else "sweeper", stage.spawn, None,
        lambda: [START], heard.append, told,
    )  # fmt: skip
    life = asyncio.create_task(child.live())
    try:
        yield child, told
    finally:
        await child.stop()
        await life


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> float:
    """Wait for a condition; return how long that took in virtual time."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not condition():
        assert loop.time() - began < seconds, "it does not come true"
        await asyncio.sleep(0.001)
    return loop.time() - began


async def test_it_starts_serves_and_stops_and_each_is_told() -> None:
    stage = Stage()
    async with living(stage) as (child, told):
        await child.wait_served()
        assert child.serves
        assert child.pid == stage.last.pid
    assert told == [("starting", ""), ("serving", ""), ("stopped", "")]
    assert child.state is State.STOPPED
    assert stage.last.status == 0


def is_back(child: Child, restarts: int) -> bool:
    return child.serves and child.restarts == restarts


def silent(_: Played) -> None:
    """A process that says nothing by itself."""


@pytest.mark.parametrize("how", ["dies", "fails", "cannot be had"])
async def test_at_the_guards_start_it_is_an_error(how: str) -> None:
    stage = Stage()
    if how == "cannot be had":
        stage.refusals.append(OSError(errno.EAGAIN, "Resource temporarily unavailable"))
    async with living(stage, on_start=silent) as (child, told):
        if how != "cannot be had":
            await until(lambda: bool(stage.all))
        if how == "fails":
            stage.last.say(Failed("queue 5640 is taken"))
        if how != "cannot be had":
            stage.last.end(1)
        with pytest.raises(StartFailed) as raised:
            await child.wait_served()
    assert str(raised.value) == {
        "dies": "the worker ended with status 1 before it could serve",
        "fails": "queue 5640 is taken",
        "cannot be had": (
            "the worker could not be started (Resource temporarily unavailable) before it could "
            "serve"
        ),
    }[how]  # fmt: skip
    assert told.states[-1] == "failed"
    assert len(stage.all) == (how != "cannot be had")


@pytest.mark.parametrize("how", ["dies", "fails", "hangs"])
async def test_a_successor_that_never_serves_is_followed_by_others(how: str) -> None:
    """It died before it was ready and nobody started another, for ever, and nobody was told."""
    stage = Stage()
    async with living(stage) as (child, told):
        await child.wait_served()
        stage.on_start = silent
        stage.last.kill()
        for count in range(2, 6):
            await until(lambda count=count: len(stage.all) == count)  # type: ignore[misc]
            if how == "fails":
                stage.last.say(Failed("queue 5640 is taken"))
            if how != "hangs":
                stage.last.end(1)
        stage.on_start = obedient
        await until(lambda: child.serves)
    reasons = [reason for state, reason in told if state == "backoff"]
    assert reasons[0] == "was ended by SIGKILL; started again"
    assert {
        "dies": "ended with status 1; started again",
        "fails": "queue 5640 is taken; started again",
        "hangs": f"was not ready after {READY_SECONDS:.0f} s; started again",
    }[how] in reasons[1]  # fmt: skip
    assert child.restarts == len(stage.all) - 1


async def test_no_process_or_descriptor_is_to_be_had_for_a_while() -> None:
    stage = Stage()
    async with living(stage) as (child, told):
        await child.wait_served()
        stage.refusals += [OSError(errno.EMFILE, "Too many open files")] * 9
        stage.last.kill()
        took = await until(lambda: child.restarts == 10 and child.serves)
        assert took < 4
    assert [state for state, reason in told if "could not be started (Too many" in reason] == (
        ["backoff"] * 9
    )


async def test_the_wait_grows_and_ends_with_calm() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        waits = []
        for count in range(1, 9):
            stage.last.kill()
            again = partial(is_back, child, count)
            waits.append(round(await until(again), 1))
        assert waits == [0, 0, 0, 0.1, 0.2, 0.4, 0.5, 0.5]
        await asyncio.sleep(11)
        stage.last.kill()
        assert await until(partial(is_back, child, 9)) < 0.05


async def test_what_goes_on_for_a_minute_is_tried_less_often() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        stage.on_start = lambda one: one.end(1)
        stage.last.kill()
        await asyncio.sleep(60)
        within_a_minute = len(stage.all)
        await asyncio.sleep(60)
        assert within_a_minute > 100
        assert len(stage.all) - within_a_minute < 20


async def test_one_that_serves_now_and_then_is_not_kept_waiting_for_long() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        for count in range(1, 200):
            stage.last.kill()
            assert await until(partial(is_back, child, count)) < 0.6


async def test_one_that_falls_silent_is_noticed_and_killed() -> None:
    stage = Stage()
    async with living(stage) as (child, told):
        await child.wait_served()
        await asyncio.sleep(4.9)
        assert child.overdue() == 0
        await asyncio.sleep(0.2)
        patience = child.overdue()
        assert patience == 5
        child.end(f"sent nothing for {patience:.0f} s")
        await until(lambda: len(stage.all) == 2 and child.serves)
    assert ("backoff", "sent nothing for 5 s; started again") in told


async def test_a_supervisor_that_was_stopped_itself_reads_before_it_judges() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        loop = asyncio.get_running_loop()
        loop.remove_reader(stage.last.ours.fileno())  # nobody listens, and the time passes
        stage.last.say(Counts({"packets": 7}))
        await asyncio.sleep(100)
        assert child.silent_for() > 99
        assert child.overdue() == 0
        assert child.totals["packets"] == 7


async def test_counts_of_the_dead_are_kept() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        stage.last.say(Counts({"packets": 7, "flows": 100}))
        await until(lambda: child.totals["packets"] == 7)
        stage.last.kill()
        await until(lambda: child.restarts == 1 and child.serves)
        stage.last.say(Counts({"packets": 1, "flows": 90}))
        await until(lambda: child.totals["packets"] == 8)
        assert child.totals["flows"] == 90  # as it is now, no sum


async def test_a_policy_is_adopted() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        first, second = (child.adopt(NewPolicy(RULESET, number), 10) for number in (1, 2))
        await asyncio.gather(first, second)
        assert asyncio.get_running_loop().time() < 1


async def test_a_policy_is_adopted_by_the_successor_if_the_process_dies_of_it() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        asyncio.get_running_loop().remove_reader(stage.last.theirs.fileno())  # it does not obey
        adopting = asyncio.create_task(child.adopt(NewPolicy(RULESET, 1), 10))
        await until(lambda: any(isinstance(one, NewPolicy) for one in stage.last.listen()))
        assert not adopting.done()
        stage.last.end(1)
        await adopting
        assert child.serves


async def test_one_that_hangs_does_not_adopt() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        asyncio.get_running_loop().remove_reader(stage.last.theirs.fileno())
        with pytest.raises(TimeoutError):
            await child.adopt(NewPolicy(RULESET, 1), 10)
        stage.last.kill()


async def test_a_policy_does_not_wait_for_one_that_is_not_there() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        stage.on_start = lambda one: one.end(1)
        stage.last.kill()
        await until(lambda: child.state is State.BACKOFF and child.restarts > 4)
        began = asyncio.get_running_loop().time()
        await child.adopt(NewPolicy(RULESET, 1), 10)
        assert asyncio.get_running_loop().time() - began < 1


async def test_a_policy_reaches_one_that_was_started_with_the_old_one() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        stage.on_start = silent
        stage.last.kill()
        await until(lambda: child.state is State.STARTING)
        await child.adopt(NewPolicy(RULESET, 7), 10)
        heard = stage.last.listen()
        assert [type(one) for one in heard] == [Start, NewPolicy]
        obedient(stage.last)
        stage.last.say(Ready(0))


async def test_one_that_does_not_stop_is_killed() -> None:
    stage = Stage()
    async with living(stage, on_start=silent) as (child, told):
        await until(lambda: bool(stage.all))
        stage.last.say(Ready(0))
        await child.wait_served()
    assert stage.last.status == -9
    assert told.states == ["starting", "serving", "stopped"]


async def test_it_stops_while_it_waits_to_be_started_again() -> None:
    stage = Stage()
    async with living(stage) as (child, told):
        await child.wait_served()
        stage.on_start = lambda one: one.end(1)
        stage.last.kill()
        await until(lambda: child.restarts > 6)
    assert told.states[-1] == "stopped"


async def test_a_message_to_one_that_just_died_is_no_error() -> None:
    stage = Stage()
    async with living(stage) as (child, _):
        await child.wait_served()
        stage.last.kill()
        child.send(Stop())
