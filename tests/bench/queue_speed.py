"""Through the queue: the whole guard against a C loop that only drops, fed by the same sender."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rstguard.kernel.queues import DEFAULT_NUMBER
from rstguard.lab.bench.peers import configuration
from rstguard.lab.guard import GuardProcess
from rstguard.lab.network import stop
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, ratios, seen
from tests.bench.gateway import (
    PORT,
    SERVER,
    Site,
    cpu_seconds,
    example_policy,
    memory_mb,
)

GOAL = 0.35
MEMORY_GOAL_MB = 300.0
ROUNDS = 5
_SECONDS = 2.0
_WARM_UP = 0.4
_BEARABLE = 80_000.0
_TRIES = 5
"""Other load may hold the worker up for so long that it sheds after all."""
_DRAINS = 15
_SETTLED = 0.02
"""Seconds until a reader has slept, and its processor time is accounted."""
_FILL, _FILL_RATE = 900, 30_000.0
"""SYNs for each worker, and how fast they come: fewer than those that make it shed load."""
SYN = "2"


Flood = Callable[[float, float, int, str], subprocess.Popen[str]]


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
        guard = ours.guard(example_policy())
        flood = flooder(ours)
        noop, flood_noop = _noop(theirs), flooder(theirs)
        mine, other, calm = [], [], []
        for number in range(ROUNDS):
            mine.append(_overrun(ours, guard, flood, number))
            calm.append(_unshed(ours, guard, flood, number + ROUNDS))
            other.append(_rate(theirs, noop.pid, flood_noop, number))
        sources, memory = ours.queue().last_id, memory_mb(guard.workers[0])
        guard.stop()
        stop(noop)
    yield at_least(
        GOAL,
        "queue: guard judging every packet / C no-op, per CPU second",
        ratios([r.per_cpu_second for r in calm], [r.per_cpu_second for r in other]),
        "",
        f"example policy, random sources, {_BEARABLE:,.0f} SYNs/s for the guard, which then sheds"
        " nothing; flat out for the C loop",
    )
    yield seen("queue: guard, judging", [r.per_cpu_second for r in calm], "packets/CPU s")
    yield seen(
        "queue: overrun guard / C no-op",
        ratios([r.packets for r in mine], [r.packets for r in other]),
        "",
        "example policy, random sources, one sender flat out, none kept from the queue; the C loop"
        " outran it in"
        f" {_outran(other)} of {ROUNDS} rounds and the guard in {_outran(mine)}",
    )
    yield seen("queue: guard, overrun", [r.packets for r in mine], "packets/s")
    yield seen("queue: C no-op, batched verdicts", [r.packets for r in other], "packets/s")
    yield seen(
        "queue: overrun guard / C no-op, per CPU second of each",
        ratios([r.per_cpu_second for r in mine], [r.per_cpu_second for r in other]),
        "",
        "of the reader's own processor time: the ratio that no other load and no sender changes",
    )
    note = f"example policy, after SYNs of {sources:,} different sources; VmHWM"
    yield at_most(MEMORY_GOAL_MB, "memory: worker, example policy", [memory], "MB", note)


def suricata() -> Iterator[Figure]:
    """Packets a second through the queue, against Suricata inline (left out if not installed)."""
    if shutil.which("suricata") is None:
        return
    yield from _against_suricata_overrun()
    yield from _against_suricata_working_off(1)
    yield from _against_suricata_working_off(2)


def _against_suricata_overrun() -> Iterator[Figure]:
    with Site() as ours, Site() as theirs:
        for site in (ours, theirs):
            site.run("gateway", "iptables", "-w", "-A", "FORWARD", "-j", "DROP")
        guard, other = ours.guard(example_policy()), _suricata(theirs)
        flood, flood_other = flooder(ours), flooder(theirs)
        mine, its = [], []
        for number in range(ROUNDS):
            mine.append(_overrun(ours, guard, flood, number))
            its.append(_rate(theirs, other.pid, flood_other, number))
        guard.stop()
        stop(other)
    yield at_least(
        2,
        "queue: guard / Suricata inline",
        ratios([rate.packets for rate in mine], [rate.packets for rate in its]),
        "",
        "one queue each, one sender flat out, which the guard outran in"
        f" {_outran(mine)} of {ROUNDS} rounds and Suricata in {_outran(its)};"
        " Suricata as in `rstguard lab bench --show-configs`",
    )
    yield seen(
        "queue: guard / Suricata inline, per CPU second of each",
        ratios([rate.per_cpu_second for rate in mine], [rate.per_cpu_second for rate in its]),
        "",
        "Suricata's threads share both cores, the guard's worker has one",
    )
    yield seen("queue: guard, of that stream", [rate.packets for rate in mine], "packets/s")
    yield seen("queue: Suricata inline", [rate.packets for rate in its], "packets/s")


def _against_suricata_working_off(queues: int) -> Iterator[Figure]:
    """As many workers as Suricata has threads that read packets, both with all cores."""
    with Site() as ours, Site() as theirs:
        for site in (ours, theirs):
            site.run("gateway", "iptables", "-w", "-A", "FORWARD", "-j", "DROP")
        guard, other = ours.guard(example_policy(), queues), _suricata(theirs, queues)
        flood, flood_other = flooder(ours), flooder(theirs)
        readers = guard.workers
        mine, its = [], []
        for number in range(_DRAINS):
            mine.append(_drained(ours, readers, queues, flood, number))
            its.append(_drained(theirs, [other.pid], queues, flood_other, number))
        guard.stop()
        stop(other)
    label = f"queue: {queues} worker{'s' * (queues > 1)} / Suricata with as many queues"
    note = (
        f"from going on after a stop until {_FILL} packets a queue are worked off, no sender at"
        " work; workers go before other programs (nice -10), Suricata does not"
    )
    yield seen(f"{label}, working off", ratios(*_column("packets", mine, its)), "", note)
    yield seen(f"{label}, per CPU second", ratios(*_column("per_cpu_second", mine, its)), "", note)
    yield seen(f"queue: Suricata with {queues}, working off", [r.packets for r in its], "packets/s")


def _column(name: str, *rates: list[Rate]) -> list[list[float]]:
    return [[getattr(rate, name) for rate in each] for each in rates]


def workers() -> Iterator[Figure]:
    """Two workers against one: how fast what waits in their queues is worked off."""
    one, two = [], []
    with Site() as alone, Site() as both:
        for site in (alone, both):
            site.run("gateway", "iptables", "-w", "-A", "FORWARD", "-j", "DROP")
        policy = example_policy()
        single, double = alone.guard(policy), both.guard(policy, workers=2)
        flood, flood_both = flooder(alone), flooder(both)
        for number in range(_DRAINS):
            one.append(_drained(alone, single.workers, 1, flood, number).packets)
            two.append(_drained(both, double.workers, 2, flood_both, number).packets)
        single.stop()
        double.stop()
    yield at_least(
        1.6,
        "queue: two workers / one",
        ratios(two, one),
        "",
        "packets/s from going on after a stop until the queues are empty, each worker on a core of"
        " its own and no sender at work: two cores cannot bear that, too",
    )
    yield seen("queue: one worker, working off", one, "packets/s")


def _drained(site: Site, readers: list[int], queues: int, flood: Flood, number: int) -> Rate:
    """Fill the queues while the readers are stopped; return the rate at which they then empty."""
    cores = sorted(os.sched_getaffinity(0))
    for reader in readers:
        os.kill(reader, signal.SIGSTOP)
    if len(readers) == queues:  # else one process reads them all, and has all cores
        for core, reader in zip(cores, readers, strict=False):
            os.sched_setaffinity(reader, {core})
    before, cpu = _read(site, queues), sum(map(cpu_seconds, readers))
    flood(_FILL * queues / _FILL_RATE, _FILL_RATE, 1 + number * 7_777_777, SYN).wait()
    waiting = _read(site, queues) - before
    began = time.monotonic()
    for reader in readers:
        os.kill(reader, signal.SIGCONT)
    while any(site.queue(DEFAULT_NUMBER + index).waiting for index in range(queues)):
        time.sleep(0.0001)
    spent = time.monotonic() - began
    time.sleep(_SETTLED)
    return Rate(waiting / spent, waiting / (sum(map(cpu_seconds, readers)) - cpu), overrun=True)


def _read(site: Site, queues: int) -> int:
    return sum(site.queue(DEFAULT_NUMBER + index).last_id for index in range(queues))


def _suricata(site: Site, queues: int = 1) -> subprocess.Popen[str]:
    for name in ("suricata.yaml", "suricata.rules", "threshold.config"):
        text = configuration(name).replace("DIRECTORY", str(site.directory))
        (site.directory / name).write_text(text)
    config = str(site.directory / "suricata.yaml")
    log = site.directory / "suricata.log"
    numbers = range(DEFAULT_NUMBER, DEFAULT_NUMBER + queues)
    words = ["-c", config, "--runmode", "workers"]
    for number in numbers:
        words += ["-q", str(number)]
    program = site.start("gateway", "suricata", *words, log=log)
    wait_until(lambda: "started" in log.read_text(), 40)
    rule = "iptables -w -t mangle -A PREROUTING -i out -p tcp --syn -j NFQUEUE"
    which = ["--queue-balance", f"{numbers[0]}:{numbers[-1]}"]
    site.run("gateway", *rule.split(), *(which if queues > 1 else ["--queue-num", str(numbers[0])]))
    return program


def _outran(rates: list[Rate]) -> int:
    """Return in how many rounds the reader waited for packets: then the sender was the limit."""
    return sum(1 for rate in rates if not rate.overrun)


def flooder(site: Site) -> Flood:
    """Return what starts a flood from the client: (seconds, rate, seed, flags) -> program."""
    program, mac = site.compiled("flood.c"), site.gateway_mac()

    def start(seconds: float, rate: float, seed: int, flags: str) -> subprocess.Popen[str]:
        numbers = [str(PORT), str(seconds), str(rate), str(seed), *flags.split()]
        return site.start("client", program, "eth0", mac, SERVER, *numbers)

    return start


def _noop(site: Site) -> subprocess.Popen[str]:
    program = site.start("gateway", site.compiled("nfq_noop.c"), str(DEFAULT_NUMBER), piped=True)
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


def _overrun(site: Site, guard: GuardProcess, flood: Flood, number: int) -> Rate:
    """Measure flat out, with every SYN led into the queue: an overrun guard would have it thinned.

    Its supervisor is stopped meanwhile, as it would put such a rule right.
    """
    supervisor, worker = int(guard.status()["supervisor"]["pid"]), guard.workers[0]
    rule = ("rstguard-syns-0", "-j", "NFQUEUE", "--queue-num", str(DEFAULT_NUMBER))
    table = ("gateway", "iptables", "-w", "-t", "mangle")
    os.kill(supervisor, signal.SIGSTOP)
    try:
        site.run(*table, "-I", *rule)
        return _rate(site, worker, flood, number)
    finally:
        site.run(*table, "-D", *rule)
        os.kill(supervisor, signal.SIGCONT)


def _unshed(site: Site, guard: GuardProcess, flood: Flood, number: int) -> Rate:
    """Measure at a rate at which every packet is judged, once the last flood is forgotten."""
    for attempt in range(_TRIES):
        wait_until(lambda: guard.status()["workers"][0]["overload"] == 0)
        before = guard.status()["counts"].get("shed", 0)
        rate = _rate(site, guard.workers[0], flood, number + attempt * 100, _BEARABLE)
        wait_until(lambda: guard.status()["workers"][0]["overload"] == 0)
        shed = guard.status()["counts"].get("shed", 0) - before
        if shed <= rate.packets / 100:
            return rate
    raise RuntimeError(f"{shed} packets were not judged: the machine is busy, try again")


def _rate(site: Site, reader: int, flood: Flood, number: int, syns: float = 0) -> Rate:
    sender = flood(_SECONDS, syns, 1 + number * 77_777_777, SYN)
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
