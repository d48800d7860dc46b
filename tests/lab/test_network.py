"""The networks that lab, tests and benchmarks are built on: nothing of them stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rstguard.lab import LabError, guard
from rstguard.lab.guard import GuardProcess, alive
from rstguard.lab.namespace import NAMED, inside
from rstguard.lab.network import Host, Network, remove_namespace
from rstguard.lab.waiting import wait_until

pytestmark = pytest.mark.netns

STEM = f"rgx-{os.getpid()}"
HOSTS = {"gateway": Host({"eth0": ("192.0.2.1/24",)}), "far": Host({"eth0": ("192.0.2.2/24",)})}
LINK = (("gateway", "eth0"), ("far", "eth0"))
HOLD = """
import signal, sys
from rstguard.lab.network import Host, Network
network = Network(sys.argv[1], {"gateway": Host()})
network.__enter__()
print(network.start("gateway", "sleep", "600").pid, flush=True)
signal.pause()
"""
MOTHER = """
import subprocess, time
subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"])
time.sleep(600)
"""


def there(stem: str = STEM) -> list[str]:
    return sorted(path.name for path in NAMED.glob(f"{stem}-*"))


def test_hosts_are_linked_addressed_and_gone_afterwards() -> None:
    with Network(STEM, HOSTS, [LINK]) as network:
        assert there() == [f"{STEM}-far", f"{STEM}-gateway"]
        with network.inside("gateway"):
            server = socket.create_server(("192.0.2.1", 80))
        with server, network.inside("far"), socket.create_connection(("192.0.2.1", 80), 10) as one:
            assert one.getsockname()[0] == "192.0.2.2"
        directory = network.directory
        program = network.start("far", "sleep", "600", log="sleep.log")
        assert (directory / "sleep.log").exists()
    assert there() == []
    assert not directory.exists()
    assert program.returncode is not None


def test_what_cannot_be_built_is_removed_as_far_as_it_got() -> None:
    hosts = {**HOSTS, "wrong": Host({"eth9": ("192.0.2.3/24",)})}
    with pytest.raises(LabError, match="eth9"):
        Network(STEM, hosts, [LINK]).__enter__()
    assert there() == []


def test_a_thread_comes_back_from_a_namespace_whatever_happens() -> None:
    def here() -> int:
        return Path("/proc/thread-self/ns/net").stat().st_ino

    home = here()
    with Network(STEM, HOSTS, [LINK]) as network:
        with pytest.raises(ZeroDivisionError), network.inside("far"):
            assert 1 // (here() == home)
        with pytest.raises(FileNotFoundError), inside(f"{STEM}-nowhere"):
            pass
        assert here() == home


def test_a_killed_owner_leaves_no_program() -> None:
    command = [sys.executable, "-c", HOLD, f"{STEM}-held"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        sleeper = int(holder.stdout.readline())
        line = Path(f"/proc/{sleeper}/cmdline")
        wait_until(lambda: line.read_bytes() == b"sleep\x00600\x00")  # it is tied by now
        holder.kill()
    try:
        wait_until(lambda: not alive(sleeper))
    finally:
        remove_namespace(f"{STEM}-held-gateway")


def test_a_guard_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        Network(STEM, HOSTS, [LINK]) as network,
        pytest.raises(LabError, match=r"The guard did not start: .*policy\.yaml:2:"),
        GuardProcess(network, "version: 1\nrules: [", tmp_path / "run"),
    ):
        pass


def test_children_that_live_on_without_their_guard_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mother(GuardProcess):
        def words(self, *_words: str) -> list[str]:
            return [sys.executable, "-c", MOTHER]

    monkeypatch.setattr(guard, "_ORPHAN_SECONDS", 0.1)
    with Network(STEM, HOSTS, [LINK]) as network:
        mother = Mother(network, "", tmp_path / "run")
        mother.launch()
        wait_until(lambda: mother.log.read_text() != "")
        (child,) = mother.children()
        with pytest.raises(LabError, match="lived on without it"):
            mother.end()
        wait_until(lambda: not alive(child))
