"""Other programs on the gateway, which think themselves alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from rstguard.kernel.names import BLOCK_SETS
from tests.simulation.ledger import Ledger
from tests.simulation.world import World

_BAN_SETS: Final = BLOCK_SETS


class OtherPrograms:
    """Each of the acts takes something of the guard's away, or comes in its way."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self._world, self._ledger = world, ledger
        self.rng = random.Random(world.rng.random())
        self._between: Callable[[], object] | None = None
        self.emptied = False
        """Whether bans were taken that only their number betrays."""
        world.kernel.between = self._meanwhile

    def _meanwhile(self, operation: str) -> None:
        """Other programs act between two operations of the guard, too."""
        if self._between is not None and operation == "run":
            act, self._between = self._between, None
            act()

    async def _disturb(self, act: Callable[[], object], what: str) -> None:
        def done() -> None:
            self._world.note(f"another program: {what}")
            act()

        if self.rng.random() < 0.3:
            self._between = done
        else:
            done()
        await asyncio.sleep(0)

    async def flush(self) -> None:
        family = self.rng.choice((None, 4, 6))
        await self._disturb(lambda: self._world.kernel.flush_all(family), "flushes all rules")

    async def delete_jump(self) -> None:
        place = self.rng.choice(
            (("mangle", "PREROUTING"), ("raw", "PREROUTING"), ("filter", "FORWARD"))
        )
        await self._disturb(lambda: self._world.kernel.delete_jump(4, *place), "deletes a jump")

    async def insert_rule(self) -> None:
        await self._disturb(
            lambda: self._world.kernel.insert_rule_before(
                4, "mangle", "PREROUTING", "-i lo -j ACCEPT"
            ),
            "inserts a rule before ours",
        )

    async def empty_set(self) -> None:
        names = [name for name in self._world.kernel.ipsets.names if name.startswith("rstguard")]
        if names:
            name = self.rng.choice((*names, *_BAN_SETS))
            await self._disturb(lambda: self._empty(name), f"empties {name}")

    def _empty(self, name: str) -> None:
        if name in self._world.kernel.ipsets.names:
            self.emptied = True
            if name in _BAN_SETS:
                self._ledger.excuse_fragile()
            self._world.kernel.ipsets.get(name).members.clear()

    async def destroy_sets(self) -> None:
        """Rules flushed, all sets destroyed."""

        def act() -> None:
            self._world.kernel.flush_all()
            self.emptied = True
            self._ledger.excuse_fragile()
            for name in list(self._world.kernel.ipsets.names):
                self._world.kernel.destroy_set(name)

        await self._disturb(act, "flushes all rules and destroys all sets")
