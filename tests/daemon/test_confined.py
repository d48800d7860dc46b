"""Workers and sweeper of a guard are confined, work as before, and tell of what is forbidden."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.kernel.readers import BINDING, BUILT_IN, CHOICE
from rstguard.lab.guard import alive, leftovers
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Open, answer

pytestmark = pytest.mark.netns

PORT, BANNING = 8001, 8002
POLICY = f"""
version: 1
name: locked
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}}
  - {{name: crowd, measure: connection_rate, ports: [{BANNING}], over: 1/m, burst: 2,
     then: ban, for: 60s}}
"""


@pytest.fixture(params=[BUILT_IN, BINDING])
def guard(
    request: pytest.FixtureRequest, lab: ThreeHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guard]:
    monkeypatch.setenv(CHOICE, request.param)
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        yield guard


def status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def restarts(guard: Guard) -> list[str]:
    lines = guard.cli("events", "--json").stdout.splitlines()
    return [one["detail"] for one in map(json.loads, lines) if one["kind"] == "restart"]


def test_at_work_from_start_to_end(guard: Guard, lab: ThreeHosts, serve: Open) -> None:
    """Bans, lists that are long, a dump, a kill, another policy, an orderly stop: nothing dies."""
    for pid in guard.children():
        shown = status(pid)
        assert set(shown["Uid"].split()) == set(shown["Gid"].split()) == {"61029"}
        assert int(shown["CapEff"], 16) == int(shown["CapBnd"], 16) == 1 << 12
        assert (shown["NoNewPrivs"], shown["Seccomp"]) == ("1", "2")
    assert status(guard.pid)["Uid"].split()[0] == "0"
    service, address = serve(BANNING), source(False)
    first = service.connect(address)
    for _ in range(4):
        answer(lab, address, service.address, BANNING)
    wait_until(lambda: guard.block_of(address) is not None)
    first.wait_reset()
    bans = "".join(f"198.18.{n >> 8}.{n & 255} 600\n" for n in range(3000))
    file = guard.runtime / "bans.txt"
    file.write_text(bans)
    done = guard.cli("ban", "import", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    link = serve(PORT).connect(source(False))
    assert guard.kill(port=PORT)["confirmed"] == 1
    link.wait_reset()
    guard.apply(POLICY.replace("name: locked", "name: second"))
    assert restarts(guard) == []
    children = guard.children()
    assert guard.stop() == 0
    assert not any(map(alive, children))
    assert leftovers(lab) == []
    said = guard.log.read_text()
    assert "confine" not in said, said
    assert "most recent call" not in said, said


@pytest.mark.parametrize("kind", ["worker", "sweeper"])
def test_a_forbidden_call_is_told(lab: ThreeHosts, tmp_path: Path, kind: str) -> None:
    """The signal stands for the call: the kernel sends it in its place."""
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        now = guard.status()
        pid = now["sweeper"]["pid"] if kind == "sweeper" else now["workers"][0]["pid"]
        os.kill(pid, signal.SIGSYS)
        wait_until(lambda: len(restarts(guard)) == 1)
        assert "made a system call that its confinement forbids" in restarts(guard)[0]
        wait_until(guard.filtering)
        said = guard.log.read_text()
        assert 'File "' in said
        assert " in run" in said


def test_a_directory_that_others_may_write_is_refused(lab: ThreeHosts, tmp_path: Path) -> None:
    guard = Guard(lab, POLICY, tmp_path / "run")
    guard.runtime.chmod(0o1777)
    guard.launch()
    assert guard.wait() == 1
    assert "others than root may write to the directory" in guard.log.read_text()
    guard.runtime.chmod(0o755)
    (guard.runtime / "state").mkdir()
    os.chown(guard.runtime / "state", 1000, 0)
    guard.launch()
    assert guard.wait() == 1
    assert f"others than root may write to the directory {guard.runtime}/state" in (
        guard.log.read_text()
    )
    assert leftovers(lab) == []


def test_another_s_panic_file_is_not_obeyed(lab: ThreeHosts, tmp_path: Path) -> None:
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        panic = guard.runtime / "panic"
        panic.touch()
        os.chown(panic, 1000, 1000)
        wait_until(lambda: f"{panic} is not a file that only root may" in guard.log.read_text())
        assert guard.filtering()
        assert not guard.status()["panic"]
