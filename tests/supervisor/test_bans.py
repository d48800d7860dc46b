"""Bans: noted, placed and lifted; rules that ban too many are capped, and networks gated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rstguard.engine.address import parse_prefix
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Blocked
from rstguard.kernel import Full, KernelError, ipset
from rstguard.kernel.elements import Element
from rstguard.state.record import Record
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.capped import CALM, Capped
from rstguard.supervisor.change import Change, Follower
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.protected import Protected
from tests.supervisor.parts import guard_of, kinds, policy
from tests.support.fake_kernel import FakeKernel

MOST = 3


class Site:
    """Bans of a guard on a kernel that only remembers; changes of policy are refused at will."""

    def __init__(self, directory: Path) -> None:
        self.kernel = FakeKernel()
        self.guard: Guard = guard_of(policy(more=f"bans_per_minute: {MOST}"))
        ipset.apply(self.kernel, self.guard.ruleset)
        self.record = Record(directory, self.kernel.sets)
        self.refused = 0
        """So many changes of policy are refused yet."""
        self.protected = Protected(self.kernel, self.guard)
        self.change = Change(self.guard, self.protected, [Follower("rules", self._follow)])
        self.capped = Capped(self.guard, self.change)
        self.bans = Bans(self.kernel, self.guard, self.record, self.capped)

    async def _follow(self, old: RuleSet, new: RuleSet) -> None:
        if new.capped and self.refused:
            self.refused -= 1
            raise KernelError("not now")

    def ban(self, source: str, enforced: bool = True, rule: str = "rate") -> None:
        """Have a worker ban a source, or shun it if the rule is capped."""
        withheld = rule in self.guard.ruleset.capped
        element = Element(parse_prefix(source), "shun" if withheld else "ban", rule, 600)
        if enforced:
            with self.kernel.sets() as sets:
                sets.add([element])
        self.bans.heard(Blocked(element, Reason.SYN_RATE, enforced, withheld=withheld))

    def ban_many(self, rule: str = "rate") -> None:
        """Have it ban in more networks than it may."""
        for number in range(MOST + 1):
            self.ban(f"198.51.{number}.1", rule=rule)

    def banned(self) -> set[str]:
        """Return who is banned in the kernel."""
        with self.kernel.sets() as sets:
            return {str(element.source) for element in sets.list()}


@asynccontextmanager
async def site(directory: Path) -> AsyncIterator[Site]:
    made = Site(directory)
    await made.record.open()
    watching = [asyncio.create_task(made.capped.watch()), asyncio.create_task(made.bans.gate())]
    try:
        yield made
    finally:
        for task in watching:
            task.cancel()
        await made.record.close()


async def test_a_ban_is_noted_and_the_sweeper_told(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        told: list[object] = []
        here.guard.sweeper.send = told.append  # type: ignore[method-assign, assignment]
        here.ban("198.51.100.7")
        here.ban("198.51.100.8", enforced=False)
        await asyncio.sleep(1)
        assert kinds(here.guard) == ["ban", "ban"]
        # What would only have been done ends no connections.
        assert [str(one.element.source) for one in told if isinstance(one, Blocked)] == (
            ["198.51.100.7"]
        )


async def test_a_rule_that_bans_too_many_shuns_and_others_go_on(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.ban_many()
        await asyncio.sleep(0.1)
        assert here.guard.ruleset.capped == {"rate"}
        assert len(here.banned()) == MOST + 1
        assert kinds(here.guard) == ["ban"] * 4 + ["capped"]
        here.ban("198.51.100.1", rule="other")
        await asyncio.sleep(0.1)
        assert here.guard.ruleset.capped == {"rate"}


async def test_a_network_counts_once(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for number in range(10):
            here.ban(f"198.51.100.{number}")
            here.ban(f"2001:db8:0:{number}::/64")
        await asyncio.sleep(0.1)
        assert not here.guard.ruleset.capped


async def test_it_bans_again_after_some_calm_minutes(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.ban_many()
        for _ in range(10):  # it would go on
            await asyncio.sleep(30)
            here.ban_many()
        assert here.guard.ruleset.capped == {"rate"}
        await asyncio.sleep(CALM)
        assert here.guard.ruleset.capped == {"rate"}
        await asyncio.sleep(100)
        assert not here.guard.ruleset.capped
        assert kinds(here.guard).count("capped") == kinds(here.guard).count("rearmed") == 1


async def test_what_is_not_true_yet_is_not_announced_and_is_tried_again(tmp_path: Path) -> None:
    """It was announced first; if the change then failed, nobody tried again."""
    async with site(tmp_path) as here:
        here.refused = 3
        here.ban_many()
        await asyncio.sleep(2.5)
        assert not here.guard.ruleset.capped
        assert "capped" not in kinds(here.guard)
        await asyncio.sleep(1)
        assert here.guard.ruleset.capped == {"rate"}
        assert kinds(here.guard)[-1] == "capped"


async def test_another_policy_that_came_meanwhile_is_not_touched(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.refused = 1
        here.ban_many()
        await asyncio.sleep(0.5)
        await here.change.apply(policy("second"), "second.yaml")
        await asyncio.sleep(5)
        assert not here.guard.ruleset.capped
        assert len(here.banned()) == MOST + 1


@pytest.mark.parametrize(
    ("member", "network"),
    [("198.51.100.{}", "198.51.100.0/24"), ("2001:db8:1:{}::/64", "2001:db8:1::/48")],
    ids=["IPv4", "IPv6"],
)
async def test_a_network_of_which_many_are_banned_is_gated(
    tmp_path: Path, member: str, network: str
) -> None:
    async with site(tmp_path) as here:
        for number in range(16):
            here.ban(member.format(number))
            here.ban(member.format(number))  # ordered again, not another
        await asyncio.sleep(0.1)
        assert network not in here.banned()
        here.ban(member.format(16))
        here.kernel.faults.fail("sets.add", times=2)  # and tried again
        await asyncio.sleep(3)
        assert network in here.banned()
        assert kinds(here.guard).count("gated") == 1
        assert await here.bans.remove(parse_prefix(network))
        assert network not in here.banned()


async def test_a_gate_that_is_refused_keeps_no_other_waiting(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.ipsets.get("rstguard-gate4").options["maxelem"] = "0"
        for number in range(17):
            here.ban(f"198.51.100.{number}")
        await asyncio.sleep(0.5)
        for number in range(17):
            here.ban(f"2001:db8:1:{number}::/64")
        await asyncio.sleep(3)
        assert "2001:db8:1::/48" in here.banned()
        assert here.guard.unplaced_at is not None


async def test_a_gate_lasts_as_long_as_the_longest_ban(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for number in range(17):
            seconds = 86_400 if number < 16 else 60
            element = Element(parse_prefix(f"198.51.100.{number}"), "ban", "rate", seconds)
            here.bans.heard(Blocked(element, Reason.SYN_RATE))
        await asyncio.sleep(0.5)
        (gate,) = [one for one in await here.bans.listed() if one.source.length == 24]
        assert gate.remaining is not None
        assert gate.remaining > 80_000


async def test_bans_by_hand_are_placed_and_lifted_with_an_event(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        for number in range(10):  # an administrator's are not counted
            await here.bans.add(parse_prefix(f"198.51.100.{number}"), 60, keep_existing=False)
        assert len(await here.bans.listed()) == 10
        assert await here.bans.remove(parse_prefix("198.51.100.3"))
        assert not await here.bans.remove(parse_prefix("198.51.100.3"))
        assert len(here.banned()) == 9
        assert here.guard.ruleset.enforce
        assert kinds(here.guard)[-1] == "unban"


async def test_a_full_set_is_an_error_with_a_sentence(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.ipsets.get("rstguard-ban4").options["maxelem"] = "1"
        await here.bans.add(parse_prefix("198.51.100.1"), 60, keep_existing=False)
        with pytest.raises(Full, match="it is full"):
            await here.bans.add(parse_prefix("198.51.100.2"), 60, keep_existing=False)
        assert kinds(here.guard) == ["ban"]


async def test_of_a_list_that_is_too_long_it_is_known_who_is_banned(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.kernel.ipsets.get("rstguard-ban4").options["maxelem"] = "2"
        listed = [
            Element(parse_prefix(f"198.51.100.{n}"), "ban", "imported", 60) for n in range(1, 5)
        ]
        with pytest.raises(KernelError, match=r"2 of 4 sources are banned: .* is full"):
            await here.bans.add_list(listed)
        assert len(here.banned()) == 2
        assert kinds(here.guard) == ["import"]
        assert here.record.store is not None
        assert {str(one.source) for one in here.record.store.blocks()} == set(here.banned())
