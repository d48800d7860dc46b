"""What sweeps over a large connection table cost, and whether anybody waits for them."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

from rstguard.kernel.marks import Marks
from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_most, ratios, seen
from tests.bench.gateway import (
    PORT,
    SERVER,
    Site,
    cpu_seconds,
    example_policy,
    memory_mb,
    milliseconds_since,
)

CONNECTIONS = 100_000
MILLION = 1_000_000
AT_REST = 10_000
GOAL, GOAL_MILLION, GOAL_MB, GOAL_REST = 1.3, 1.4, 700.0, 2.0
GOAL_MEDIAN, GOAL_SLOWEST = 1.8, 2.0
_SWEEPS = 5
_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_OF_ONE = 100
"""Connections of one source: half of what the example policy allows."""
_REST_SECONDS = 20
_ROUNDS, _ROUND_SECONDS, _A_SECOND = 6, 5, 200


def sweeps() -> Iterator[Figure]:
    """Processor time of a sweep over 100,000 connections, to that of a C loop; and at rest."""
    with _filled(CONNECTIONS) as (site, guard):
        costs, floor = _costs(site, guard, CONNECTIONS, _SWEEPS)
        guard.stop()
    note = f"example policy, established connections of {CONNECTIONS // _OF_ONE:,} sources"
    name = f"sweep: {CONNECTIONS:,} connections"
    yield at_most(GOAL, f"{name}, to a C loop that only receives", ratios(costs, floor), "", note)
    yield seen(name, costs, "CPU ms")
    yield seen(f"C loop: {CONNECTIONS:,} connections", floor, "CPU ms")
    with _filled(AT_REST) as (_, guard):
        share = _share(guard)
        guard.stop()
    name = f"sweeper with {AT_REST:,} connections at rest"
    yield at_most(GOAL_REST, name, [share], "% of a core")


def million() -> Iterator[Figure]:
    """The same over a million, and the memory that it takes."""
    before = _LIMIT.read_text()
    _LIMIT.write_text(str(MILLION + CONNECTIONS))  # the tracker has one limit for all namespaces
    try:
        with _filled(MILLION) as (site, guard):
            costs, floor = _costs(site, guard, MILLION, 3)
            memory = memory_mb(int(guard.status()["sweeper"]["pid"]))
            guard.stop()
    finally:
        _LIMIT.write_text(before)
    name = f"sweep: {MILLION:,} connections"
    yield at_most(GOAL_MILLION, f"{name}, to a C loop that only receives", ratios(costs, floor), "")
    yield seen(name, costs, "CPU ms")
    yield at_most(GOAL_MB, f"sweeper with {MILLION:,} connections", [memory], "MB, at most")


def beside() -> Iterator[Figure]:
    """Connecting, 200 a second, beside 100,000 connections; half of them are over (TIME_WAIT)."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Site()) for _ in range(2))
        guard = ours.guard(example_policy(raised=True))
        for site in (ours, theirs):
            _fill(site, CONNECTIONS, "TIME_WAIT")
        wait_until(lambda: _counts(guard)["flows"] > 0, 120)
        sweeper = int(guard.status()["sweeper"]["pid"])
        clients = [stack.enter_context(_Connecting(site)) for site in (ours, theirs)]
        mine, unswept, other = (list[list[float]]() for _ in range(3))
        for _ in range(_ROUNDS):
            mine.append(clients[0].for_a_while())
            os.kill(sweeper, signal.SIGSTOP)  # it would take the control's processor time, too
            try:
                other.append(clients[1].for_a_while())
                unswept.append(clients[0].for_a_while())
            finally:
                os.kill(sweeper, signal.SIGCONT)
        guard.stop()
    note = f"rounds of {_ROUND_SECONDS} s in turns; example policy without limits on SYNs"
    for goal, percent in ((GOAL_MEDIAN, 50), (GOAL_SLOWEST, 99)):
        ours_, still, theirs_ = (
            [_percentile(one, percent) for one in all_] for all_ in (mine, unswept, other)
        )
        name = f"connecting beside {CONNECTIONS:,} connections, p{percent}"
        yield at_most(goal, f"{name}: guard / tracking only", ratios(ours_, theirs_), "", note)
        yield seen(f"{name}: guard / its sweeper stopped", ratios(ours_, still), "")
        yield seen(f"{name}: guard", ours_, "ms")
        yield seen(f"{name}: its sweeper stopped", still, "ms")
        yield seen(f"{name}: tracking only", theirs_, "ms")


