"""Who is never banned: looked at again and again, whatever else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rstguard.engine.address import parse_prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.kernel.protected import ProtectedAddress
from rstguard.supervisor.protected import LOOK_SECONDS, Protected
from tests.supervisor.parts import guard_of
from tests.support.fake_kernel import FakeKernel


async def test_a_change_that_has_to_wait_puts_off_no_later_look() -> None:
    kernel, guard = FakeKernel(), guard_of()
    protected = Protected(kernel, guard)
    changes = 0

    async def change(within: Callable[[RuleSet], RuleSet]) -> None:
        nonlocal changes
        changes += 1
        await asyncio.sleep(60)  # another change goes on
        guard.ruleset = within(guard.ruleset)

    watching = asyncio.create_task(protected.watch(change))
    for index, address in enumerate(("192.0.2.1/32", "192.0.2.2/32"), 1):
        kernel.host.protected.append(ProtectedAddress(parse_prefix(address), "a next hop"))
        await asyncio.sleep(60 + 3 * LOOK_SECONDS)
        assert changes == index
        assert parse_prefix(address) in guard.ruleset.scope.protected
    watching.cancel()
