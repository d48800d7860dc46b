"""`policy explain`, `policy diff`: how a source stands, and what a file would change.

And who is nearest to which limit, which the same processes tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rstguard.control.nearest import Closest
from rstguard.engine.nearest import Near
from rstguard.ipc.messages import Nearest, NearestAre
from rstguard.kernel.linux import Linux
from rstguard.lab.waiting import wait_until
from rstguard.supervisor.inquiry import Inquiry
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.packets import ruleset
from tests.support.sources import BOTH_FAMILIES, ROUTER4, server_address, source
from tests.support.traffic import Open

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: told
protect: {interfaces: [out]}
trusted: [192.0.2.0/24]
rules:
  - {name: rate, measure: syn_rate, over: 10/m, burst: 10, then: ban, for: 10m}
  - {name: ports, measure: distinct_ports, over: 10, within: 1m, then: drop}
  - {name: held, measure: connections, over: 20, then: reset}
  - {name: idle, measure: idle, over: 15m, then: reset}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("guard")) as guard:
        yield guard


@BOTH_FAMILIES
def test_a_source_that_connects(guard: Guard, serve: Open, v6: bool) -> None:
    service, address = serve(8200, v6), source(v6)
    fresh = guard.json("policy", "explain", address)
    assert "not known" in fresh["state"]
    assert [row["used_percent"] for row in fresh["rules"]] == [0, 0, 0, None]
    for _ in range(5):
        service.connect(address).talk()

    def explained() -> Any:
        return guard.json("policy", "explain", address)

    wait_until(lambda: explained()["rules"][2]["used_percent"] == 25)  # swept
    told = explained()
    assert told["connections"] == 5
    assert "its address is real" in told["state"]
    used = {row["name"]: row["used_percent"] for row in told["rules"]}
    assert 40 <= used["rate"] <= 50
    assert used["ports"] == 10
    assert used["idle"] is None
    text = guard.cli("policy", "explain", address).stdout
    assert "5 connections" in text
    assert "rate: " in text
    assert "syn_rate over 10 in 1m" in text


def test_who_is_nearest(guard: Guard, serve: Open) -> None:
    service, address = serve(8202), source(False)
    for _ in range(8):
        service.connect(address)

    def told() -> dict[str, float]:
        rows = guard.ask("nearest")
        assert rows == sorted(rows, key=lambda row: -row["used_percent"])
        return {row["rule"]: row["used_percent"] for row in rows if row["source"] == address}

    wait_until(lambda: told().get("held") == 40)
    assert told().keys() == {"rate", "held"}
    assert 60 <= told()["rate"] <= 80


def test_however_many_look_the_processes_are_asked_once() -> None:
    asked: list[Nearest] = []
    inquiry: Inquiry[NearestAre] = Inquiry()

    async def ask() -> list[object]:
        def answer(question: Nearest) -> None:
            asked.append(question)
            near = Near("rate", "198.51.100.7", 0.5)
            asyncio.get_running_loop().call_soon(
                inquiry.heard, NearestAre(question.number, (near,))
            )

        child = SimpleNamespace(serves=True, send=answer)
        starting = SimpleNamespace(serves=False, send=answer)
        guard = SimpleNamespace(judges=[child, starting], ruleset=ruleset())
        closest = Closest(Linux(), guard, inquiry)  # type: ignore[arg-type]
        return await asyncio.gather(*(closest.answer({}) for _ in range(50)))

    answers = asyncio.run(ask())
    assert answers == 50 * [[{"source": "198.51.100.7", "rule": "rate", "used_percent": 50}]]
    assert len(asked) == 1


def test_one_that_is_blocked_trusted_or_a_lifeline(guard: Guard, serve: Open) -> None:
    service, address = serve(8201), source(False)
    service.connect(address)
    guard.cli("ban", "add", address, "--for", "1h")
    assert (
        f"banned as {address} by rule manual" in guard.json("policy", "explain", address)["state"]
    )
    assert "trusted by the policy" in guard.json("policy", "explain", "192.0.2.7")["state"]
    assert "a next hop: it is never banned" in guard.json("policy", "explain", ROUTER4)["state"]


def test_what_is_no_address(guard: Guard) -> None:
    done = guard.cli("policy", "explain", "example.org")
    assert done.returncode == 1
    assert "'example.org' is no address" in done.stderr


def test_what_a_file_would_change(guard: Guard, tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text(
        POLICY.replace("10/m, burst: 10", "20/m, burst: 10").replace("[out]", "[out, in]")
    )
    done = guard.cli("policy", "diff", str(new), "--compiled")
    assert "interfaces: out -> out, in" in done.stdout
    assert "rule rate changes" in done.stdout
    assert "+-A rstguard-in -i in -p tcp -j rstguard-classify" in done.stdout
    same = guard.cli("policy", "diff", str(guard.file))
    assert same.stdout == "nothing would change\n"
    assert guard.status()["policy"]["name"] == "told"
    wait_until(guard.filtering)
    assert server_address(False)
