"""Rules that the kernel can count for: the same policy in both tiers does the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.conftest import Open
from tests.guard import BOTH_FAMILIES, Guard, Link, Service, answer, neighbours, source
from tests.netns import Lab, wait_until

pytestmark = pytest.mark.netns

PORT, OTHER = 8001, 8002
TRUSTED = {False: "10.255.9.1", True: "fd73:0:ff::1"}
BOTH_TIERS = pytest.mark.parametrize("offload", ["auto", "never"])


def policy(offload: str, rule: str, mode: str = "enforce") -> str:
    return f"""
version: 1
name: tiers
mode: {mode}
offload: {offload}
sweep_every: 500ms
protect: {{interfaces: [out], ports: [{PORT}]}}
trusted: [{TRUSTED[False]}, "{TRUSTED[True]}"]
syn_budget: {{rate: 200/s}}
rules:
  - {{name: limit, {rule}}}
"""


RATE = "measure: syn_rate, over: 1/m, burst: 3, then: drop"
FAST = "measure: syn_rate, over: 5/s, burst: 2, then: drop"
WIDE = "measure: syn_rate, per: {ipv4: 24, ipv6: 48}, over: 1/m, burst: 3, then: drop"
HELD = "measure: connections, over: 3, then: reset"
CROWD = "measure: connections, over: 3, then: ban, for: 60s"


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[list[Guard]]:
    """Guards that a test has started; ended after it."""
    started: list[Guard] = []
    yield started
    for guard in started:
        guard.end()


def begin(lab: Lab, started: list[Guard], directory: Path, text: str) -> Guard:
    guard = Guard(lab, text, directory / f"run{len(started)}", workers=1)
    started.append(guard)
    guard.start()
    return guard


def tier(guard: Guard) -> str:
    return str(guard.json("policy", "show", "--compiled")["rules"][0]["tier"])


def hold(service: Service, address: str, count: int) -> list[Link]:
    links = [service.connect(address) for _ in range(count)]
    for link in links:
        link.talk()
    return links


@BOTH_TIERS
@BOTH_FAMILIES
def test_syns_within_the_burst_pass_and_one_more_is_dropped(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str, v6: bool
) -> None:
    service = serve(PORT, v6)
    guard = begin(lab, start, tmp_path, policy(offload, RATE))
    assert tier(guard) == ("kernel" if offload == "auto" else "queue")
    address, other = source(v6), source(v6)
    hold(service, address, 3)
    assert answer(lab, address, service.address, PORT) == "silence"
    wait_until(lambda: guard.status()["counts"].get("rule.limit", 0) >= 1)
    hold(service, other, 3)
    hold(service, TRUSTED[v6], 5)
    if offload == "never":
        wait_until(lambda: guard.status()["workers"][0]["packets"] >= 7)
    assert offload == "never" or guard.status()["workers"][0]["packets"] < 5


@BOTH_TIERS
def test_a_source_is_let_in_again_at_its_rate(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str
) -> None:
    service = serve(PORT)
    begin(lab, start, tmp_path, policy(offload, FAST))
    address = source(False)
    hold(service, address, 2)
    assert answer(lab, address, service.address, PORT, 0.1) == "silence"
    wait_until(lambda: answer(lab, address, service.address, PORT, 0.1) == "connected", 3)


@BOTH_TIERS
@BOTH_FAMILIES
def test_a_prefix_is_counted_as_one(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str, v6: bool
) -> None:
    service = serve(PORT, v6)
    begin(lab, start, tmp_path, policy(offload, WIDE))
    *first, last = neighbours(v6, 4)
    for address in first:
        hold(service, address, 1)
    assert answer(lab, last, service.address, PORT) == "silence"
    hold(service, source(v6), 3)


@BOTH_TIERS
@BOTH_FAMILIES
def test_the_newest_connection_beyond_the_limit_is_reset(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str, v6: bool
) -> None:
    service, other = serve(PORT, v6), serve(OTHER, v6)
    guard = begin(lab, start, tmp_path, policy(offload, HELD))
    assert tier(guard) == ("kernel+sweep" if offload == "auto" else "sweep")
    address = source(v6)
    held = hold(service, address, 3)
    hold(other, address, 5)  # not protected
    hold(service, TRUSTED[v6], 5)
    service.connect(address).wait_reset()
    wait_until(lambda: guard.events("reset", "limit") >= 1)
    event = next(e for e in guard.status()["recent"] if e["kind"] == "reset")
    assert (event["rule"], event["reason"]) == ("limit", "connections")
    for link in held:
        link.talk()
    held[0].close()
    wait_until(lambda: survives(service, address), 10)


def survives(service: Service, address: str) -> bool:
    """Tell whether a new connection outlives two sweeps."""
    link = service.connect(address)
    try:
        wait_until(lambda: link.dead, 1.5)
    except TimeoutError:
        return True
    return False


@BOTH_TIERS
def test_connections_from_before_the_rule_count(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str
) -> None:
    service = serve(PORT)
    guard = begin(lab, start, tmp_path, policy(offload, HELD.replace("3", "300")))
    address = source(False)
    held = hold(service, address, 3)
    guard.apply(policy(offload, HELD))
    service.connect(address).wait_reset()
    for link in held:
        link.talk()


@BOTH_TIERS
def test_a_crowd_is_banned_with_all_its_connections(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str
) -> None:
    service = serve(PORT)
    guard = begin(lab, start, tmp_path, policy(offload, CROWD))
    address = source(False)
    links = [*hold(service, address, 3), service.connect(address)]
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["kind"] == "ban"
    for link in links:
        link.wait_reset()


@BOTH_TIERS
@pytest.mark.parametrize("rule", [RATE, HELD])
def test_observing_changes_nothing(
    lab: Lab, start: list[Guard], tmp_path: Path, serve: Open, offload: str, rule: str
) -> None:
    service = serve(PORT)
    guard = begin(lab, start, tmp_path, policy(offload, rule, "observe"))
    links = hold(service, source(False), 6)
    wait_until(lambda: guard.status()["counts"].get("rule.limit", 0) > 0
               or guard.events("reset", "limit") > 0)  # fmt: skip
    for link in links:
        link.talk()
