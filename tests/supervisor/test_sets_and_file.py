"""Bans in the sets, in the file and in the events: they agree, whatever others do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rstguard.engine.address import parse_prefix
from rstguard.kernel.elements import Element
from rstguard.kernel.footprint import Footprint
from rstguard.state.record import Record
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.upkeep import Upkeep
from tests.supervisor.parts import guard_of, kinds
from tests.support.fake_kernel import FakeKernel

SOURCE = parse_prefix("198.51.100.7")


class Parts:
    """The parts that have to do with bans, on a kernel that only remembers."""

    def __init__(self, directory: Path) -> None:
        self.kernel = FakeKernel()
        self.guard: Guard = guard_of()
        self.record = Record(directory, self.kernel.sets, lambda: 1_800_000_000.0)
        self.footprint = Footprint(self.kernel, directory, range(5640, 5642))
        unused: Any = None
        self.bans = Bans(self.kernel, self.guard, self.record, unused)
        self.upkeep = Upkeep(self.kernel, self.guard, self.footprint, self.record, directory)

    def blocked(self) -> dict[str, int | None]:
        """Return who is blocked, and for how long."""
        with self.kernel.sets() as sets:
            return {str(one.source): one.remaining for one in sets.list()}


@asynccontextmanager
async def at_work(directory: Path) -> AsyncIterator[Parts]:
    parts = Parts(directory)
    await parts.record.open()
    parts.footprint.prepare(parts.guard.ruleset)
    parts.footprint.divert(parts.guard.ruleset)
    keeping = asyncio.create_task(parts.record.keep())
    watching = asyncio.create_task(parts.upkeep.watch_rules())
    yield parts
    for task in (keeping, watching):
        task.cancel()
    await parts.record.close()


async def test_bans_come_back_that_another_program_emptied_out_of_their_set(tmp_path: Path) -> None:
    async with at_work(tmp_path) as parts:
        await parts.bans.add(SOURCE, 600, keep_existing=False)
        await asyncio.sleep(3)
        parts.kernel.run(["ipset", "flush", "rstguard-ban4"])
        assert parts.blocked() == {}
        await asyncio.sleep(3)
        assert list(parts.blocked()) == ["198.51.100.7"]
        assert kinds(parts.guard)[-1] == "restored"


async def test_a_ban_that_is_lifted_while_all_come_back_does_not_return(tmp_path: Path) -> None:
    async with at_work(tmp_path) as parts:
        await parts.bans.add(SOURCE, 600, keep_existing=False)
        await asyncio.gather(parts.record.bring_back(), parts.bans.remove(SOURCE))
        assert parts.blocked() == {}


async def test_a_ban_that_is_only_remembered_is_lifted_too_and_that_is_told(tmp_path: Path) -> None:
    async with at_work(tmp_path) as parts:
        await parts.bans.add(SOURCE, 600, keep_existing=False)
        parts.kernel.run(["ipset", "flush", "rstguard-ban4"])
        assert await parts.bans.remove(SOURCE)
        assert kinds(parts.guard)[-1] == "unban"


async def test_a_ban_by_hand_takes_the_place_of_a_longer_one_in_another_set(tmp_path: Path) -> None:
    async with at_work(tmp_path) as parts:
        await parts.bans.add(SOURCE, 3600, keep_existing=False)
        await parts.bans.add(SOURCE, 60, keep_existing=True)
        assert parts.blocked() == {"198.51.100.7": 60}
        assert [one.remaining for one in await parts.bans.listed()] == [60]


async def test_a_list_shortens_no_ban(tmp_path: Path) -> None:
    async with at_work(tmp_path) as parts:
        await parts.bans.add(SOURCE, 3600, keep_existing=False)
        await parts.bans.add_list([Element(SOURCE, "ban", "imported", 60)])
        assert parts.record.store is not None
        assert [one.remaining for one in parts.record.store.blocks()] == [3600]
