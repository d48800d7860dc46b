"""The guard in hundreds of simulated gateways, and what the simulation is worth."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.observe.events import Event
from rstguard.supervisor.capped import Capped
from rstguard.supervisor.child import Child, State
from rstguard.supervisor.supervisor import Supervisor
from tests.simulation.runner import run

SEEDS = 300
_SHOW = "from tests.simulation.runner import run; print(*run({seed}).log, sep='\\n')"


def problem_of(seed: int) -> str:
    """Return what is wrong in the world of a seed, or ""."""
    outcome = run(seed)
    again = f"seed {seed}: {outcome.problem}; again with: SEED={seed} make simulate"
    return again if outcome.problem else ""


def found(patch: Callable[[pytest.MonkeyPatch], None]) -> str:
    """Return the first problem that the seeds find in a guard with a defect, or ""."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        cores = os.cpu_count() or 1
        with ProcessPoolExecutor(cores, get_context("fork")) as pool:
            for at in range(1, SEEDS + 1, 4 * cores):
                for problem in pool.map(problem_of, range(at, min(at + 4 * cores, SEEDS + 1))):
                    if problem:
                        return problem
    return ""


@pytest.mark.timeout(900)
def test_all_invariants_hold_in_every_world() -> None:
    with ProcessPoolExecutor(os.cpu_count() or 1, get_context("fork")) as pool:
        problems = [one for one in pool.map(problem_of, range(1, SEEDS + 1), chunksize=10) if one]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("seed", [1, 7, 28])
def test_the_same_seed_is_the_same_world(seed: int) -> None:
    """Whatever the order of sets, the numbers of descriptors and the addresses of objects."""
    logs = []
    for hashes in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _SHOW.format(seed=seed)],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        )
        logs.append(done.stdout)
    assert logs[0].count("\n") > 20
    assert logs[0] == logs[1]


def no_second_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before it is ready, at a restart, is not started again."""
    become = Child._become

    def stays_away(self: Child, state: State, reason: str) -> None:
        before = self.state
        become(self, state, reason)
        if state is State.BACKOFF and before is State.STARTING:
            self._spawn = None  # type: ignore[assignment]

    live = Child.live

    async def lives(self: Child) -> None:
        try:
            await live(self)
        except TypeError:  # there is no second start
            await self._stopping.wait()

    monkeypatch.setattr(Child, "_become", stays_away)
    monkeypatch.setattr(Child, "live", lives)


def early_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a rule is capped is announced before it is true, and is not tried again."""

    async def put(self: Capped, rule: str, capped: bool) -> None:
        self._guard.events.add(Event("capped" if capped else "rearmed", rule, rule))
        self._restless[rule] = asyncio.get_running_loop().time()

        def change(now: RuleSet) -> RuleSet:
            return replace(now, capped=now.capped | {rule} if capped else now.capped - {rule})

        with contextlib.suppress(ControlError):
            await self._change.rules(change)

    monkeypatch.setattr(Capped, "_put", put)


def unheard_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a background task fails on is heard by nobody, and the guard goes on."""
    work = Supervisor._work

    class Group(asyncio.TaskGroup):
        def create_task(self, coro: Any, **more: Any) -> asyncio.Task[Any]:
            return super().create_task(_swallowing(coro), **more)

    async def works(self: Supervisor, answer: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(asyncio, "TaskGroup", Group)
            await work(self, answer)

    monkeypatch.setattr(Supervisor, "_work", works)


async def _swallowing(coroutine: Coroutine[Any, Any, Any]) -> None:
    from rstguard.supervisor.supervisor import _Stopped

    try:
        await coroutine
    except _Stopped:
        raise
    except Exception:  # noqa: BLE001, S110 - the defect
        pass


@pytest.mark.timeout(900)
@pytest.mark.parametrize("defect", [no_second_start, early_cap, unheard_failures])
def test_a_defect_that_was_there_once_is_found(
    defect: Callable[[pytest.MonkeyPatch], None],
) -> None:
    assert found(defect), f"{SEEDS} seeds do not find this: {defect.__doc__}"
