"""Processes of the guard die, or hang; what passes meanwhile is what the policy says."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from rstguard.control.protocol import NoDaemon
from rstguard.kernel.condemning import condemn
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Labels, Marks
from rstguard.lab.guard import alive, leftovers
from rstguard.lab.waiting import wait_until
from rstguard.sweeper.condemner import select
from tests.support.crowd import Crowd
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Open, answer, connect, segments

pytestmark = pytest.mark.netns

PORT = 8001
SYSCTLS = ("acct", "timestamp", "tcp_be_liberal", "tcp_loose")


def policy(on_failure: str = "open", rules: str = "") -> str:
    return f"""
version: 1
name: deaths
on_failure: {on_failure}
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}}
  - {{name: crowd, measure: connection_rate, ports: [8002], over: 1/m, burst: 2,
     then: ban, for: 60s}}
  - {{name: old, measure: age, ports: [8003], over: 1s, then: reset}}
{rules}"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def old_values(lab: ThreeHosts) -> dict[str, str]:
    """Set what the guard changes to what a fresh machine has; return it."""
    values = dict(zip(SYSCTLS, ("0", "0", "1", "1"), strict=True))
    lab.set("gateway", {f"net/netfilter/nf_conntrack_{key}": val for key, val in values.items()})
    return values


def sysctls(lab: ThreeHosts) -> dict[str, str]:
    with lab.inside("gateway"):
        root = Path("/proc/sys/net/netfilter")
        return {key: (root / f"nf_conntrack_{key}").read_text().strip() for key in SYSCTLS}


def restarted(guard: Guard, child: str) -> bool:
    status = guard.status()
    one = status["workers"][0] if child == "worker" else status["sweeper"]
    return bool(one["restarts"] == 1 and one["ready"] and one["pid"])


def has_restarts(guard: Guard, count: int) -> bool:
    return bool(guard.status()["workers"][0]["restarts"] == count)


def test_fail_open_the_worker_is_killed(lab: ThreeHosts, directory: Path, serve: Open) -> None:
    service, busy = serve(PORT), serve(9000)
    with Guard(lab, policy(), directory, workers=1) as guard:
        link = busy.connect(source(False))
        with Crowd(lab, service).at_work() as crowd:
            worker = guard.status()["workers"][0]["pid"]
            os.kill(worker, signal.SIGKILL)
            crowd.more(50)
            wait_until(lambda: restarted(guard, "worker"), 5)
            wait_until(guard.filtering, 5)
            crowd.more(50)
        assert crowd.failures == []
        link.talk()
        # The new one does its work.
        bad = serve(8002)
        address = source(False)
        for _ in range(6):
            with contextlib.suppress(OSError):
                connect(lab, address, bad.address, 8002, 0.5).close()
        wait_until(lambda: guard.block_of(address) is not None)
        assert any(event["kind"] == "restart" for event in guard.status()["recent"])


@BOTH_FAMILIES
def test_fail_open_the_worker_hangs(
    lab: ThreeHosts, directory: Path, serve: Open, v6: bool
) -> None:
    """A queue that nobody reads fills up; what comes then passes."""
    service = serve(PORT, v6)
    with Guard(lab, policy(), directory, workers=1) as guard:
        worker = guard.status()["workers"][0]["pid"]
        os.kill(worker, signal.SIGSTOP)
        segments(lab, source(v6), service.address, PORT, "S", 4200)
        service.connect(source(v6)).talk()
        os.kill(worker, signal.SIGCONT)
        service.connect(source(v6)).talk()
        assert guard.status()["workers"][0]["restarts"] == 0


