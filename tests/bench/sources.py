"""A million sources, ten million forged ones: how much memory a worker takes at most."""

from __future__ import annotations

import gc
import pickle
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rstguard.engine.engine import Engine
from rstguard.engine.wire import parse as read_packet
from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import load, parse
from tests.bench.engine_speed import syns
from tests.bench.figures import Figure, at_most
from tests.bench.gateway import EXAMPLE, Site, memory_mb, policy_of
from tests.bench.queue_speed import flooder

GOAL_MB = 300.0
SOURCES = 1_000_000
FORGED = 10_000_000
_FLAGS = "2 0 16"
"""For the queue: SYNs, segments without any flag, and ACKs of no connection, in turn."""

_QUIET = (
    "name: syn-rate, measure: syn_rate, over: 1/h, burst: 100, then: ban, for: 1h",
    "name: met, measure: connection_rate, over: 1/h, burst: 100, then: ban, for: 1h",
    "name: half-open, measure: half_open, over: 100, within: 10m, then: ban, for: 1h",
    "name: ports, measure: distinct_ports, over: 100, within: 10m, then: ban, for: 1h",
    "name: hosts, measure: distinct_hosts, over: 100, within: 10m, then: ban, for: 1h",
    "name: flags, measure: bad_flags, over: 1/h, burst: 100, then: ban, for: 1h",
    "name: strays, measure: out_of_state, over: 1/h, burst: 100, then: ban, for: 1h",
    "name: resets, measure: reset_rate, over: 1/h, burst: 100, then: ban, for: 1h",
    "name: short, measure: short_connections, shorter_than: 1h, over: 100/h, then: ban, for: 1h",
    "name: stalled, measure: stalled, window: 1000, over: 1h, then: reset",
)
"""Every measure that a worker counts by source, with limits that nobody crosses."""

_ESCALATE = "escalate: {factor: 2, up_to: 24h, memory: 7d}"
_CROSSED = (
    *_QUIET,
    f"name: once, measure: bad_flags, over: 1/h, burst: 1, then: ban, for: 1m, {_ESCALATE}",
)
"""And one that every source crosses, so that offences and orders are remembered as well."""


_RATE = 25_000.0
"""Packets a second that are all judged on a busy machine, too."""


def sources() -> Iterator[Figure]:
    """Memory of a worker after a million different sources, and ten million forged ones."""
    ruleset = compile_policy(parse(policy_of(*_CROSSED), "bench").policy)
    # A process of its own, that knows the engine only, as a worker does.
    command = [sys.executable, "-m", "tests.bench.fill", str(SOURCES)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, input=pickle.dumps(ruleset))
    before, after = (kilobytes * 1024 / 1e6 for kilobytes in map(int, done.stdout.split()))
    yield at_most(
        GOAL_MB,
        f"memory: engine alone, {SOURCES:,} sources",
        [after],
        "MB",
        "every measure that a worker counts by source at once; half of the sources IPv6; each "
        f"sends a SYN, a first ACK, a small window, a stray, bad flags twice, a FIN or RST, and "
        f"is banned; {before:.0f} MB before",
    )
    yield at_most(
        GOAL_MB,
        f"memory: engine, example policy, {FORGED:,} forged sources",
        [_forged_mb()],
        "MB",
        "what this process grew by while it judged a SYN of each",
    )
    with Site() as site:
        guard = site.guard(policy_of(*_QUIET))
        worker = guard.workers[0]
        empty = memory_mb(worker)
        flood = flooder(site)(120.0, _RATE, 1, _FLAGS)
        wait_until(lambda: _packets(guard) >= SOURCES, 110)
        full = memory_mb(worker)
        flood.terminate()
        guard.stop()
    yield at_most(
        GOAL_MB,
        f"memory: worker behind the queue, {SOURCES:,} sources",
        [full],
        "MB",
        "VmHWM; the same measures with limits that nobody crosses; SYNs, null segments and strays "
        f"in turn, one of each source, {_RATE:,} a second, which it can judge; "
        f"{empty:.0f} MB before",
    )


def _forged_mb() -> float:
    guard, chance, now = Engine(compile_policy(load(EXAMPLE).policy)), random.Random(1), 10**18
    gc.collect()
    gc.disable()  # as in the worker
    before = _resident_mb()
    for _ in range(FORGED // 100_000):
        for data in syns(chance, 100_000):
            guard.decide(read_packet(data), now)
            now += 8_000
    after = _resident_mb()
    gc.enable()
    return after - before


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _packets(guard: GuardProcess) -> int:
    time.sleep(0.2)  # asking costs the guard something, too
    return int(guard.status()["counts"].get("packets", 0))
