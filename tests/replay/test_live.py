"""The replay names the same sources, connections and rules as the guard that saw the attack."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rstguard.kernel.forgotten import GRACE_SECONDS
from rstguard.lab.waiting import wait_until
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import load
from rstguard.replay.run import replay
from tests.replay.tap import captured
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources, neighbours, source
from tests.support.traffic import Service, segments

pytestmark = pytest.mark.netns

BRUTE, IDLE, FLOOD, RATE = range(8101, 8105)
SWEEP = 0.5
"""Seconds."""
POLICY = f"""
version: 1
mode: observe
sweep_every: {SWEEP}s
protect: {{interfaces: [out]}}
rules:
  - {{name: brute, measure: short_connections, ports: [{BRUTE}], shorter_than: 10s, over: 10/m,
     then: ban, for: 60s}}
  - {{name: rate, measure: connection_rate, ports: [{RATE}], over: 10/m, then: reset}}
  - {{name: flood, measure: syn_rate, ports: [{FLOOD}], over: 20/s, then: ban, for: 60s}}
  - {{name: scan, measure: distinct_ports, over: 30, within: 60s, then: ban, for: 60s}}
  - {{name: stray, measure: out_of_state, over: 30/m, then: ban, for: 60s}}
  - {{name: idle, measure: idle, ports: [{IDLE}], over: 2s, then: reset}}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgp") as lab:
        give_sources(lab)
        yield lab


def attack(lab: ThreeHosts, v6: bool, services: dict[int, Service]) -> None:
    brute, rate, forger, scanner, stray, idler, honest = (source(v6) for _ in range(7))
    segments(lab, stray, services[BRUTE].address, FLOOD, "A", 1)
    counted = time.monotonic() + GRACE_SECONDS + 0.5
    for _ in range(30):
        link = services[BRUTE].connect(brute)
        link.talk()
        link.close()
    for _ in range(14):
        link = services[RATE].connect(rate)
        link.talk()
        link.close()
    target = services[BRUTE].address
    for address in (forger, *neighbours(v6, 3)):
        segments(lab, address, target, FLOOD, "S", 200)
    services[BRUTE].connect(scanner)
    for port in range(1, 60):
        segments(lab, scanner, target, port, "S", 1)
    wait_until(lambda: time.monotonic() > counted)
    segments(lab, stray, target, FLOOD, "A", 300)
    services[IDLE].connect(idler)
    for _ in range(5):
        link = services[RATE].connect(honest)
        link.talk()
        link.close()


def told(guard: Guard) -> set[tuple[str, str, str]]:
    """Return kind, subject and rule of what the guard would have done."""
    recent: list[dict[str, Any]] = guard.status()["recent"]
    kinds = ("ban", "shun", "reset")
    return {(e["kind"], e["subject"], e["rule"]) for e in recent if e["kind"] in kinds}


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_a_replay_agrees_with_the_live_guard(lab: ThreeHosts, tmp_path: Path, v6: bool) -> None:
    file = tmp_path / "capture.pcap"
    with Guard(lab, POLICY, tmp_path / "guard") as guard, captured(lab, file) as count:
        services = {port: Service(lab, port, v6=v6) for port in (BRUTE, RATE, IDLE)}
        try:
            attack(lab, v6, services)
            wait_until(lambda: "idle" in {rule for _, _, rule in told(guard)}, 20)
            # The replay's sweeps have a beat of their own, and end with the last packet.
            end = time.monotonic() + 4 * SWEEP
            wait_until(lambda: time.monotonic() > end)
            before = count()
            services[RATE].connect(source(v6)).close()
            wait_until(lambda: count() > before)
            live = told(guard)
        finally:
            for service in services.values():
                service.close()
    report = replay(compile_policy(load(guard.file).policy), file)
    assert not report.notes
    assert {rule for _, _, rule in live} == {"brute", "rate", "flood", "scan", "stray", "idle"}
    assert {(hit.kind, str(hit.subject), hit.rule) for hit in report.hits} == live