@BOTH_FAMILIES
def test_fail_closed_without_a_worker(
    lab: ThreeHosts, directory: Path, serve: Open, v6: bool
) -> None:
    service = serve(PORT, v6)
    with Guard(lab, policy("closed"), directory, workers=1) as guard:
        old = service.connect(source(v6))
        worker = guard.status()["workers"][0]["pid"]
        os.kill(guard.pid, signal.SIGSTOP)  # so that nobody starts another
        os.kill(worker, signal.SIGKILL)
        try:
            wait_until(lambda: not alive(worker))
            assert answer(lab, source(v6), service.address, PORT) == "silence"
            old.talk()
        finally:
            os.kill(guard.pid, signal.SIGCONT)
        wait_until(lambda: restarted(guard, "worker"), 5)
        service.connect(source(v6)).talk()
        os.kill(guard.status()["workers"][0]["pid"], signal.SIGSTOP)
        assert answer(lab, source(v6), service.address, PORT) == "silence"
        old.talk()


def test_the_sweeper_is_killed(lab: ThreeHosts, directory: Path, serve: Open) -> None:
    service = serve(8003)
    with Guard(lab, policy(), directory, workers=1) as guard:
        os.kill(guard.status()["sweeper"]["pid"], signal.SIGKILL)
        wait_until(lambda: restarted(guard, "sweeper"), 5)
        link = service.connect(source(False))
        link.wait_reset()
        assert guard.filtering()


def test_what_a_killed_sweeper_condemned_is_killed_by_the_next(
    lab: ThreeHosts, directory: Path, serve: Open
) -> None:
    service = serve(PORT)
    with Guard(lab, policy(), directory, workers=1) as guard:
        link, spared = service.connect(source(False)), service.connect(source(False))
        link.talk()
        with lab.inside("gateway"), Conntrack() as table:
            (flow,) = select(table.dump(), source_port=link.port)
            assert condemn(table, [flow], Labels(), *Marks().condemned) == [0]
        assert not link.dead
        os.kill(guard.status()["sweeper"]["pid"], signal.SIGKILL)
        link.wait_reset()
        spared.talk()


def test_a_child_that_dies_at_once_again_and_again(
    lab: ThreeHosts, directory: Path, serve: Open
) -> None:
    """It is started again, but not as fast as the machine can."""
    service = serve(PORT)
    with Guard(lab, policy(), directory, workers=1) as guard:
        for count in range(1, 7):
            wait_until(lambda: guard.status()["workers"][0]["ready"])
            os.kill(guard.status()["workers"][0]["pid"], signal.SIGKILL)
            wait_until(partial(has_restarts, guard, count))
        service.connect(source(False)).talk()
        wait_until(guard.filtering, 5)


def test_kill_9_of_the_supervisor_and_cleanup(
    lab: ThreeHosts, directory: Path, serve: Open, old_values: dict[str, str]
) -> None:
    service = serve(PORT)
    with Guard(lab, policy(), directory, workers=1) as guard:
        assert sysctls(lab) != old_values
        link = service.connect(source(False))
        children = guard.children()
        assert len(children) == 2
        guard.kill9()
        service.connect(source(False)).talk()
        wait_until(lambda: not any(map(alive, children)), 3)
        service.connect(source(False)).talk()
        link.talk()
        with pytest.raises(NoDaemon):
            guard.status()
        assert leftovers(lab)
        done = guard.cli("cleanup")
        assert done.returncode == 0, done.stderr
        assert "chains and jumps removed" in done.stdout
        assert "sets removed: " in done.stdout
        assert "rstguard-ban4, rstguard-ban6, " in done.stdout
        assert leftovers(lab) == []
        assert sysctls(lab) == old_values
        assert not (directory / "control.sock").exists()
        assert not (directory / "sysctls.json").exists()
        assert guard.cli("cleanup").stdout == "there was nothing to clean up\n"
        link.talk()


def test_another_run_takes_over_after_kill_9(
    lab: ThreeHosts, directory: Path, serve: Open, old_values: dict[str, str]
) -> None:
    service = serve(PORT)
    with Guard(lab, policy(), directory, workers=1) as guard:
        banned = source(False)
        guard.ask("ban-add", source=network_of(banned), seconds=100)
        link = service.connect(source(False))
        children = guard.children()
        guard.kill9()
        wait_until(lambda: not any(map(alive, children)), 3)
        guard.start()
        link.talk()
        service.connect(source(False)).talk()
        block = guard.block_of(banned)
        assert block["kind"] == "ban"
        assert 60 < block["remaining_s"] <= 100
        assert answer(lab, banned, service.address, PORT) == "silence"
        assert guard.stop() == 0
        assert leftovers(lab) == []
        assert sysctls(lab) == old_values


