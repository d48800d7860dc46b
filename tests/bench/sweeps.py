"""What one sweep over a large connection table costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rstguard.kernel.marks import Marks
from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_most, seen
from tests.bench.gateway import PORT, SERVER, Site, example_policy, memory_mb

CONNECTIONS = 100_000
MILLION = 1_000_000
GOAL_MS = 700.0
_SWEEPS = 4
_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_PAUSE = 4.5
"""Seconds in which there are two sweeps over 100,000 connections, or so."""
_OF_ONE = 100
"""Connections of one source: half of what the example policy allows."""


def sweeps() -> Iterator[Figure]:
    """Processor time of one sweep over 100,000 connections."""
    costs, _ = _sweep(CONNECTIONS, _SWEEPS)
    note = f"example policy, established connections of {CONNECTIONS // _OF_ONE:,} sources"
    yield at_most(GOAL_MS, f"sweep: {CONNECTIONS:,} connections", costs, "CPU ms", note)


def million() -> Iterator[Figure]:
    """The same over a million, and what they cost against 100,000."""
    before = _LIMIT.read_text()
    _LIMIT.write_text(str(MILLION + CONNECTIONS))  # the tracker has one limit for all namespaces
    try:
        tenth, _ = _sweep(CONNECTIONS, _SWEEPS)
        costs, memory = _sweep(MILLION, 2)
    finally:
        _LIMIT.write_text(before)
    yield seen(f"sweep: {MILLION:,} connections", costs, "CPU ms")
    note = f"10 would be linear; the sweeper holds {memory:,.0f} MB then"
    yield seen(
        "sweep: a million / 100,000 connections", [c / median(tenth) for c in costs], "", note
    )


def _sweep(connections: int, sweeps: int) -> tuple[list[float], float]:
    """Return what sweeps cost (CPU ms), and the sweeper's memory (MB)."""
    with Site() as site:
        guard = site.guard(example_policy())
        file = site.directory / "connections"
        file.write_text("".join(map(_line, range(connections))))
        site.run("gateway", "conntrack", "-R", str(file))
        wait_until(lambda: _counts(guard)["flows"] == connections, 120)
        costs = [_cost_of_next(guard, connections) for _ in range(sweeps)]
        memory = memory_mb(int(guard.status()["sweeper"]["pid"]))
        guard.stop()
    return costs, memory


def _cost_of_next(guard: GuardProcess, connections: int) -> float:
    before = _counts(guard)
    time.sleep(_PAUSE)  # to ask takes processor time from the sweep
    while (after := _counts(guard))["sweeps"] == before["sweeps"]:
        pass
    if after["flows"] != connections:
        raise RuntimeError(f"the sweep saw {after['flows']} connections")
    swept = after["sweeps"] - before["sweeps"]
    return (after["sweep_cpu_us"] - before["sweep_cpu_us"]) / swept / 1000


def _counts(guard: GuardProcess) -> dict[str, int]:
    time.sleep(0.2)
    counts = guard.status()["counts"]
    return {name: int(counts.get(name, 0)) for name in ("sweeps", "sweep_cpu_us", "flows")}


def _line(number: int) -> str:
    """Return a command for `conntrack --load-file` that makes one established connection."""
    host, port = divmod(number, _OF_ONE)
    source = f"198.51.{host >> 8}.{host & 255}"
    return (
        f"-I -p tcp -s {source} -d {SERVER} --sport {20000 + port} --dport {PORT}"
        f" --state ESTABLISHED -t 600 -u SEEN_REPLY,ASSURED -m {Marks().proven.value}\n"
    )
