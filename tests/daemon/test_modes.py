"""What the keys of a policy that stand beside its rules change: mode, blocking, trusted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Open, answer, connect, segments

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("mute"), BOTH_FAMILIES]

DROP, RESET, BAN, IDLE, SHUN, OTHER = range(8001, 8007)


def policy(head: str) -> str:
    return f"""
version: 1
sweep_every: 500ms
{head}
rules:
  - {{name: drop, measure: syn_rate, ports: [{DROP}], over: 1/m, burst: 1, then: drop}}
  - {{name: reset, measure: syn_rate, ports: [{RESET}], over: 1/m, burst: 1, then: reset}}
  - {{name: ban, measure: connection_rate, ports: [{BAN}], over: 1/m, burst: 3,
     then: ban, for: 60s}}
  - {{name: idle, measure: idle, ports: [{IDLE}], over: 1s, then: reset}}
  - {{name: shun, measure: half_open, ports: [{SHUN}], over: 3, then: ban, for: 60s}}
"""


PROTECT = "protect: {interfaces: [out]}"


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, policy(PROTECT), tmp_path_factory.mktemp("modes")) as guard:
        yield guard


def would(guard: Guard, kind: str, rule: str) -> bool:
    return any(
        (event["kind"], event["rule"], event["enforced"]) == (kind, rule, False)
        for event in guard.status()["recent"]
    )


def test_observe_reports_and_changes_nothing(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    guard.apply(policy(f"mode: observe\n{PROTECT}"))
    address = source(v6)
    links = []
    for port in (DROP, RESET, BAN, IDLE, SHUN):
        service = serve(port, v6)
        links += [service.connect(address) for _ in range(4)]
    forged = source(v6)
    segments(lab, forged, service.address, SHUN, "S", 10)
    wait_until(lambda: would(guard, "ban", "ban") and would(guard, "reset", "reset"))
    wait_until(lambda: would(guard, "reset", "idle"))
    wait_until(lambda: would(guard, "shun", "shun"))
    assert guard.block_of(address) is None
    assert guard.block_of(forged) is None
    assert guard.status()["policy"]["mode"] == "observe"
    assert guard.status()["counts"]["verdict.drop"] >= 2
    for link in links:
        link.talk()
    # And once the policy is enforced, nothing that was only observed stands in the way.
    guard.apply(policy(PROTECT))
    connect(lab, address, service.address, BAN).close()
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["kind"] == "ban"


@pytest.mark.parametrize("blocking", ["reset", "unreachable"])
@pytest.mark.parametrize("kind", ["ban", "shun"])
def test_what_a_blocked_client_sees(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, blocking: str, kind: str
) -> None:
    guard.apply(policy(f"blocking: {blocking}\nshun: drop\n{PROTECT}"))
    service = serve(SHUN, v6)
    address, free = source(v6), source(v6)
    if kind == "ban":
        link = service.connect(address)
        guard.ask("ban-add", source=network_of(address), seconds=60)
        link.wait_reset()
    else:
        segments(lab, address, service.address, SHUN, "S", 10)
        wait_until(lambda: guard.block_of(address) is not None)
        assert guard.block_of(address)["kind"] == "shun"
    # Linux's names for the ICMP codes (icmp_err_convert, tab_unreach).
    wanted = "ECONNREFUSED" if blocking == "reset" else "EACCES" if v6 else "EHOSTUNREACH"
    began = time.monotonic()
    assert answer(lab, address, service.address, SHUN, 5) == wanted
    # Linux leaves an ICMP error that meets connect() at work aside; the next SYN brings another.
    assert time.monotonic() - began < (0.5 if blocking == "reset" else 3)
    service.connect(free).talk()


def test_the_trusted_are_left_alone(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    address = source(v6)
    guard.apply(policy(f'trusted: ["{network_of(address)}"]\n{PROTECT}'))
    links = []
    for port in (DROP, RESET, BAN, IDLE, SHUN):
        service = serve(port, v6)
        links += [service.connect(address) for _ in range(5)]
    segments(lab, address, service.address, SHUN, "S", 10)
    stranger = serve(9000, v6).connect(source(v6))
    sweeps = guard.status()["counts"]["sweeps"]
    wait_until(lambda: guard.status()["counts"]["sweeps"] >= sweeps + 5)
    for link in (*links, stranger):
        link.talk()
    assert guard.block_of(address) is None


def test_what_is_not_protected_is_not_looked_at(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    inside, outside = serve(DROP, v6), serve(RESET, v6)
    guard.apply(policy(f"protect: {{interfaces: [out], ports: [{DROP}, {IDLE}]}}"))
    address = source(v6)
    links = [outside.connect(address) for _ in range(5)]
    guard.apply(policy(f'protect: {{interfaces: [out], destinations: ["{outside.address}"]}}'))
    inside.connect(address)
    assert answer(lab, address, inside.address, DROP) == "silence"
    guard.apply(
        policy('protect: {interfaces: [out], destinations: [192.0.2.0/24, "2001:db8::/32"]}')
    )
    for _ in range(3):
        connect(lab, address, inside.address, DROP).close()
    guard.apply(policy('protect: {interfaces: ["wan*"]}'))
    for _ in range(3):
        connect(lab, address, inside.address, DROP).close()
    guard.apply(policy('protect: {interfaces: ["ou*"]}'))
    assert answer(lab, address, inside.address, DROP) == "silence"
    for link in links:
        link.talk()


@pytest.mark.parametrize("blocking", ["drop", "reset"])
def test_a_ban_covers_what_the_policy_says(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, blocking: str
) -> None:
    protect = f"protect: {{interfaces: [out], ports: [{BAN}]}}"
    service, other = serve(BAN, v6), serve(OTHER, v6)
    address, answers = source(v6), {"drop": "silence", "reset": "ECONNREFUSED"}[blocking]
    for covers, elsewhere in (("everything", answers), ("protected", "connected")):
        head = f"blocking: {blocking}\nban_covers: {covers}\n{protect}"
        guard.apply(f"version: 1\n{head}\nrules: []\n")
        assert guard.cli("ban", "add", address, "--for", "1m").returncode == 0
        assert answer(lab, address, service.address, BAN, 2) == answers
        assert answer(lab, address, other.address, OTHER, 2) == elsewhere
        assert guard.cli("ban", "remove", address).returncode == 0
