"""Bans by the thousand: what becomes of the guard if one network, or many, want to be banned."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.support.guard import Guard
from tests.support.hurry import greeting, hurry
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources, neighbours, source

SOURCES, NETWORKS = 5_000, 250
_CAP = 100
_PORT, _OTHER = 8511, 8512
_PATIENCE = 400.0
_TIMES = 5
POLICY = """\
version: 1
name: cap
bans_per_minute: {cap}
protect: {{interfaces: [out]}}
rules:
  - {{name: fast, measure: connection_rate, ports: [8511], over: 3/m, burst: 3, then: ban,
     for: 1h}}
  - {{name: other, measure: connection_rate, ports: [8512], over: 3/m, burst: 3, then: ban,
     for: 1h}}
"""


def cap() -> Iterator[Figure]:
    """5,000 sources of one /48, and of 250 /24s, that want to be banned, and what else goes on."""
    with ThreeHosts("rgk") as lab:
        give_sources(lab)
        with Guard(lab, POLICY.format(cap=_CAP), lab.directory / "guard") as guard:
            for v6 in (True, False):
                with greeting(lab, _PORT, v6), greeting(lab, _OTHER, v6):
                    yield from _wide(lab, guard) if v6 else _many(lab, guard)


def _bans(guard: Guard) -> int:
    return sum(row["kind"] == "ban" for row in guard.ask("ban-list"))


def _wide(lab: ThreeHosts, guard: Guard) -> Iterator[Figure]:
    """One /48, each source a /64 of it; a neighbour /48 is another matter."""
    name = f"cap: {SOURCES:,} sources of one /48"
    members = neighbours(True, SOURCES)
    began = time.monotonic()
    greeted = hurry(lab, members, _PORT, _TIMES)
    yield seen(f"{name}: took", [time.monotonic() - began], "s")
    yield seen(f"{name}: connections served of {SOURCES * _TIMES:,}", [greeted], "")
    yield seen(f"{name}: bans placed", [_bans(guard)], "", "a /48 of more than 16 is gated")
    yield at_least(1, f"{name}: networks gated", [_counted(guard, "gated")], "")
    yield at_most(0, f"{name}: rules capped", [len(guard.status()["capped"])], "")
    yield from _others(lab, guard, name, True)


def _many(lab: ThreeHosts, guard: Guard) -> Iterator[Figure]:
    """Sources of many /24s, 20 of each: the rule is capped, and nothing is lifted."""
    name = f"cap: {SOURCES:,} sources of {NETWORKS} /24s"
    each = SOURCES // NETWORKS
    networks = [neighbours(False, each) for _ in range(NETWORKS)]
    earlier = _bans(guard)
    greeted = 0
    capped = False
    most = earlier
    lifted = 0
    for members in zip(*networks, strict=True):  # one of each at a time
        greeted += hurry(lab, members, _PORT, _TIMES, 0.2)
        now = _bans(guard)
        lifted += max(0, most - now)
        most = max(most, now)
        capped = capped or "fast" in guard.status()["capped"]
    note = f"bans_per_minute: {_CAP}; an IPv4 /24 counts once, however many of it are banned"
    yield seen(f"{name}: connections served of {SOURCES * _TIMES:,}", [greeted], "", note)
    yield seen(f"{name}: bans placed", [most - earlier], "", note)
    yield at_least(1, f"{name}: the rule was capped", [float(capped)], "", note)
    yield at_most(0, f"{name}: bans lifted", [lifted], "", note)
    yield from _others(lab, guard, name, False)
    began = time.monotonic()
    wait_until(lambda: not guard.status()["capped"], _PATIENCE)
    yield seen(f"{name}: until the rule bans again", [time.monotonic() - began], "s")
    late = source(False)
    hurry(lab, [late], _PORT, _TIMES)
    wait_until(lambda: (guard.block_of(late) or {}).get("kind") == "ban")
    yield at_most(0, f"{name}: bans lifted until then", [max(0, most - _bans(guard))], "")


def _counted(guard: Guard, kind: str) -> int:
    return sum(guard.status()["counts"].get(kind, {}).values())


def _others(lab: ThreeHosts, guard: Guard, name: str, v6: bool) -> Iterator[Figure]:
    """Another rule bans meanwhile, and who does nothing wrong is served."""
    offender, visitor = source(v6), source(v6)
    hurry(lab, [offender], _OTHER, _TIMES)
    wait_until(lambda: guard.block_of(offender) is not None)
    banned = guard.block_of(offender)["kind"] == "ban"
    yield at_least(1, f"{name}: another rule bans", [float(banned)], "")
    yield at_least(3, f"{name}: a visitor is served", [hurry(lab, [visitor], _PORT, 3)], "of 3")
