"""A connection table that is full is told of, and told no more when it has room."""

from __future__ import annotations

import asyncio

from rstguard.kernel.seam import Lost
from rstguard.supervisor.fullness import TOLD_SECONDS, Fullness
from rstguard.supervisor.health import Condition
from tests.supervisor.parts import condition_of, guard_of, kinds
from tests.support.fake_kernel import FakeKernel


async def test_a_full_table_is_degraded_until_there_is_room_for_a_minute() -> None:
    guard, kernel = guard_of(), FakeKernel()
    fullness = Fullness(kernel, guard)
    await fullness.look()
    assert condition_of(guard) is Condition.FILTERING
    kernel.connections.more = 260_000
    await fullness.look()
    assert condition_of(guard) is Condition.DEGRADED
    assert "full: 260000 of 262144 entries (99 %)" in guard.crowded
    kernel.connections.more = 100
    await fullness.look()
    assert condition_of(guard) is Condition.DEGRADED
    await asyncio.sleep(TOLD_SECONDS)
    await fullness.look()
    assert condition_of(guard) is Condition.FILTERING
    assert kinds(guard) == ["table_full"]
    kernel.connections.lost = Lost(early_drop=1)
    await fullness.look()
    assert condition_of(guard) is Condition.DEGRADED
    assert kinds(guard) == ["table_full", "table_full"]
