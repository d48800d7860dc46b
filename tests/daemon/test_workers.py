"""Several workers: each source belongs to one, and one that fails takes no other with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.crowd import Crowd
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, source
from tests.support.traffic import Open, connect

pytestmark = pytest.mark.netns

PORT, RATED, SUBNET = 8001, 8002, 8003

POLICY = """
version: 1
name: workers
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: connection_rate, ports: [8002], over: 1/m, burst: 5, then: ban, for: 60s}
  - {name: net, measure: connection_rate, per: {ipv4: 24, ipv6: 48}, ports: [8003], over: 1/m,
     burst: 5, then: ban, for: 60s}
  - {name: all, measure: syn_rate, over: 100000/s, then: drop}
"""
BY_SERVICE = (
    POLICY + "  - {name: service, measure: syn_rate, per: service, over: 100000/s, then: drop}\n"
)


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path / "run", workers=4) as guard:
        yield guard


def packets(guard: Guard) -> list[int]:
    return [worker["packets"] for worker in guard.status()["workers"]]


def seen(guard: Guard, at_least: int) -> bool:
    return sum(packets(guard)) >= at_least


@BOTH_FAMILIES
def test_the_sources_are_shared_out(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(PORT, v6)
    for _ in range(32):
        connect(lab, source(v6), service.address, PORT).close()
    wait_until(lambda: seen(guard, 32))
    assert len(packets(guard)) == 4
    assert min(packets(guard)) > 0


@BOTH_FAMILIES
def test_one_source_is_counted_in_one_place(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """Were it shared out by connection, four workers would let four bursts through."""
    address, service = source(v6), serve(RATED, v6)
    assert completed(lab, [address] * 12, service.address, RATED) <= 7
    wait_until(lambda: guard.block_of(address) is not None)


@BOTH_FAMILIES
def test_one_prefix_is_counted_in_one_place(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(SUBNET, v6)
    assert completed(lab, neighbours(v6, 12), service.address, SUBNET) <= 7
    wait_until(lambda: any(row["rule"] == "net" for row in guard.ask("ban-list")))


def completed(lab: ThreeHosts, addresses: list[str], target: str, port: int) -> int:
    """Connect and speak from one address after the other; return how many got an answer."""
    count = 0
    for address in addresses:
        try:
            with connect(lab, address, target, port, 0.4) as client:
                client.settimeout(0.4)
                client.sendall(b"hello")
        except OSError:
            return count
        count += 1
    return count


def test_a_dead_worker_takes_no_other_with_it(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(PORT)
    with Crowd(lab, service).at_work() as crowd:
        for worker in guard.status()["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
            wait_until(guard.filtering, 5)
            crowd.more(20)
    assert crowd.failures == []
    assert [worker["restarts"] for worker in guard.status()["workers"]] == [1] * 4


def test_a_worker_that_hangs_is_told_of_and_replaced(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    hung = guard.status()["workers"][2]["pid"]
    os.kill(hung, signal.SIGSTOP)
    wait_until(lambda: not guard.filtering(), 5)
    wait_until(guard.filtering, 15)
    assert guard.status()["workers"][2]["pid"] != hung
    connect(lab, source(False), serve(PORT).address, PORT).close()


def test_what_is_counted_per_service_meets_in_one_worker(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    guard.apply(BY_SERVICE)
    before = packets(guard)
    service = serve(PORT)
    for _ in range(16):
        connect(lab, source(False), service.address, PORT).close()
    wait_until(lambda: sum(packets(guard)) >= sum(before) + 16)
    assert packets(guard)[1:] == before[1:]


def test_the_number_of_workers_is_a_power_of_two(guard: Guard) -> None:
    done = guard.cli("run", "--policy", str(guard.file), "--workers", "3")
    assert done.returncode == 2
    assert "1, 2, 4, 8" in done.stderr
