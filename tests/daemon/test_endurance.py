"""Its processes are killed again and again, and cannot be started for a while: nobody suffers."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rstguard.kernel import KernelError
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import Queue
from rstguard.lab.guard import alive, leftovers
from rstguard.lab.waiting import wait_until
from tests.soak.load import Honest
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.stream import Stream
from tests.support.traffic import Open

pytestmark = pytest.mark.netns

PORT, BULK = 8001, 9000
POLICY = """
version: 1
name: endures
on_failure: open
sweep_every: 1s
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}
  - {name: crowd, measure: connection_rate, ports: [8002], over: 1/m, burst: 2, then: ban, for: 60s}
"""
BANS = 300
PIDS = Path("/sys/fs/cgroup/pids")
QUEUE = 5640
"""The number of the first queue."""


@contextmanager
def load(lab: ThreeHosts, serve: Open) -> Iterator[tuple[Honest, Stream]]:
    """Give the guard honest clients, and see afterwards that none of them has suffered."""
    bulk = serve(BULK).connect(source(False))
    with Honest(lab, [serve(PORT), serve(PORT + 10, True)], stay=5) as honest, Stream(bulk) as way:
        wait_until(lambda: honest.good > 20)
        yield honest, way
        more = honest.good + 20
        wait_until(lambda: honest.good > more)
    assert honest.failures == []
    assert honest.broken == []
    assert way.problems == []
    assert way.received == way.sent > 0


def ban_many(guard: Guard) -> set[str]:
    bans = [[f"198.18.{number >> 8}.{number & 255}", 3600] for number in range(BANS)]
    guard.ask("ban-import", bans=bans)
    return {str(ban[0]) for ban in bans}


def banned(guard: Guard) -> set[str]:
    return {row["source"] for row in guard.ask("ban-list")}


def kill_one(guard: Guard, chance: random.Random) -> int:
    """Kill a process of the guard, often one that has not come to serve yet; return its pid."""
    children = guard.children()
    if not children:
        return 0
    # The youngest come last: those that have just been started are most likely not ready.
    child = children[-1] if chance.random() < 0.5 else chance.choice(children)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return child


def endure(guard: Guard, kills: int, seed: int) -> list[float]:
    """Kill so many processes; return the seconds that recoveries took, looked at now and then."""
    chance = random.Random(seed)
    recoveries = []
    for number in range(1, kills + 1):
        child = kill_one(guard, chance)
        wait_until(lambda child=child: not alive(child))  # type: ignore[misc]
        time.sleep(chance.choice((0, 0, 0.05, 0.2)))  # the moment of the next is left to chance
        if number % 25 == 0:
            began = time.monotonic()
            wait_until(guard.filtering, 30)
            recoveries.append(time.monotonic() - began)
    return recoveries


def endures(lab: ThreeHosts, serve: Open, directory: Path, kills: int) -> list[float]:
    with Guard(lab, POLICY, directory) as guard:
        with load(lab, serve):
            sources = ban_many(guard)
            recoveries = endure(guard, kills, seed=kills)
            assert banned(guard) >= sources
        assert guard.stop() == 0
        assert leftovers(lab) == []
    return recoveries


def test_150_kills(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    recoveries = endures(lab, serve, tmp_path / "run", 150)
    print("recovered after", sorted(round(seconds, 2) for seconds in recoveries), "s")
    # Not the second that a quiet machine needs at most: this one may have other things to do.
    assert sorted(recoveries)[len(recoveries) // 2] < 3


@pytest.mark.soak_long
def test_1000_kills(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    recoveries = endures(lab, serve, tmp_path / "run", 1000)
    print("recovered after", sorted(round(seconds, 2) for seconds in recoveries), "s")
    assert max(recoveries) < 3


@pytest.mark.parametrize("kills", [pytest.param(5), pytest.param(50, marks=pytest.mark.soak_long)])
def test_the_supervisor_is_killed(lab: ThreeHosts, serve: Open, tmp_path: Path, kills: int) -> None:
    """It is started again as the service manager would; its rules, and who is banned, stay."""
    took = []
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        with load(lab, serve):
            sources = ban_many(guard)
            wait_until(lambda: kept(tmp_path / "run") >= BANS)
            for _ in range(kills):
                guard.kill9()
                began = time.monotonic()
                guard.start()
                took.append(time.monotonic() - began)
                assert banned(guard) >= sources
        assert guard.stop() == 0
        assert leftovers(lab) == []
    print("back after", sorted(round(seconds, 2) for seconds in took), "s")


def kept(directory: Path) -> int:
    """Return how many bans are on disk."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(directory / "state" / "state.db")) as database:
        return int(database.execute("SELECT count(*) FROM blocks").fetchone()[0])


@contextmanager
def few_processes(guard: Guard) -> Iterator[None]:
    """Let the guard have no more processes and threads than it has."""
    group = PIDS / f"rstguard-{guard.pid}"
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(guard.pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (group / "pids.max").write_text("max")
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (PIDS / "cgroup.procs").write_text(pid)
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


@contextmanager
def few_descriptors(guard: Guard) -> Iterator[None]:
    """Let the guard open no more files and sockets than it has."""
    before = resource.prlimit(guard.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(guard.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(guard.pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def queue_taken(guard: Guard) -> Iterator[None]:
    """Have another program read the first queue as soon as it is free."""
    stopped, taken = threading.Event(), threading.Event()

    def take() -> None:
        with guard.lab.inside("gateway"):
            while not stopped.is_set():
                try:
                    queue = Queue(QUEUE, fail_open=True, marks=Marks())
                except KernelError:
                    continue
                taken.set()
                while not stopped.wait(0.001):
                    if waiting := queue.receive(64, 0):
                        queue.give([(waiting[-1][0], True, None)])
                queue.close()

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield
        assert taken.is_set()
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize("limit", [few_processes, few_descriptors, queue_taken])
def test_processes_cannot_be_started_for_a_while(
    lab: ThreeHosts, serve: Open, tmp_path: Path, limit: object
) -> None:
    """Once such a moment was enough, and a worker or the sweeper was gone for good."""
    if limit is few_processes and not PIDS.is_dir():
        pytest.skip("there is no control group for processes here")
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        with load(lab, serve):
            sources = ban_many(guard)
            with limit(guard):  # type: ignore[operator]
                for child in guard.children():
                    os.kill(child, signal.SIGKILL)
                end = time.monotonic() + 4
                while time.monotonic() < end:
                    said = state_of(guard)
                    assert said in ("degraded", "not filtering", "filtering", "no answer")
                    time.sleep(0.1)
                assert said != "filtering"
            began = time.monotonic()
            try:
                wait_until(guard.filtering, 15)
            except TimeoutError:
                print(guard.log.read_text()[-6000:])
                raise
            print("filtering again after", round(time.monotonic() - began, 2), "s")
            assert banned(guard) >= sources
        assert guard.stop() == 0
        assert leftovers(lab) == []


def state_of(guard: Guard) -> str:
    """Return what status says; without a descriptor no connection can be accepted."""
    from rstguard.ipc.requests import ControlError

    try:
        return str(guard.ask("status")["state"])
    except ControlError:
        return "no answer"
