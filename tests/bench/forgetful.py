"""Mixed traffic through a gateway whose tracker forgets again and again, with a guard and without.

Uploads, downloads and idle connections, to protected services and others, to one that is over its
SYN budget, outward with masquerading and without; INVALID dropped in FORWARD or not.  What a run
without a guard loses is not asked of one with it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.support.budget import Flood
from tests.support.forgetting import (
    FORGETTING,
    Outward,
    invalid_dropped,
    masquerading,
    streams,
    turned,
)
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources, source
from tests.support.traffic import Link, Service

_SECONDS = 60.0
_TURNS = 8
_PROTECTED, _OTHER, _BUDGET, _BEHIND, _PLAIN = range(8201, 8206)
_IDLE = 10
_POLICY = f"""\
version: 1
name: forgetful
protect: {{interfaces: [out], ports: [{_PROTECTED}, {_BUDGET}]}}
syn_budget: {{rate: 200/s, ports: [{_BUDGET}]}}
rules:
  - {{name: strays, measure: out_of_state, over: 20/s, burst: 20, then: ban, for: 10m}}
  - {{name: rate, measure: connection_rate, over: 50/s, burst: 50, then: ban, for: 10m}}
  - {{name: hoard, measure: connections, over: 100, then: reset}}
"""


class _Came(NamedTuple):
    lost: int
    """Busy and idle connections that did not outlive it, and new ones that failed."""
    numbers: int
    """Numbers of eight bytes that all streams have carried."""
    harmed: int
    """Bans, shuns and resets."""


def forgetful() -> Iterator[Figure]:
    """8 flaps and 8 flushes in a minute of mixed traffic."""
    for drops in (False, True):
        with ThreeHosts("rgm") as lab:
            give_sources(lab)
            firewall = invalid_dropped(lab) if drops else contextlib.nullcontext()
            with firewall:
                alone = _run(lab, None)
                with Guard(lab, _POLICY, lab.directory / "guard") as guard:
                    guarded = _run(lab, guard)
        how = "INVALID dropped" if drops else "INVALID passes"
        more = f"{_TURNS} flaps and {_TURNS} flushes in {_SECONDS:.0f} s; control: {alone.lost}"
        yield at_most(alone.lost, f"forgetful: connections lost, {how}", [guarded.lost], "", more)
        yield at_most(0, f"forgetful: banned, shunned or reset, {how}", [guarded.harmed], "")
        share = guarded.numbers / alone.numbers
        yield at_least(0.9, f"forgetful: bytes against the control, {how}", [share], "")
        yield seen(f"forgetful: carried by the control, {how}", [alone.numbers * 8e-6], "MB")


def _run(lab: ThreeHosts, guard: Guard | None) -> _Came:
    with contextlib.ExitStack() as stack:
        inside = [Service(lab, port) for port in (_PROTECTED, _OTHER, _BUDGET)]
        outside = [Outward(lab, port) for port in (_BEHIND, _PLAIN)]
        for service in (*inside, *outside):
            stack.callback(service.close)
        stack.enter_context(masquerading(lab, _BEHIND))
        address = source(False)
        busy = {f"{way} {of.port}": _link(of, address, way)
                for of in inside for way in ("up", "down")}  # fmt: skip
        busy |= {f"out {of.port}": of.reach() for of in outside}
        idle = [of.connect(address) for of in inside for _ in range(_IDLE)]
        for link in (*busy.values(), *idle):
            link.talk()
        running = stack.enter_context(streams(busy))
        if guard is not None:
            wait_until(lambda: len(guard.status()["syn_budget"]["services"]) > 0)
        began, failed = time.monotonic(), 0
        for turn in range(2 * _TURNS):
            with (
                Flood(lab, inside[2].address, _BUDGET) if turn % 4 > 1 else contextlib.nullcontext()
            ):
                forget = FORGETTING[("flap", "flush")[turn % 2]]
                _until(began + _SECONDS * (turn + 0.5) / (2 * _TURNS))
                forget(lab)
                failed += sum(not _works(of, address) for of in inside)
                _until(began + _SECONDS * (turn + 1) / (2 * _TURNS))
        before = {name: one.received for name, one in running.items()}
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: all(running[n].received > had for n, had in before.items()), 20)
        stuck = [n for n, one in running.items() if one.problems or one.received <= before[n]]
        dead = sum(not _talks(link) for link in idle)
        carried = sum(one.received for one in running.values())
    counts = guard.status()["counts"] if guard is not None else {}
    harmed = sum(sum(counts.get(kind, {}).values()) for kind in ("ban", "shun", "reset"))
    return _Came(len(stuck) + dead + failed, carried, harmed)


def _link(of: Service, address: str, way: str) -> Link:
    link = of.connect(address)
    return link if way == "up" else turned(link)


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _works(of: Service, address: str) -> bool:
    try:
        link = of.connect(address)
    except OSError:
        return False
    works = _talks(link)
    link.close()
    return works


def _talks(link: Link) -> bool:
    try:
        link.talk()
    except OSError:
        return False
    return True
