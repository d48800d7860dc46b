"""Processes of the guard are killed fifty times, in the midst of work."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from rstguard.ipc.requests import ControlError
from rstguard.lab.guard import leftovers
from rstguard.lab.waiting import wait_until
from tests.support.crowd import Crowd
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.stream import Stream
from tests.support.traffic import Open

pytestmark = [pytest.mark.netns, pytest.mark.timeout(420)]

TIMES = 50
POLICY = """\
version: 1
name: killed
protect: {interfaces: [out]}
sweep_every: 500ms
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 1h}
  - {name: opened, measure: connection_rate, over: 10000/s, then: ban, for: 1h}
  - {name: idle, measure: idle, over: 10m, then: reset}
"""


def pids(status: Any) -> dict[str, int]:
    """Return the processes of the guard by their names."""
    workers = {f"worker {index}": row["pid"] for index, row in enumerate(status["workers"])}
    return {
        "supervisor": status["supervisor"]["pid"],
        "sweeper": status["sweeper"]["pid"],
        **workers,
    }


def kill(guard: Guard, victim: str) -> float:
    """Kill one process; return after how many seconds all of them serve again."""
    before = pids(guard.status())
    began = time.monotonic()
    if victim == "supervisor":
        guard.kill9()
        guard.launch()  # as the service manager does
    else:
        os.kill(before[victim], signal.SIGKILL)

    def whole() -> bool:
        try:
            status = guard.status()
        except ControlError:
            return False
        now = pids(status)
        serves = status["filtering"] and status["sweeper"]["ready"]
        return serves and now[victim] not in (0, before[victim])

    wait_until(whole, 20)
    return time.monotonic() - began


def test_killed_fifty_times_under_load(lab: ThreeHosts, tmp_path: Path, serve: Open) -> None:
    chance = random.Random(50)
    took: dict[str, list[float]] = {}
    with (
        Guard(lab, POLICY, tmp_path / "guard") as guard,
        Stream(serve(9100).connect(source(False))) as stream,
    ):
        with Crowd(lab, serve(9101)).at_work() as crowd:
            banned = source(False)
            guard.cli("ban", "add", banned, "--for", "1h")
            for _ in range(TIMES):
                victim = chance.choice(("supervisor", "sweeper", "worker 0", "worker 1"))
                took.setdefault(victim.split()[0], []).append(kill(guard, victim))
                assert guard.block_of(banned) is not None
                crowd.more(3)
        for name, seconds in sorted(took.items()):
            least, half, most = min(seconds), median(seconds), max(seconds)
            back = f"back after {half:.2f} s ({least:.2f} to {most:.2f})"
            print(f"{name}: killed {len(seconds)} times, {back}")
        assert guard.stop() == 0
    assert crowd.failures == []
    assert stream.problems == []
    assert stream.received == stream.sent > 0
    assert leftovers(lab) == []
