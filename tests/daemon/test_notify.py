"""What systemd hears: each notice as it arrives at the socket, and from a guard that runs."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from rstguard.supervisor.notify import Notifier
from tests.support.guard import Guard
from tests.support.network import ThreeHosts

POLICY = """
version: 1
name: first
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: drop}
"""


class Listener:
    """The receiving end, as systemd holds it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def all(self) -> list[str]:
        """Return all fields heard so far."""
        while True:
            try:
                self.heard += self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return self.heard

    def hears(self, field: str) -> None:
        """Wait for a field; what was heard before it is forgotten."""
        wait_until(lambda: field in self.all(), 20)
        del self.heard[: self.heard.index(field) + 1]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(str(tmp_path / "notify"))
    yield listener
    listener.close()


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(tmp_path / "notify"), **more}


def test_each_notice_is_one_datagram_of_fields(tmp_path: Path, listener: Listener) -> None:
    notifier = Notifier(environment(tmp_path), 1)
    notifier.ready()
    notifier.alive()
    notifier.stopping()
    notifier.reloading()
    *first, usec = listener.all()
    assert first == ["READY=1", "WATCHDOG=1", "STOPPING=1", "STATUS=stopping", "RELOADING=1"]
    assert usec.startswith("MONOTONIC_USEC=")
    assert int(usec.partition("=")[2]) > 0


def test_an_abstract_name_is_understood() -> None:
    name = f"rstguard-test-{os.getpid()}"
    listener = Listener(f"\0{name}")
    Notifier({"NOTIFY_SOCKET": f"@{name}"}, 1).ready()
    assert listener.all() == ["READY=1"]
    listener.close()


def test_a_status_is_one_line_and_said_once(tmp_path: Path, listener: Listener) -> None:
    notifier = Notifier(environment(tmp_path), 1)
    for _ in range(3):
        notifier.status("two\nlines")
    assert listener.all() == ["STATUS=two lines"]


def test_without_a_socket_nothing_is_said_and_no_watchdog_waits() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"}, 1)
    notifier.ready()
    assert notifier.period is None


def test_a_lost_notice_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Notifier(environment(tmp_path), 1).ready()
    assert "systemd could not be told READY=1" in caplog.text


@pytest.mark.parametrize(
    ("more", "period"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(
    tmp_path: Path, more: dict[str, str], period: float | None
) -> None:
    assert Notifier(environment(tmp_path, **more), 7).period == period


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgn") as lab:
        yield lab


@pytest.fixture
def guard(
    lab: ThreeHosts, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guard]:
    """A guard that speaks to `listener`, which waits half a second for each sign of life."""
    for name, value in environment(tmp_path, WATCHDOG_USEC="500000").items():
        monkeypatch.setenv(name, value)
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        yield guard


@pytest.mark.netns
def test_a_guard_says_when_it_filters_lives_and_stops(guard: Guard, listener: Listener) -> None:
    listener.hears("STATUS=filtering; policy first (enforce), 2 workers")
    listener.hears("READY=1")
    listener.hears("WATCHDOG=1")
    listener.hears("WATCHDOG=1")
    assert guard.stop() == 0
    listener.hears("STOPPING=1")


def held(guard: Guard, child: int) -> int:
    """Kill a process and stop its successor before it serves.

    So that one never says that it is ready, and no death of a silent process ends this state.
    """
    while True:
        before = guard.children()
        os.kill(child, signal.SIGKILL)
        child = successor(guard, before)
        os.kill(child, signal.SIGSTOP)
        status = guard.status()
        if not all(row["ready"] for row in (*status["workers"], status["sweeper"])):
            return child


def successor(guard: Guard, before: list[int]) -> int:
    """Wait for a new process that runs its own program: until then the supervisor waits for it."""
    new: list[int] = []

    def begun() -> bool:
        new[:] = set(guard.children()) - set(before)
        named = re.compile(rb"\0rstguard\.(worker|sweeper)\0")
        return any(named.search(Path(f"/proc/{p}/cmdline").read_bytes()) for p in new)

    wait_until(begun)
    return new[0]


@pytest.mark.netns
@pytest.mark.parametrize("which", [0, 1, 2], ids=["worker", "other worker", "sweeper"])
def test_a_process_that_does_not_serve_is_told_and_restarts_nothing(
    guard: Guard, listener: Listener, which: int
) -> None:
    listener.hears("WATCHDOG=1")
    stopped = held(guard, guard.children()[which])
    name = ("worker (queue 5640)", "worker (queue 5641)", "sweeper")[which]
    said = f"STATUS=degraded: the {name} does not serve (starting)"
    wait_until(lambda: any(field.startswith(said) for field in listener.all()))
    del listener.heard[:]
    listener.hears("WATCHDOG=1")
    assert guard.cli("status").returncode == 1
    assert guard.cli("status", "--filtering").returncode == 0
    os.kill(stopped, signal.SIGCONT)
    wait_until(lambda: any(field.startswith("STATUS=filtering") for field in listener.all()))


@pytest.mark.netns
def test_no_sign_of_life_while_the_supervisor_hangs(guard: Guard, listener: Listener) -> None:
    listener.hears("WATCHDOG=1")
    os.kill(guard.pid, signal.SIGSTOP)
    listener.all()
    del listener.heard[:]
    with pytest.raises(TimeoutError):
        wait_until(lambda: "WATCHDOG=1" in listener.all(), 1.5)
    os.kill(guard.pid, signal.SIGCONT)
    listener.hears("WATCHDOG=1")
    wait_until(guard.filtering)
    assert guard.status()["workers"][0]["restarts"] == 0


@pytest.mark.netns
def test_a_hangup_reads_the_policy_again(guard: Guard, listener: Listener) -> None:
    listener.hears("READY=1")
    guard.file.write_text(POLICY.replace("first", "second"))
    os.kill(guard.pid, signal.SIGHUP)
    listener.hears("RELOADING=1")
    listener.hears("READY=1")
    assert guard.status()["policy"]["name"] == "second"


@pytest.mark.netns
def test_a_hangup_with_a_bad_policy_changes_nothing_and_says_why(
    guard: Guard, listener: Listener
) -> None:
    listener.hears("READY=1")
    guard.file.write_text(POLICY.replace("syn_rate", "sin_rate"))
    os.kill(guard.pid, signal.SIGHUP)
    listener.hears("RELOADING=1")
    listener.hears("READY=1")
    assert guard.filtering()
    assert guard.status()["policy"]["name"] == "first"
    assert "the old one stays" in guard.log.read_text()
    assert "sin_rate" in guard.log.read_text()
