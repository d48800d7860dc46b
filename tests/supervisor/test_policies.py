"""A policy applied, confirmed, rolled back and remembered: no processes, no kernel, no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.state.record import Record
from rstguard.supervisor.change import Change, Follower
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.policies import Policies
from rstguard.supervisor.protected import Protected
from tests.supervisor.parts import guard_of, policy
from tests.support.fake_kernel import FakeKernel


class Site:
    """The policies of a guard; changes are refused at will."""

    def __init__(self, directory: Path, first: str = "first") -> None:
        kernel = FakeKernel()
        self.guard: Guard = guard_of(policy(first))
        self.record = Record(directory, kernel.sets)
        self.refused = 0
        protected = Protected(kernel, self.guard)
        change = Change(self.guard, protected, [Follower("rules", self._follow)])
        self.policies = Policies(self.guard, change, self.record, protected)

    async def _follow(self, _old: RuleSet, _new: RuleSet) -> None:
        if self.refused:
            self.refused -= 1
            raise KernelError("not now")

    async def ask(self, command: str, **request: Any) -> Any:
        """Carry out a command."""
        return await self.policies.commands[command](
            {"command": command, "account": "root", **request}
        )

    async def apply(self, name: str, confirm_s: int | None = None) -> Any:
        """Apply a policy."""
        text = policy(name).text
        return await self.ask("policy-apply", name=f"{name}.yaml", text=text, confirm_s=confirm_s)

    async def history(self) -> list[tuple[str, str]]:
        """Return what was in force, newest first, and what became of it."""
        return [(row["name"], row["state"]) for row in await self.ask("policy-history")]

    def in_force(self) -> str:
        """The name of the policy in force."""
        assert self.guard.loaded.policy.name == self.guard.ruleset.name
        return self.guard.ruleset.name


@asynccontextmanager
async def site(directory: Path, first: str = "first") -> AsyncIterator[Site]:
    made = Site(directory, first)
    await made.record.open()
    await made.policies.begin()
    watching = asyncio.create_task(made.policies.watch())
    try:
        yield made
    finally:
        watching.cancel()
        await made.record.close()


async def test_one_after_the_other_and_back(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second")
        await here.apply("third")
        assert here.in_force() == "third"
        assert await here.history() == [("third", "kept"), ("second", "kept"), ("first", "kept")]
        await here.ask("policy-rollback")
        assert here.in_force() == "second"
        assert ("third", "undone") in await here.history()


async def test_what_nobody_confirms_rolls_back(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=60)
        assert round(here.policies.waits_s or 0) == 60
        await asyncio.sleep(59)
        assert here.in_force() == "second"
        await asyncio.sleep(2)
        assert here.in_force() == "first"
        assert here.policies.waits_s is None
        assert (await here.history())[1] == ("second", "undone")


async def test_a_way_back_that_is_refused_is_tried_until_it_succeeds(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=10)
        here.refused = 3
        await asyncio.sleep(11.5)
        assert here.in_force() == "second"
        assert here.policies.waits_s == 0
        await asyncio.sleep(5)
        assert here.in_force() == "first"


async def test_a_confirmed_one_stays(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=60)
        await here.ask("policy-confirm")
        await asyncio.sleep(100)
        assert here.in_force() == "second"
        with pytest.raises(ControlError, match="no policy waits"):
            await here.ask("policy-confirm")


async def test_what_is_applied_while_another_waits_goes_back_to_the_last_good_one(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=60)
        await asyncio.sleep(30)
        await here.apply("third", confirm_s=60)
        await asyncio.sleep(40)
        assert here.in_force() == "third"
        await asyncio.sleep(30)
        assert here.in_force() == "first"


async def test_a_refused_one_changes_nothing(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=60)
        here.refused = 1
        with pytest.raises(ControlError, match="the old one stays"):
            await here.apply("third")
        assert here.in_force() == "second"
        assert round(here.policies.waits_s or 0) == 60  # and it still waits
        assert [name for name, _ in await here.history()] == ["second", "first"]


async def test_one_that_was_not_confirmed_does_not_return_by_a_restart(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.apply("second", confirm_s=60)
    async with site(tmp_path, "second") as here:
        assert here.guard.loaded.policy.name == "first"


@pytest.mark.parametrize("wait", [0, 3601, "60", 1.5, True])
async def test_waits_that_are_none(tmp_path: Path, wait: object) -> None:
    async with site(tmp_path) as here:
        with pytest.raises(ControlError, match="waits 1 to 3600 seconds"):
            await here.ask("policy-apply", name="x", text="", confirm_s=wait)


async def test_a_text_that_is_no_policy(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        with pytest.raises(ControlError, match=r"bad\.yaml:1:1"):
            await here.ask("policy-apply", name="bad.yaml", text="version: 2")
        with pytest.raises(ControlError, match="lacks 'text'"):
            await here.ask("policy-apply", name="bad.yaml")
        assert here.in_force() == "first"


async def test_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        with pytest.raises(ControlError, match="no earlier policy"):
            await here.ask("policy-rollback")


async def test_the_policy_in_force_is_in_a_history_that_begins_late(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.write_text("not a directory yet")
    async with site(directory) as here:
        keeping = asyncio.create_task(here.record.keep())
        await here.apply("second")
        assert await here.history() == []
        directory.unlink()
        await asyncio.sleep(120)
        assert (await here.history())[0] == ("second", "kept")
        keeping.cancel()
