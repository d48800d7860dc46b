"""The lab's network: it works in both families, and nothing of it stays, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rstguard.lab import LabError
from rstguard.lab.server import start_server
from rstguard.lab.topology import SERVER, SERVER6, Lab, remove_stale

HOLD = """
import signal
from rstguard.lab.topology import Lab, ended_by_signals
# A background job may have been started with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with ended_by_signals(), Lab() as lab:
    lab.start("server", "sleep", "600", log="sleep.log")
    print(lab.directory, flush=True)
    signal.pause()
"""


def namespaces(pid: int) -> list[str]:
    return sorted(path.name for path in Path("/run/netns").glob(f"rgl-{pid}-*"))


def fail_with_a_sleeper(lab: Lab, sleepers: list[subprocess.Popen[str]]) -> None:
    with lab:
        sleepers.append(lab.start("server", "sleep", "600", log="sleep.log"))
        lab.run("server", "false")


@pytest.mark.netns
def test_each_client_address_is_answered_through_the_gateway() -> None:
    with Lab() as lab:
        directory = lab.directory
        assert len(namespaces(os.getpid())) == 5
        start_server(lab)
        program = [sys.executable, "-m", "rstguard.lab.client"]
        client = lab.start("client", *program, piped=True, log="client.log")
        assert client.stdout
        assert client.stdout.readline() == "ready\n", lab.log_tail("client.log")
        requests = json.loads(client.communicate(timeout=30)[0])
        assert [failure for _start, _seconds, _source, failure in requests if failure] == []
        assert "via 198.51.100.1" in lab.run("client", "ip", "route", "get", SERVER)
        assert "via 2001:db8:c" in lab.run("client", "ip", "route", "get", SERVER6)
    assert namespaces(os.getpid()) == []
    assert not directory.exists()


@pytest.mark.netns
def test_a_lab_that_fails_is_removed_with_its_programs() -> None:
    sleepers: list[subprocess.Popen[str]] = []
    with pytest.raises(LabError, match=r"server false' failed: no reason given"):
        fail_with_a_sleeper(Lab(), sleepers)
    assert [sleeper.poll() is None for sleeper in sleepers] == [False]
    assert namespaces(os.getpid()) == []


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_the_lab(number: signal.Signals) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    directory = Path(holder.stdout.readline().strip())
    assert len(namespaces(holder.pid)) == 5
    holder.send_signal(number)
    holder.communicate(timeout=30)
    assert namespaces(holder.pid) == []
    assert not directory.exists()


@pytest.mark.netns
def test_what_a_killed_lab_left_is_removed_by_the_next() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    directory = Path(holder.stdout.readline().strip())
    holder.kill()
    holder.communicate(timeout=30)
    assert len(namespaces(holder.pid)) == 5
    remove_stale()
    assert namespaces(holder.pid) == []
    assert not directory.exists()
