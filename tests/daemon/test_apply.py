"""`rstguard policy apply`: another policy comes into force under way, whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from rstguard.ipc.requests import ControlError
from rstguard.lab.guard import alive, leftovers
from rstguard.lab.waiting import wait_until
from tests.support.crowd import Crowd
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import SILENCE, Open, answer, refused

pytestmark = pytest.mark.netns

PORT, COUNTED, OTHER = 8001, 8002, 8003
COUNTING = f"""
  - {{name: counted, measure: syn_rate, ports: [{COUNTED}], over: 1/m, burst: 4, then: reset}}"""


def policy(rules: str = "", head: str = "", protect: str = "interfaces: [out]") -> str:
    return f"""
version: 1
name: applied
{head}
protect: {{{protect}}}
rules:{COUNTING}{rules}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, policy(), tmp_path_factory.mktemp("apply"), workers=1) as guard:
        yield guard


RULES = [
    "{name: half, measure: half_open, over: 4000, then: ban, for: 10s}",
    "{name: short, measure: short_connections, shorter_than: 1h, over: 100000/s, then: drop}",
    "{name: stray, measure: out_of_state, over: 1000/s, then: drop}",
    "{name: silent, measure: idle, over: 1h, then: reset}",
]
VARIANTS = [
    policy(),
    *(policy(f"\n  - {rule}") for rule in RULES),
    policy(head="blocking: reset"),
    policy(head="mode: observe"),
    policy(protect="interfaces: ['ou*', in]"),
    policy(protect=f"interfaces: [out], ports: [{COUNTED}], destinations: [10.71.0.0/16]"),
    policy(head='trusted: ["10.75.0.0/16", "fd75::/32"]'),
    policy(head="source: {ipv4: 24, ipv6: 48}"),
]


@BOTH_FAMILIES
def test_no_connection_suffers(guard: Guard, lab: ThreeHosts, serve: Open, v6: bool) -> None:
    lasting = serve(9000, v6).connect(source(v6))
    with Crowd(lab, serve(PORT, v6)).at_work() as crowd:
        for variant in itertools.islice(itertools.cycle(VARIANTS), 2 * len(VARIANTS)):
            guard.apply(variant)
            crowd.more(5)
            lasting.talk()
    assert (crowd.failures, crowd.repeated) == ([], 0)
    assert guard.filtering(), guard.status()["problems"]
    guard.apply(policy())


