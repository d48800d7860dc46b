"""Policies change under a flood that goes through the queue: no verdict is lost."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.flood import syn_flood
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source

pytestmark = pytest.mark.netns

ROUNDS = 5
MORE = """\
  - {name: flags, measure: bad_flags, over: 5/s, then: drop}
  - {name: closed, measure: stalled, over: 10s, window: 100, then: reset}
blocking: reset
"""
"""What other packets must be diverted for, and blocked ones answered otherwise: new chains."""


def policy(name: str, more: str = "") -> str:
    return f"""\
version: 1
name: {name}
protect: {{interfaces: [out]}}
rules:
  - {{name: rate, measure: syn_rate, over: 10000/s, then: drop}}
  - {{name: {name}-service, measure: syn_rate, over: 1/s, burst: 1, per: service, then: drop}}
{more}"""


def handled(guard: Guard) -> tuple[int, int, int]:
    """Return the packets that had a verdict, those that wait, and those that had none."""
    (row,) = guard.status()["workers"]
    return row["packets"], row["waiting"], row["overrun"]


def test_apply_and_rollback_under_a_flood(lab: ThreeHosts, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(policy("other", MORE))
    source(False)
    with Guard(lab, policy("first"), tmp_path / "guard", workers=1) as guard:
        with syn_flood(lab, tmp_path, "10,128,drnd(1),drnd(1)", 8300):
            wait_until(lambda: handled(guard)[0] > 20_000, 30)
            began, before = time.monotonic(), handled(guard)[0]
            took = []
            for _ in range(ROUNDS):
                took.append(guard.json("policy", "apply", str(other))["took_ms"])
                took.append(guard.json("policy", "rollback")["took_ms"])
            assert handled(guard)[0] > before + 20_000  # the flood went on
            rate = (handled(guard)[0] - before) / (time.monotonic() - began)
        wait_until(lambda: handled(guard)[1] == 0)
        time.sleep(1.1)  # a worker reports twice a second
        _, waiting, overrun = handled(guard)
        print(
            f"{rate:,.0f} packets/s; apply and rollback took {median(took):.0f} ms "
            f"({min(took):.0f} to {max(took):.0f})"
        )
        assert (waiting, overrun) == (0, 0)
        assert guard.status()["counts"].get("failed", 0) == 0