@contextmanager
def _filled(connections: int) -> Iterator[tuple[Site, GuardProcess]]:
    """Enter a site whose guard has swept so many connections."""
    with Site() as site:
        guard = site.guard(example_policy())
        _fill(site, connections)
        wait_until(lambda: _counts(guard)["flows"] == connections, 300)
        yield site, guard


def _costs(
    site: Site, guard: GuardProcess, connections: int, sweeps: int
) -> tuple[list[float], list[float]]:
    """Return what sweeps cost, and right after each a C loop that receives the same (CPU ms)."""
    reader = site.compiled("table_reader.c")
    swept = Marks().swept
    costs, floor = list[float](), list[float]()
    for _ in range(sweeps):
        costs.append(_cost_of_next(guard, connections))
        said = site.run("gateway", reader, hex(swept.value), hex(swept.mask), "1", seconds=60)
        floor.append(int(said.split()[1]) / 1000)
    return costs, floor


def _cost_of_next(guard: GuardProcess, connections: int) -> float:
    before = _counts(guard)
    while (after := _counts(guard))["sweeps"] == before["sweeps"]:
        time.sleep(1)  # to ask takes processor time from the sweep
    if after["flows"] != connections:
        raise RuntimeError(f"the sweep saw {after['flows']} connections")
    swept = after["sweeps"] - before["sweeps"]
    return (after["sweep_cpu_us"] - before["sweep_cpu_us"]) / swept / 1000


def _counts(guard: GuardProcess) -> dict[str, int]:
    time.sleep(0.2)
    counts = guard.status()["counts"]
    return {name: int(counts.get(name, 0)) for name in ("sweeps", "sweep_cpu_us", "flows")}


def _share(guard: GuardProcess) -> float:
    """Return what the sweeper takes of a core while nothing happens, in percent."""
    sweeper = int(guard.status()["sweeper"]["pid"])
    before = cpu_seconds(sweeper)
    time.sleep(_REST_SECONDS)
    return 100 * (cpu_seconds(sweeper) - before) / _REST_SECONDS


class _Connecting:
    """A client of a site that opens connections one by one, and closes each."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._listener = site.listen("server", PORT)
        self._sources = itertools.cycle(f"198.51.100.{n}" for n in range(1, 251))

    def __enter__(self) -> _Connecting:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def for_a_while(self) -> list[float]:
        """Return how long it took to connect, each time, in milliseconds."""
        times = []
        began = time.monotonic()
        for number in range(_ROUND_SECONDS * _A_SECOND):
            time.sleep(max(0.0, began + number / _A_SECOND - time.monotonic()))
            with self._site.client_socket(next(self._sources)) as client:
                at = time.monotonic_ns()
                client.connect((SERVER, PORT))
                times.append(milliseconds_since(at))
                accepted, _ = self._listener.accept()
                accepted.shutdown(socket.SHUT_RDWR)
                accepted.close()
        return times


def _percentile(times: list[float], percent: int) -> float:
    return median(times) if percent == 50 else quantiles(times, n=100)[percent - 1]


def _fill(site: Site, connections: int, other_half: str = "ESTABLISHED") -> None:
    """Put connections into the table of a site's gateway; each second one in another state."""
    file = site.directory / "connections"
    states = ("ESTABLISHED", other_half)
    file.write_text("".join(_line(number, states[number & 1]) for number in range(connections)))
    site.run("gateway", "conntrack", "-R", str(file), seconds=600)


def _line(number: int, state: str) -> str:
    """Return a command for `conntrack --load-file` that makes one connection."""
    host, port = divmod(number, _OF_ONE)
    source = f"198.{51 + (host >> 16)}.{host >> 8 & 255}.{host & 255}"
    return (
        f"-I -p tcp -s {source} -d {SERVER} --sport {20000 + port} --dport {PORT}"
        f" --state {state} -t 600 -u SEEN_REPLY,ASSURED -m {Marks().proven.value}\n"
    )
