"""What one sweep over a large connection table costs."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rstguard.kernel.marks import GUARDED, PROVEN
from tests.bench.figures import Figure, seen
from tests.bench.gateway import PORT, SERVER, Guard, Site, example_policy
from tests.netns import wait_until

CONNECTIONS = 100_000
_SWEEPS = 4
_OF_ONE = 100
"""Connections of one source: half of what the example policy allows."""


def sweeps() -> Iterator[Figure]:
    """Processor time of one sweep over 100,000 connections."""
    with Site() as site:
        guard = Guard(site, example_policy())
        file = site.directory / "connections"
        file.write_text("".join(map(_line, range(CONNECTIONS))))
        site.run("gateway", "conntrack", "-R", str(file))
        wait_until(lambda: _counts(guard)["flows"] == CONNECTIONS, 30)
        costs = [_cost_of_next(guard) for _ in range(_SWEEPS)]
        guard.stop()
    note = f"example policy, established connections of {CONNECTIONS // _OF_ONE:,} sources"
    yield seen(f"sweep: {CONNECTIONS:,} connections", costs, "CPU ms", note)


def _cost_of_next(guard: Guard) -> float:
    before = _counts(guard)
    while (after := _counts(guard))["sweeps"] == before["sweeps"]:
        pass
    if after["flows"] != CONNECTIONS:
        raise RuntimeError(f"the sweep saw {after['flows']} connections")
    swept = after["sweeps"] - before["sweeps"]
    return (after["sweep_cpu_us"] - before["sweep_cpu_us"]) / swept / 1000


def _counts(guard: Guard) -> dict[str, int]:
    time.sleep(0.2)
    counts = guard.status()["counts"]
    return {name: int(counts.get(name, 0)) for name in ("sweeps", "sweep_cpu_us", "flows")}


def _line(number: int) -> str:
    """Return a command for `conntrack --load-file` that makes one established connection."""
    host, port = divmod(number, _OF_ONE)
    source = f"198.51.{host >> 8}.{host & 255}"
    return (
        f"-I -p tcp -s {source} -d {SERVER} --sport {20000 + port} --dport {PORT}"
        f" --state ESTABLISHED -t 600 -u SEEN_REPLY,ASSURED -m {GUARDED | PROVEN}\n"
    )
