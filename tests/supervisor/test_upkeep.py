"""Rules that others take away come back, and the panic switch is obeyed: on a fake kernel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SynBudget
from rstguard.engine.service import Service
from rstguard.kernel import KernelError, Undone
from rstguard.kernel.footprint import Footprint
from rstguard.state.record import Record
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import Condition
from rstguard.supervisor.upkeep import PANIC_NAME, Upkeep
from tests.supervisor.parts import condition_of, guard_of, kinds
from tests.support.fake_kernel import FakeKernel

QUEUES = range(5640, 5642)


class Site:
    """The rules of a guard on a kernel that only remembers."""

    def __init__(self, directory: Path) -> None:
        self.kernel = FakeKernel()
        self.guard: Guard = guard_of()
        self.footprint = Footprint(self.kernel, directory, QUEUES)
        self.record = Record(directory / "state", self.kernel.sets)
        self.upkeep = Upkeep(self.kernel, self.guard, self.footprint, self.record, directory)
        self.panic_file = directory / PANIC_NAME

    def present(self) -> bool:
        """Whether all rules and sets are in the kernel, whatever the guard believes."""
        return not self.footprint.lost(self.guard.ruleset)

    def condition(self) -> Condition:
        """Return how the guard is, with processes that all work."""
        return condition_of(self.guard)


@asynccontextmanager
async def site(directory: Path) -> AsyncIterator[Site]:
    made = Site(directory)
    made.footprint.prepare(made.guard.ruleset)
    await made.record.open()
    await made.upkeep.begin()
    async with asyncio.TaskGroup() as tasks:
        watching = [
            tasks.create_task(work)
            for work in (made.upkeep.watch_rules(), made.upkeep.watch_panic())
        ]
        try:
            yield made
        finally:
            for task in watching:
                task.cancel()
    await made.record.close()


async def test_what_is_in_place_is_left_alone(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await asyncio.sleep(60)
        assert here.present()
        assert here.condition() is Condition.FILTERING
        assert kinds(here.guard) == []


async def test_what_another_program_flushed_comes_back_and_is_told(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.flush_all()
        await here.upkeep.look(1)
        assert here.condition() is Condition.NOT_FILTERING
        await asyncio.sleep(2.1)
        assert here.present()
        assert here.condition() is Condition.FILTERING
        assert kinds(here.guard) == ["restored"]


async def test_a_kernel_that_refuses_is_tried_again(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.flush_all(4)
        here.kernel.faults.fail("run", naming="iptables-restore", times=2)
        await asyncio.sleep(3)
        assert not here.present()
        assert here.condition() is Condition.NOT_FILTERING
        assert "restored" not in kinds(here.guard)
        await asyncio.sleep(10)
        assert here.present()
        assert kinds(here.guard) == ["restored"]


async def test_it_does_not_fight(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for _ in range(300):
            here.kernel.flush_all()
            await asyncio.sleep(2)
        assert kinds(here.guard).count("restored") < 12
        assert kinds(here.guard).count("conflict") == 1
        await asyncio.sleep(600)
        assert here.present()


async def test_who_takes_rules_away_before_they_are_looked_at_is_told_of(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.flush_all()
        here.kernel.faults.fail("run", Undone("at once"), None, naming="iptables-restore")
        await asyncio.sleep(30)
        assert kinds(here.guard) == ["conflict"]
        assert here.condition() is Condition.NOT_FILTERING


async def test_panic_is_told_though_it_ends_a_second_later(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.panic_file.touch()
        await asyncio.sleep(0.3)
        assert here.condition() is Condition.DEGRADED
        assert not any("rstguard" in text for text in rules_of(here.kernel))
        await asyncio.sleep(0.7)
        here.panic_file.unlink()
        await asyncio.sleep(0.3)
        assert here.present()
        assert here.condition() is Condition.FILTERING
        said = [(event["kind"], event["detail"]) for event in here.guard.events.recent(9)]
        assert said == [
            ("panic", "all traffic passes"),
            ("panic", "the guard is at work again"),
        ]


def rules_of(kernel: FakeKernel) -> list[str]:
    return [kernel.run([f"{command}-save"]) for command in ("iptables", "ip6tables")]


async def test_a_panic_that_iptables_refuses_is_told_at_once_and_tried_again(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as here:
        here.kernel.faults.fail("run", naming="iptables-restore", times=3)
        here.panic_file.touch()
        await asyncio.sleep(0.3)
        assert here.guard.panic
        await asyncio.sleep(2)
        assert not any("rstguard" in text for text in rules_of(here.kernel))
        assert kinds(here.guard) == ["panic"]


async def test_a_guard_that_starts_in_panic_diverts_nothing(tmp_path: Path) -> None:
    (tmp_path / PANIC_NAME).touch()
    async with site(tmp_path) as here:
        assert not any("rstguard" in text for text in rules_of(here.kernel))
        assert here.condition() is Condition.DEGRADED


async def test_a_panic_file_of_another_user_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(tmp_path) as here:
        here.panic_file.touch()
        here.panic_file.chmod(0o666)
        with caplog.at_level(logging.ERROR):
            await asyncio.sleep(1)
        assert here.present()
        assert not here.guard.panic
        assert caplog.text.count("not a file that only root may write") == 1


async def test_an_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.host.interfaces = ["lo", "enp3s0"]
        await here.upkeep.look(1)
        assert here.condition() is Condition.NOT_FILTERING
        assert "no interface here is called eth0 (there are lo, enp3s0)" in here.guard.unmatched
        here.kernel.host.interfaces = ["lo", "eth0"]
        await asyncio.sleep(3)
        assert here.condition() is Condition.FILTERING


async def test_rules_for_what_was_learned_are_not_missed_before_they_are_placed(
    tmp_path: Path,
) -> None:
    """A look that is under way when a server's offer is learned knows nothing of it yet."""
    async with site(tmp_path) as here:
        budgeted = replace(here.guard.ruleset, syn_budget=SynBudget(300, None))
        here.footprint.replace(here.guard.ruleset, budgeted)
        here.guard.ruleset = budgeted
        learned = {
            Service(parse_address("203.0.113.10"), 80): Offer(1460, 7, sack=True, timestamps=True)
        }
        async with here.guard.changing:
            rewriting = asyncio.create_task(here.upkeep.rewrite(learned))
            await asyncio.sleep(0.1)
            assert here.footprint.lost(here.guard.ruleset) == []
        await rewriting
        assert here.footprint.known == learned
        assert here.present()
        here.kernel.faults.fail("run", KernelError("no memory"), None, naming="restore")
        with pytest.raises(KernelError):
            await here.upkeep.rewrite({})
        here.kernel.faults.clear()
        assert here.footprint.known == learned