@BOTH_FAMILIES
def test_unchanged_rules_keep_their_counts(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(COUNTED, v6)
    address = source(v6)
    for _ in range(2):
        service.connect(address)
    guard.apply(policy("\n  - {name: new, measure: reset_rate, over: 9/s, then: drop}"))
    for _ in range(2):
        service.connect(address)
    assert refused(lab, address, service.address, COUNTED)
    guard.apply(policy().replace("burst: 4", "burst: 5"))
    service.connect(address).talk()  # a changed rule begins anew
    guard.apply(policy())


def test_what_is_protected_changes(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(COUNTED)
    address = source(False)
    for _ in range(4):
        service.connect(address)
    assert refused(lab, address, service.address, COUNTED)
    for protect in ("interfaces: [in]", f"interfaces: [out], ports: [{PORT}]"):
        guard.apply(policy(protect=protect))
        service.connect(address).talk()
        guard.apply(policy())
        assert refused(lab, address, service.address, COUNTED)
    guard.apply(policy(head=f"trusted: [{address}]"))
    service.connect(address).talk()
    guard.apply(policy())
    assert refused(lab, address, service.address, COUNTED)


def test_bans_outlast_a_policy(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(PORT)
    banned = source(False)
    guard.ask("ban-add", source=banned, seconds=60)
    guard.apply(policy(head="source: {ipv4: 24, ipv6: 48}"))
    assert answer(lab, banned, service.address, PORT) == "silence"
    # Trust counts for more than a ban, and at once.
    guard.apply(policy(head=f"trusted: [{banned}]"))
    service.connect(banned).talk()
    guard.apply(policy())
    assert answer(lab, banned, service.address, PORT) == "silence"


def test_by_the_command(guard: Guard, tmp_path: Path) -> None:
    file = tmp_path / "next.yaml"
    file.write_text(policy().replace("name: applied", "name: another"))
    done = guard.cli("policy", "apply", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("policy another is in force")
    shown = guard.json("policy", "show")
    assert shown == {"file": str(file), "text": file.read_text()}
    assert guard.status()["policy"]["name"] == "another"
    guard.apply(policy())


def test_a_bad_policy_leaves_the_old_one(guard: Guard, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(policy().replace("over: 1/m", "over: 0/m").replace("reset}", "rest}"))
    done = guard.cli("policy", "apply", str(file))
    assert done.returncode == 4
    assert done.stdout == ""
    errors = done.stderr.splitlines()
    assert [line.startswith(f"{file}:7:") for line in errors] == [True, True]
    with pytest.raises(ControlError, match=r"rules\[0\]"):
        guard.apply(file.read_text())
    assert guard.status()["policy"]["name"] == "applied"
    assert guard.filtering(), guard.status()["problems"]


def test_what_the_kernel_refuses_is_taken_back(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    """A set of ours that an administrator's own rule holds, of another kind, is in the way."""
    service = serve(COUNTED)
    address = source(False)
    lab.run("gateway", "ipset", "create", "rstguard-ports", "hash:ip")
    rule = ("INPUT", "-m", "set", "--match-set", "rstguard-ports", "src", "-j", "RETURN")
    lab.run("gateway", "iptables", "-w", "-A", *rule)
    try:
        with pytest.raises(ControlError, match="the old one stays"):
            guard.apply(policy(protect=f"interfaces: [out], ports: [{PORT}]"))
        assert guard.filtering()
        for _ in range(4):
            service.connect(address)
        assert refused(lab, address, service.address, COUNTED)
    finally:
        lab.run("gateway", "iptables", "-w", "-D", *rule)
    lab.run("gateway", "ipset", "destroy", "rstguard-ports")
    guard.apply(policy(protect=f"interfaces: [out], ports: [{PORT}]"))
    guard.apply(policy())


def is_gone(pid: int) -> bool:
    return not alive(pid)


def is_replaced(guard: Guard, pid: int) -> bool:
    return guard.status()["workers"][0]["pid"] not in (0, pid)


def test_on_failure_changes(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(PORT)
    cases = (("on_failure: closed", "silence", SILENCE), ("on_failure: open", "connected", 5))
    for head, seen, wait in cases:
        guard.apply(policy(head=head))
        worker = guard.status()["workers"][0]["pid"]
        os.kill(guard.pid, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        try:
            wait_until(partial(is_gone, worker))
            assert answer(lab, source(False), service.address, PORT, wait) == seen
        finally:
            os.kill(guard.pid, signal.SIGCONT)
        wait_until(partial(is_replaced, guard, worker))
        wait_until(guard.filtering)
        service.connect(source(False)).talk()


def test_a_worker_that_dies_meanwhile_comes_back_with_the_new_policy(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service = serve(OTHER)
    rule = f"""
  - {{name: other, measure: syn_rate, ports: [{OTHER}], over: 1/m, burst: 2, then: reset}}"""
    guard.apply(policy(rule))
    os.kill(guard.status()["workers"][0]["pid"], signal.SIGKILL)
    guard.apply(policy(rule))
    wait_until(guard.filtering)
    address = source(False)
    for _ in range(2):
        service.connect(address)
    assert refused(lab, address, service.address, OTHER)
    guard.apply(policy())


def stop_amid_changes(guard: Guard) -> None:
    """Stop a guard to which six clients apply one policy after the other."""
    over, texts = threading.Event(), itertools.cycle(VARIANTS)
    applied: list[bool] = []

    def apply() -> None:
        while not over.is_set():
            with contextlib.suppress(ControlError, OSError):
                guard.apply(next(texts))
                applied.append(True)

    crowd = [threading.Thread(target=apply) for _ in range(6)]
    for one in crowd:
        one.start()
    try:
        wait_until(lambda: len(applied) > 3)
        assert guard.stop() == 0
    finally:
        over.set()
        for one in crowd:
            one.join()


def test_policies_that_are_applied_while_the_guard_stops_leave_nothing(tmp_path: Path) -> None:
    with ThreeHosts("rgf9") as lab:
        for name in "abc":
            with Guard(lab, policy(), tmp_path / name, workers=2) as guard:
                stop_amid_changes(guard)
                assert leftovers(lab) == []
