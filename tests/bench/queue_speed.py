"""Through the queue: the whole guard against a C loop that only drops, fed by the same sender."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rstguard.kernel.queues import DEFAULT_NUMBER
from tests.bench.figures import Figure, at_least, at_most, ratios, seen
from tests.bench.gateway import (
    PORT,
    SERVER,
    Guard,
    Site,
    cpu_seconds,
    end,
    example_policy,
    memory_mb,
)

GOAL = 0.2
MEMORY_GOAL_MB = 300.0
ROUNDS = 5
_SECONDS = 2.0
_WARM_UP = 0.4
SYN = "2"


@dataclass(frozen=True, slots=True)
class Rate:
    """Packets a second that a reader took, and a second of its own processor time."""

    packets: float
    per_cpu_second: float
    overrun: bool


def queue() -> Iterator[Figure]:
    """Packets a second through the queue, against a C loop with batched verdicts."""
    with Site() as ours, Site() as theirs:
        for site in (ours, theirs):
            # After the queue both ways are equally short, and no connection is ever confirmed.
            site.run("gateway", "iptables", "-w", "-A", "FORWARD", "-j", "DROP")
        guard = Guard(ours, example_policy())
        flood = flooder(ours)
        noop, flood_noop = _noop(theirs), flooder(theirs)
        mine, other = [], []
        for number in range(ROUNDS):
            mine.append(_rate(ours, guard.worker, flood, number))
            other.append(_rate(theirs, noop.pid, flood_noop, number))
        sources, memory = ours.queue().last_id, memory_mb(guard.worker)
        guard.stop()
        end(noop)
    yield at_least(
        GOAL,
        "queue: guard / C no-op",
        ratios([r.packets for r in mine], [r.packets for r in other]),
        "",
        "example policy, random sources, one sender flat out, which the C loop outran in"
        f" {_outran(other)} of {ROUNDS} rounds and the guard in {_outran(mine)}",
    )
    yield seen("queue: guard", [r.packets for r in mine], "packets/s")
    yield seen("queue: C no-op, batched verdicts", [r.packets for r in other], "packets/s")
    yield seen(
        "queue: guard / C no-op, per CPU second of each",
        ratios([r.per_cpu_second for r in mine], [r.per_cpu_second for r in other]),
        "",
        "of the reader's own processor time: the ratio that no other load and no sender changes",
    )
    yield seen("queue: guard", [r.per_cpu_second for r in mine], "packets/CPU s")
    note = f"example policy, after SYNs of {sources:,} different sources; VmHWM"
    yield at_most(MEMORY_GOAL_MB, "memory: worker, example policy", [memory], "MB", note)


def _outran(rates: list[Rate]) -> int:
    """Return in how many rounds the reader waited for packets: then the sender was the limit."""
    return sum(1 for rate in rates if not rate.overrun)


Flood = Callable[[float, float, int, str], subprocess.Popen[str]]


def flooder(site: Site) -> Flood:
    """Return what starts a flood from the client: (seconds, rate, seed, flags) -> program."""
    program, mac = site.build("flood.c"), site.gateway_mac()

    def start(seconds: float, rate: float, seed: int, flags: str) -> subprocess.Popen[str]:
        numbers = [str(PORT), str(seconds), str(rate), str(seed), *flags.split()]
        return site.start("client", program, "eth0", mac, SERVER, *numbers)

    return start


def _noop(site: Site) -> subprocess.Popen[str]:
    program = site.start(
        "gateway", site.build("nfq_noop.c"), str(DEFAULT_NUMBER), stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    assert program.stdout.readline().strip() == "ready"
    rule = "iptables -w -t mangle -A PREROUTING -i out -p tcp --syn -j NFQUEUE --queue-num"
    site.run("gateway", *rule.split(), str(DEFAULT_NUMBER))
    return program


def _set_apart(sender: int, reader: int) -> None:
    """Give the sender one core and the reader another, if there are two."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(sender, {cores[0]})
    os.sched_setaffinity(reader, {cores[-1]})


def _rate(site: Site, reader: int, flood: Flood, number: int) -> Rate:
    sender = flood(_SECONDS, 0, 1 + number * 77_777_777, SYN)
    _set_apart(sender.pid, reader)
    time.sleep(_WARM_UP)
    before, cpu, began = site.queue(), cpu_seconds(reader), time.monotonic()
    time.sleep(_SECONDS - 2 * _WARM_UP)
    after, cpu_after, ended = site.queue(), cpu_seconds(reader), time.monotonic()
    sender.wait()
    taken = after.last_id - before.last_id - (after.dropped_reader - before.dropped_reader)
    return Rate(
        taken / (ended - began),
        taken / (cpu_after - cpu),
        after.dropped_full > before.dropped_full or after.waiting > 1000,
    )
