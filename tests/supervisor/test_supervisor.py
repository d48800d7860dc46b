"""A whole guard in one process: brought up, asked, and taken down, whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rstguard.control.commands import Commands
from rstguard.daemon import build
from rstguard.ipc.messages import Failed
from rstguard.ipc.requests import Answer, ControlError
from rstguard.kernel import KernelError
from rstguard.supervisor.options import Options
from rstguard.supervisor.supervisor import Supervisor
from tests.supervisor.children import Played, Stage, lively
from tests.supervisor.parts import policy
from tests.support.fake_kernel import FakeKernel

ACCT = "net.netfilter.nf_conntrack_acct"


class Door:
    """Stands for the control socket: who asks comes through it."""

    def __init__(self) -> None:
        self.open = False
        self.answer: Answer

    async def serve(self, _directory: Path, answer: Answer) -> Any:
        """Open it."""
        self.open, self.answer = True, answer
        return self

    def close(self) -> None:
        """Shut it."""
        self.open = False


class Site:
    """A guard with played processes on a kernel that only remembers."""

    def __init__(self, directory: Path, **more: Any) -> None:
        self.kernel, self.stage, self.door = FakeKernel(), Stage(), Door()
        self.stage.on_start = lively
        self.sysctls = dict(self.kernel.sysctls)
        self.directory = directory
        self.options = Options(
            kernel=self.kernel,
            policy=policy(rules="[{name: r, measure: syn_rate, over: 9/s, then: drop}]"),
            file="first.yaml",
            directory=directory,
            state=directory / "state",
            queue=5640,
            spawned=(),
            keep_bans=False,
            spawn=self.stage.spawn,
            claim=lambda *_: nullcontext(),
            **more,
        )

    def built(self) -> tuple[Supervisor, Commands]:
        """Start the first processes, and put a guard together."""
        first = (
            self.stage.spawn("worker"),
            self.stage.spawn("worker"),
            self.stage.spawn("sweeper"),
        )
        supervisor, commands, _ = build(replace(self.options, spawned=first))
        return supervisor, commands

    def leftovers(self) -> list[str]:
        """Return what the guard has left in the kernel and in its directory."""
        saved = "".join(self.kernel.run([f"{one}-save"]) for one in ("iptables", "ip6tables"))
        found = [line for line in saved.splitlines() if "rstguard" in line]
        found += [*self.kernel.ipsets.names, *self.kernel.nftables]
        found += [name for name, was in self.sysctls.items() if self.kernel.sysctls[name] != was]
        found += [one.name for one in self.directory.iterdir() if one.name != "state"]
        return [*found, *(f"process {one.pid}" for one in self.stage.all if one.status is None)]


@asynccontextmanager
async def running(site: Site) -> AsyncIterator[Commands]:
    """Run a guard until the block ends."""
    supervisor, commands = site.built()
    life = asyncio.create_task(supervisor.run(commands.answer, site.door.serve))
    while not site.door.open and not life.done():
        await asyncio.sleep(0.01)
    try:
        yield commands
    finally:
        supervisor.stop()
        await life


async def status(commands: Commands) -> Any:
    return await commands.answer({"command": "status"})


async def test_it_filters_and_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with running(site) as commands:
        told = await status(commands)
        assert (told["state"], told["problems"]) == ("filtering", [])
        assert [row["state"] for row in (*told["workers"], told["sweeper"])] == 3 * ["serving"]
        assert site.leftovers()
        assert site.kernel.sysctls[ACCT] == "1"
    assert site.leftovers() == []


async def test_a_task_that_fails_takes_the_guard_down_in_order_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was never printed, and the guard went on without what the task had done."""

    async def web(_answer: Answer) -> None:
        await asyncio.sleep(5)
        raise ZeroDivisionError("the page")

    site = Site(tmp_path, web=web)
    supervisor, commands = site.built()
    with caplog.at_level(logging.ERROR), pytest.raises(KernelError) as raised:
        await supervisor.run(commands.answer, site.door.serve)
    assert "the guard stopped, as a part of it failed: ZeroDivisionError('the page')" in str(
        raised.value
    )
    assert any(record.exc_info for record in caplog.records)
    assert site.leftovers() == []
    assert not site.door.open


def fails(sentence: str) -> Callable[[Played], None]:
    def say(one: Played) -> None:
        one.say(Failed(sentence))
        one.end(1)

    return say


async def test_a_guard_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.stage.on_start = fails("queue 5640 is in use by another program")
    supervisor, commands = site.built()
    with pytest.raises(KernelError, match="queue 5640 is in use by another program"):
        await supervisor.run(commands.answer, site.door.serve)
    assert site.leftovers() == []


@pytest.mark.parametrize("naming", ["iptables-restore", "ip6tables-restore", "ipset restore"])
async def test_a_kernel_that_refuses_at_the_start(tmp_path: Path, naming: str) -> None:
    site = Site(tmp_path)
    site.kernel.faults.fail("run", naming=naming)
    supervisor, commands = site.built()
    with pytest.raises(KernelError, match="a fault of the test"):
        await supervisor.run(commands.answer, site.door.serve)
    assert site.leftovers() == []


async def test_a_sweeper_that_cannot_be_started_again_makes_it_degraded(tmp_path: Path) -> None:
    """With a dead sweeper status once said that it filters, for ever."""
    site = Site(tmp_path)
    async with running(site) as commands:
        sweeper = next(one for one in site.stage.all[2:])
        site.stage.on_start = lambda one: one.end(1)
        sweeper.kill()
        await asyncio.sleep(30)
        told = await status(commands)
        assert told["state"] == "degraded"
        assert told["problems"] == ["the sweeper does not serve (it is started again and again)"]
        assert told["sweeper"]["state"] in ("backoff", "starting")
        site.stage.on_start = lively
        await asyncio.sleep(6)
        assert (await status(commands))["state"] == "filtering"


async def test_a_supervisor_that_slept_does_not_kill_its_workers(tmp_path: Path) -> None:
    """A suspended machine, or one too busy: it reads what waits before it judges."""
    site = Site(tmp_path)
    async with running(site):
        asyncio.get_running_loop()._virtual.now += 500  # type: ignore[attr-defined]
        await asyncio.sleep(3)
        assert len(site.stage.all) == 3


async def test_a_full_set_is_told_by_status(tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with running(site) as commands:
        site.kernel.ipsets.get("rstguard-ban4").options["maxelem"] = "1"
        ban = {"command": "ban-add", "seconds": 60}
        await commands.answer(ban | {"source": "198.51.100.1"})
        with pytest.raises(ControlError, match="it is full"):
            await commands.answer(ban | {"source": "198.51.100.2"})
        told = await status(commands)
        assert told["state"] == "degraded"
        assert "bans could not be placed in the last minute" in told["problems"][0]
        await asyncio.sleep(61)
        assert (await status(commands))["state"] == "filtering"


async def many(commands: Commands, count: int) -> list[Any]:
    asking: list[Awaitable[Any]] = [status(commands) for _ in range(count)]
    return list(await asyncio.gather(*asking))


async def test_all_who_ask_at_once_share_one_look_at_the_kernel(tmp_path: Path) -> None:
    site = Site(tmp_path)
    async with running(site) as commands:
        asked: list[str] = []
        run = site.kernel.run

        def counted(words: Sequence[str], text: str = "") -> str:
            asked.append(words[0])
            return run(words, text)

        site.kernel.run = counted  # type: ignore[method-assign, assignment]
        answers = await many(commands, 200)
        assert {answer["state"] for answer in answers} == {"filtering"}
        assert asked.count("iptables-save") <= 2