def test_sigterm_leaves_nothing(
    lab: ThreeHosts, directory: Path, serve: Open, old_values: dict[str, str]
) -> None:
    service = serve(PORT)
    with (
        Guard(lab, policy(), directory, workers=1) as guard,
        Crowd(lab, service).at_work() as crowd,
    ):
        children = guard.children()
        link = serve(9000).connect(source(False))
        assert guard.stop() == 0
        assert not any(map(alive, children))
        assert leftovers(lab) == []
        assert sysctls(lab) == old_values
        crowd.more(10)
        link.talk()
    assert crowd.failures == []
    assert sorted(path.name for path in directory.iterdir()) == [
        "guard.log",
        "policy.yaml",
        "state",
    ]


def test_keep_bans(
    lab: ThreeHosts, directory: Path, serve: Open, old_values: dict[str, str]
) -> None:
    service = serve(PORT)
    banned, six = source(False), source(True)
    with Guard(lab, policy(), directory, "--keep-bans", workers=1) as guard:
        for address in (banned, six):
            guard.ask("ban-add", source=network_of(address), seconds=100)
        assert guard.stop() == 0
        assert not any("-j" in line for line in leftovers(lab))
        assert any("rstguard-ban4" in line for line in leftovers(lab))
        assert sysctls(lab) == old_values
        service.connect(banned).talk()  # with the guard gone, nothing looks into the sets
        guard.start()
        for address in (banned, six):
            assert 60 < guard.block_of(address)["remaining_s"] < 100
        assert answer(lab, banned, service.address, PORT) == "silence"
    done = guard.cli("cleanup")
    assert done.returncode == 0, done.stderr
    assert leftovers(lab) == []


def test_fail_closed_outlasts_the_guard(lab: ThreeHosts, directory: Path, serve: Open) -> None:
    """Killed altogether, a guard that fails closed lets nothing new pass until it is back."""
    service = serve(PORT)
    with Guard(lab, policy("closed"), directory, workers=1) as guard:
        old = service.connect(source(False))
        children = guard.children()
        guard.kill9()
        wait_until(lambda: not any(map(alive, children)), 3)
        assert answer(lab, source(False), service.address, PORT) == "silence"
        old.talk()
        guard.start()
        service.connect(source(False)).talk()
        guard.kill9()
        assert guard.cli("cleanup").returncode == 0
        service.connect(source(False)).talk()
        old.talk()


@BOTH_FAMILIES
@pytest.mark.parametrize("tracked", [True, False])
def test_connections_older_than_the_guard(
    lab: ThreeHosts,
    directory: Path,
    serve: Open,
    old_values: dict[str, str],
    v6: bool,
    tracked: bool,
) -> None:
    """They live on, and are under its rules as far as the kernel knows of them."""
    tracking = ("FORWARD", "-m", "conntrack", "--ctstate", "NEW")
    if not tracked:
        for each in ("iptables", "ip6tables"):
            lab.run("gateway", each, "-w", "-D", *tracking)
        lab.run("gateway", "conntrack", "-F")
    try:
        service, judged = serve(PORT, v6), serve(8003, v6)
        address = source(v6)
        link, other, old = service.connect(address), service.connect(source(v6)), judged.connect()
        link.talk()
        with Guard(lab, policy(), directory, workers=1) as guard:
            if tracked:
                old.wait_reset()
            link.talk()
            other.talk()
            guard.ask("ban-add", source=network_of(address), seconds=60)
            link.wait_reset()
            other.talk()
            assert guard.stop() == 0
        other.talk()
    finally:
        if not tracked:
            for each in ("iptables", "ip6tables"):
                lab.run("gateway", each, "-w", "-A", *tracking)
    assert sysctls(lab) == old_values
