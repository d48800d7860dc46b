"""How exactly a `connections` rule holds between two sweeps, and what that costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Thread
from typing import NamedTuple

from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.bench.gateway import allow_files, cpu_seconds
from tests.support.comers import Comers, Held, hosting
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources, neighbours, source

GOAL_MOST, GOAL_SERVED = 1.1, 99.0
_LIMIT = 300
_PORT = 8000
_ROUNDS = 3
_SECONDS = 5.0
_STAY = 0.3
"""Seconds for which a client holds its connection: 1,250 a second hold 375 without a limit."""
_EACH = "name: each, measure: connections"
_KINDS = {
    "source": (f"{{{_EACH}, over: {_LIMIT}, then: reset}}", 1),
    "prefix": (f"{{{_EACH}, per: {{ipv4: 24, ipv6: 48}}, over: {_LIMIT}, then: reset}}", 250),
    "service": (f"{{{_EACH}, per: service, over: {_LIMIT}, then: reset}}", 250),
}


class _Round(NamedTuple):
    most: float
    served: float
    reader: float
    sweeper: float
    rate: float
    """New connections a second that the clients came to."""


def admission() -> Iterator[Figure]:
    """Bursts of 1,000, and 1,250 new connections a second and more, against a limit of 300."""
    allow_files(20_000)
    for kind, (rule, sources) in _KINDS.items():
        bursts = [_burst(rule, sources) for _ in range(_ROUNDS)]
        name = f"burst of 1,000 at a limit of {_LIMIT} per {kind}: most at once, to the limit"
        yield at_most(GOAL_MOST, name, bursts, "", f"{_ROUNDS} rounds, sampled every 2 ms")
    for rate in (1_250, 6_000):
        rounds = [_sustained(rate) for _ in range(_ROUNDS)]
        name = f"{median(_of(rounds, 4)):,.0f}/s of a /24 at a limit of {_LIMIT}"
        note = f"{_SECONDS:g} s of 250 clients that stay {_STAY:g} s"
        yield at_most(GOAL_MOST, f"{name}: most at once, to the limit", _of(rounds, 0), "", note)
        served = _of(rounds, 1)
        yield at_least(GOAL_SERVED, f"{name}: clients of another network served", served, "%")
        yield seen(f"{name}: processor time of the reader", _of(rounds, 2), "% of a core")
        yield seen(f"{name}: the whole sweeper", _of(rounds, 3), "% of a core")


def _of(rounds: list[_Round], which: int) -> list[float]:
    return [one[which] for one in rounds]


@contextmanager
def _guarded(rule: str) -> Iterator[tuple[ThreeHosts, Guard]]:
    policy = f"version: 1\nprotect: {{interfaces: [out], ports: [{_PORT}]}}\nrules: [{rule}]\n"
    with tempfile.TemporaryDirectory() as directory, ThreeHosts("rgb") as lab:
        give_sources(lab)
        with Guard(lab, policy, Path(directory)) as guard:
            wait_until(lambda: guard.status()["counts"].get("sweeps", 0) > 0)
            yield lab, guard


def _burst(rule: str, sources: int) -> float:
    with _guarded(rule) as (lab, _), hosting(lab, _PORT):
        comers = Comers(lab, neighbours(False, sources) if sources > 1 else [source(False)], _PORT)
        held = Held(lab)
        with held.watched(0.002):
            comers.burst(1000)
            time.sleep(1)
        comers.close()
        held.close()
        return held.most / _LIMIT


def _sustained(rate: int) -> _Round:
    rule, sources = _KINDS["prefix"]
    with _guarded(rule) as (lab, guard), hosting(lab, _PORT), hosting(lab, _PORT, v6=True):
        crowd = Comers(lab, neighbours(False, sources), _PORT)
        others = Comers(lab, neighbours(True, 20), _PORT)
        held, sweeper = Held(lab), int(guard.status()["sweeper"]["pid"])
        reader = _reader(guard)
        before, began, read = cpu_seconds(sweeper), time.monotonic(), reader()
        beside = Thread(target=others.come, args=(40, _SECONDS, _STAY))
        with held.watched(0.002):
            beside.start()
            crowd.come(rate, _SECONDS, _STAY)
            beside.join()
        took = time.monotonic() - began
        held.close()
        return _Round(
            held.most / _LIMIT,
            100 * others.served / others.begun,
            100 * (reader() - read) / took,
            100 * (cpu_seconds(sweeper) - before) / took,
            crowd.begun / _SECONDS,
        )


def _reader(guard: Guard) -> Callable[[], float]:
    return lambda: guard.status()["counts"].get("counting_cpu_us", 0) / 1e6
