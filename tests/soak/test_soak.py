"""Hours of trouble in minutes: nothing grows, nothing stays, and the counters add up.

Three minutes in every test run; ``make soak`` takes half an hour.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import median

import pytest

from rstguard.kernel.nfqueue import QueueState, states
from rstguard.lab.guard import leftovers
from rstguard.lab.waiting import wait_until
from tests.soak.load import CROWD, HONEST, IDLE, OUTSIDE, POLICY, Honest, Trouble
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources
from tests.support.traffic import Service, services

pytestmark = pytest.mark.netns

KILL_EVERY = 45.0
SAMPLE_EVERY = 2.0
SPARED = 3.0
"""Seconds around a worker's death in which a client may miss it."""
GROWTH, SLACK_MB = 1.05, 3.0
SYSCTLS = ("acct", "timestamp", "tcp_be_liberal", "tcp_loose")
SHORTER = os.environ.get("RSTGUARD_SOAK_SECONDS")


class Sample:
    """Memory (MB) and open files of each process that is never killed."""

    def __init__(self, processes: dict[str, int]) -> None:
        self.memory = {name: resident_mb(pid) for name, pid in processes.items()}
        self.files = {
            name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in processes.items()
        }


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def queue_of(lab: ThreeHosts, number: int) -> QueueState:
    with lab.inside("gateway"):
        return states()[number]


def sysctls(lab: ThreeHosts) -> list[str]:
    names = [f"net.netfilter.nf_conntrack_{name}" for name in SYSCTLS]
    return lab.run("gateway", "sysctl", *names, "net.ipv4.tcp_syncookies").splitlines()


@pytest.mark.timeout(600)
def test_three_minutes(tmp_path: Path) -> None:
    soak(float(SHORTER or 180), tmp_path)


@pytest.mark.soak_long
def test_half_an_hour(tmp_path: Path) -> None:
    soak(float(SHORTER or 1800), tmp_path)


def soak(seconds: float, directory: Path) -> None:
    with ThreeHosts("rgs") as lab:
        give_sources(lab)
        before = sysctls(lab)
        honest4, honest6 = Service(lab, HONEST), Service(lab, HONEST, v6=True)
        others = [Service(lab, port) for port in (OUTSIDE, CROWD, IDLE)]
        with services(honest4, honest6, *others):
            with Guard(lab, POLICY, directory / "run") as guard:
                honest = Honest(lab, [honest4, honest6], stay=5)
                trouble = Trouble(guard, honest4.address, others[-1], victim=1, seed=1)
                with honest:
                    samples = endure(guard, trouble, honest, seconds)
                judge(samples)
                add_up(guard)
                assert not honest.broken, honest.broken[:5]
                unexplained = [
                    why
                    for when, why in honest.failures
                    if not any(-6 < when - death < SPARED for death in trouble.killed)
                ]
                asked = honest.good + len(honest.failures)
                print(f"honest: {honest.good} of {asked} served, {len(unexplained)} not explained")
                assert len(unexplained) <= asked / 100, unexplained[:5]
                assert asked > seconds, "hardly anybody was there"
                assert guard.stop() == 0
            assert leftovers(lab) == []
            assert sysctls(lab) == before


def endure(guard: Guard, trouble: Trouble, honest: Honest, seconds: float) -> list[Sample]:
    """Make trouble for so long; return what the processes held meanwhile."""
    status = guard.status()
    processes = {
        "supervisor": guard.pid,
        "worker": status["workers"][0]["pid"],
        "sweeper": status["sweeper"]["pid"],
    }
    began = time.monotonic()
    samples: list[Sample] = []
    told = killed = sampled = began
    while (now := time.monotonic()) - began < seconds:
        trouble.next()
        if now - killed >= KILL_EVERY:
            killed = now
            trouble.kill_worker()
        if now - sampled >= SAMPLE_EVERY:
            sampled = now
            samples.append(Sample(processes))
        if now - told >= 10 and samples:
            told = now
            shown = ", ".join(f"{name} {mb:.0f} MB" for name, mb in samples[-1].memory.items())
            print(f"{now - began:.0f} s: {honest.good} served, {shown}", flush=True)
    assert guard.status()["workers"][0]["pid"] == processes["worker"], "it was not to die"
    print("done:", trouble.done, "workers killed:", len(trouble.killed))
    return samples


def judge(samples: list[Sample]) -> None:
    """The last third holds no more than the middle one."""
    third = len(samples) // 3
    assert third, "too short to tell"
    for name in samples[0].memory:
        middle = median(sample.memory[name] for sample in samples[third : 2 * third])
        last = median(sample.memory[name] for sample in samples[2 * third :])
        files = [sample.files[name] for sample in samples]
        print(f"{name}: {middle:.1f} MB, then {last:.1f} MB; {files[third]} to {files[-1]} files")
        assert last <= middle * GROWTH + SLACK_MB, f"{name} grew from {middle} to {last} MB"
        assert median(files[2 * third :]) <= median(files[third : 2 * third]), name


def add_up(guard: Guard) -> None:
    """Every packet that the kernel queued for the worker that never died got a verdict."""
    number = guard.status()["workers"][0]["queue"]

    def equal() -> bool:
        queue, worker = queue_of(guard.lab, number), guard.status()["workers"][0]
        return queue.waiting == 0 and queue.last_id - queue.dropped_reader == worker["packets"]

    try:
        wait_until(equal)
    finally:
        state, status = queue_of(guard.lab, number), guard.status()
        print(f"queued {state.last_id}, verdicts {status['workers'][0]['packets']}, {state}")
    assert status["counts"].get("failed", 0) == 0
