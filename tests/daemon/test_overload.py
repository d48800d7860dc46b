"""A queue that fills up: what the worker leaves undone, and that it takes it up again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from rstguard.engine.shedding import SHED, Level
from rstguard.kernel.readers import BINDING, BUILT_IN, CHOICE
from rstguard.lab.waiting import wait_until
from tests.support.crowd import Crowd
from tests.support.flood import syn_flood
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Open, segments

pytestmark = pytest.mark.netns

PORT = 8001
POLICY = """
version: 1
name: overload
syn_budget: off
shun_for: 60s
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}
"""


def overloads(guard: Guard) -> list[str]:
    return [e["detail"] for e in guard.status()["recent"] if e["kind"] == "overload"]


@BOTH_FAMILIES
@pytest.mark.parametrize("reader", [BUILT_IN, BINDING])
def test_a_backlog_is_worked_off_and_its_sender_shunned(
    lab: ThreeHosts,
    tmp_path: Path,
    serve: Open,
    v6: bool,
    reader: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CHOICE, reader)
    service, attacker = serve(PORT, v6), source(v6)
    with Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        link = service.connect(source(v6))
        link.talk()
        worker = guard.status()["workers"][0]["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            segments(lab, attacker, service.address, PORT, "S", 4200)
        finally:
            os.kill(worker, signal.SIGCONT)
        wait_until(lambda: guard.block_of(attacker) is not None)
        wait_until(lambda: overloads(guard)[-1:] == [SHED[Level.NOTHING]], 20)
        told = [one for one in overloads(guard) if one != SHED[Level.THINNED]]
        assert told[0] == SHED[Level.SYNS]
        assert told[-3:] == [SHED[Level(level)] for level in (2, 1, 0)], "one level after the other"
        status = guard.status()
        assert status["counts"]["shed"] > 0
        assert status["workers"][0]["overload"] == 0
        shuns = [e for e in status["recent"] if e["kind"] == "shun"]
        assert [(e["subject"], e["rule"], e["reason"]) for e in shuns] == [
            (network_of(attacker), "overload", "overload")
        ]
        link.talk()
        service.connect(source(v6)).talk()


def thinned(lab: ThreeHosts, family: int) -> bool:
    return "0.0.0.0/1" in lab.run("gateway", "ipset", "save", f"rstguard-thin{family}-0")


def test_what_would_only_pass_unjudged_spares_the_queue(
    lab: ThreeHosts, tmp_path: Path, serve: Open
) -> None:
    """Real clients in the midst of a forged flood that is too much: nobody waits behind it."""
    service = serve(PORT)
    with Guard(lab, POLICY, tmp_path / "run", workers=1) as guard:
        known = source(False)
        service.connect(known).talk()
        worker = guard.status()["workers"][0]["pid"]
        # On one core with the sender, and after it, it is overrun on any machine.
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(worker, {core})
        os.setpriority(os.PRIO_PROCESS, worker, 19)
        with (
            syn_flood(lab, tmp_path, "33,drnd(3)", PORT, core),
            Crowd(lab, service).at_work() as crowd,
        ):
            wait_until(lambda: guard.status()["workers"][0]["overload"] == Level.THINNED, 20)
            assert thinned(lab, 4)
            before = guard.status()["workers"][0]
            crowd.more(50)
            after = guard.status()["workers"][0]
            assert after["overrun"] == before["overrun"], "the queue has room"
        assert crowd.failures == []
        wait_until(lambda: guard.status()["workers"][0]["overload"] < Level.THINNED, 20)
        assert not thinned(lab, 4)
        wait_until(lambda: guard.status()["workers"][0]["overload"] == Level.NOTHING, 20)


def test_no_flood_takes_away_what_a_service_may_get_at_all(
    lab: ThreeHosts, tmp_path: Path, serve: Open
) -> None:
    """The worker cannot count any more, so the kernel does, service by service."""
    serve(PORT)
    limit = (
        f"{{name: all, measure: syn_rate, over: 500/s, per: service, ports: [{PORT}], then: drop}}"
    )
    with Guard(lab, POLICY + f"  - {limit}\n", tmp_path / "run", workers=1) as guard:
        worker = guard.status()["workers"][0]["pid"]
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(worker, {core})
        os.setpriority(os.PRIO_PROCESS, worker, 19)
        with syn_flood(lab, tmp_path, "33,drnd(3)", PORT, core):
            wait_until(lambda: guard.status()["workers"][0]["overload"] == Level.THINNED, 20)
            came, arrived, began = (
                received(lab, "gateway"),
                received(lab, "server"),
                time.monotonic(),
            )
            wait_until(lambda: received(lab, "gateway") > came + 20_000, 20)
            seconds = time.monotonic() - began
            arrived = received(lab, "server") - arrived
        assert arrived < 2 * 500 * (seconds + 1) + 500, "its limit by each tier, and a burst"


def received(lab: ThreeHosts, place: str) -> int:
    """Return how many packets a host was sent from the client's side."""
    device = {"gateway": "out", "server": "eth0"}[place]
    return int(lab.run(place, "cat", f"/sys/class/net/{device}/statistics/rx_packets"))
