"""Sysctls that others change are put back and told, without a fight: on a fake kernel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rstguard.kernel.footprint import Footprint
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import Condition
from rstguard.supervisor.settings import Settings
from tests.supervisor.parts import condition_of, guard_of, kinds
from tests.support.fake_kernel import FakeKernel

ACCT = "net.netfilter.nf_conntrack_acct"


class Site:
    """A guard's sysctls on a kernel that only remembers."""

    def __init__(self, directory: Path) -> None:
        self.kernel = FakeKernel()
        self.guard: Guard = guard_of()
        self.footprint = Footprint(self.kernel, directory, range(5640, 5641))
        self.settings = Settings(self.guard, self.footprint)
        self.footprint.prepare(self.guard.ruleset)
        self.settings.tell_start()

    def condition(self) -> Condition:
        return condition_of(self.guard)


@asynccontextmanager
async def site(directory: Path) -> AsyncIterator[Site]:
    made = Site(directory)
    watching = asyncio.ensure_future(made.settings.watch())
    try:
        yield made
    finally:
        watching.cancel()


async def test_what_the_start_changes_is_named(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        told = {str(event["subject"]): event["detail"] for event in here.guard.events.recent(9)}
        assert "set to 1 (was 0) so that bytes of connections are counted" in str(told[ACCT])
        assert kinds(here.guard) == ["sysctl"] * len(told)


async def test_what_another_program_sets_is_put_back_and_told(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        before = len(kinds(here.guard))
        here.kernel.sysctls[ACCT] = "0"
        await asyncio.sleep(2.1)
        assert here.kernel.sysctls[ACCT] == "1"
        assert kinds(here.guard)[before:] == ["restored"]
        assert ACCT in str(here.guard.events.recent(1)[0]["detail"])
        assert here.condition() is Condition.FILTERING
        here.footprint.remove()
        assert here.kernel.sysctls[ACCT] == "0"


async def test_it_does_not_fight_and_says_degraded(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for _ in range(300):
            here.kernel.sysctls[ACCT] = "0"
            await asyncio.sleep(2)
        assert kinds(here.guard).count("restored") < 12
        assert kinds(here.guard).count("conflict") == 1
        assert here.condition() is Condition.DEGRADED


async def test_one_that_cannot_be_put_back_is_tried_again(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.sysctls[ACCT] = "0"
        here.kernel.faults.fail("write_sysctl", naming=ACCT, times=2)
        await asyncio.sleep(3)
        assert here.condition() is Condition.DEGRADED
        await asyncio.sleep(10)
        assert here.condition() is Condition.FILTERING
        assert here.kernel.sysctls[ACCT] == "1"
