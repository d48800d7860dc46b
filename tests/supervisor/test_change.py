"""A change of policy is whole, or it has not been."""

from __future__ import annotations

import asyncio

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.kernel import KernelError
from rstguard.supervisor.change import Change, Follow, Follower
from rstguard.supervisor.guard import Guard
from tests.supervisor.parts import guard_of, kinds, policy

NAMES = ("processes", "rules", "budget")


class Unprotected:
    """Protects nobody."""

    async def look(self) -> None:
        """There is nothing to be found."""

    def within(self, ruleset: RuleSet) -> RuleSet:
        """Return the policy as it is."""
        return ruleset


class Followers:
    """Parts that hold a policy, and refuse when they are told to."""

    def __init__(self, guard: Guard) -> None:
        self.hold = dict.fromkeys(NAMES, guard.ruleset.name)
        self.steps: list[tuple[str, str]] = []
        self.refusals: dict[tuple[str, str], Exception] = {}
        followers = [Follower(name, self._following(name)) for name in NAMES]
        self.change = Change(guard, Unprotected(), followers)  # type: ignore[arg-type]

    def _following(self, name: str) -> Follow:
        async def follow(_old: RuleSet, new: RuleSet) -> None:
            self.steps.append((name, new.name))
            await asyncio.sleep(0.1)
            if error := self.refusals.get((name, new.name)):
                raise error
            self.hold[name] = new.name

        return follow


async def test_all_follow_in_order() -> None:
    guard = guard_of()
    parts = Followers(guard)
    await parts.change.apply(second := policy("second"), "second.yaml")
    assert parts.steps == [(name, "second") for name in NAMES]
    assert (guard.loaded, guard.file, guard.ruleset.name) == (second, "second.yaml", "second")
    assert kinds(guard) == ["policy"]


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("error", [KernelError("no"), TimeoutError()], ids=["refused", "late"])
async def test_if_one_refuses_all_go_back_in_reverse_order(at: int, error: Exception) -> None:
    guard = guard_of()
    parts, loaded = Followers(guard), guard.loaded
    parts.refusals[NAMES[at], "second"] = error
    with pytest.raises(ControlError) as raised:
        await parts.change.apply(policy("second"), "second.yaml")
    assert "the policy was not applied, the old one stays: " in str(raised.value)
    assert ("did not answer in time" in str(raised.value)) == isinstance(error, TimeoutError)
    assert set(parts.hold.values()) == {"first"}
    assert parts.steps[at + 1 :] == [(name, "first") for name in reversed(NAMES[: at + 1])]
    assert (guard.loaded, guard.file, guard.ruleset.name) == (loaded, "first.yaml", "first")
    assert kinds(guard) == []


async def test_one_that_cannot_go_back_keeps_no_other_from_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guard = guard_of()
    parts = Followers(guard)
    parts.refusals["budget", "second"] = parts.refusals["rules", "first"] = KernelError("no")
    with pytest.raises(ControlError):
        await parts.change.apply(policy("second"), "second.yaml")
    assert parts.hold == {"processes": "first", "rules": "second", "budget": "first"}
    assert "rules could not go back to the old policy: no" in caplog.text


async def test_two_at_once_come_one_after_the_other() -> None:
    guard = guard_of()
    parts = Followers(guard)
    names = ["second", "third", "fourth"]
    await asyncio.gather(*(parts.change.apply(policy(name), name) for name in names))
    assert parts.steps == [(part, name) for name in names for part in NAMES]
    assert guard.ruleset.name == "fourth"


async def test_what_changes_nothing_asks_nobody() -> None:
    guard = guard_of()
    parts = Followers(guard)
    await parts.change.rules(lambda now: now)
    assert parts.steps == []
