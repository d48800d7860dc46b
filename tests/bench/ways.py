"""Exact forged RSTs on every way through a gateway: how many connections they end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

from rstguard.lab.guard import GuardProcess
from tests.bench.figures import Figure, at_most, seen
from tests.support.forged import HOLDING
from tests.support.ways import DELAY_MS, WAYS, SlowNetwork, Trial

_IDLE, _BUSY = 20, 20
_SILENCE = 30.0
_LOOSE, _LIBERAL = (f"net/netfilter/nf_conntrack_tcp_{name}" for name in ("loose", "be_liberal"))


def ways() -> Iterator[Figure]:
    """20 idle and 20 busy connections on each way, an exact RST in each end's name to each."""
    with SlowNetwork() as network:
        with GuardProcess(network, HOLDING.replace("hold", "off"), network.directory / "off") as _:
            yield from _without(network)
        with GuardProcess(network, HOLDING, network.directory / "hold") as guard:
            for loose, liberal in product("01", repeat=2):
                network.set("gateway", {_LOOSE: loose, _LIBERAL: liberal})
                yield from _round(network, guard, f"tcp_loose {loose}, tcp_be_liberal {liberal}")


def _without(network: SlowNetwork) -> Iterator[Figure]:
    trial = Trial(network, WAYS[0], v6=False)
    trial.connect(_IDLE + _BUSY)
    trial.forge(_BUSY)
    note = "one RST in each name to each idle connection, three to each busy one"
    yield seen(
        "ways: without the key forged_resets: ended", [trial.dead], f"of {_IDLE + _BUSY}", note
    )
    trial.close()


def _round(network: SlowNetwork, guard: GuardProcess, name: str) -> Iterator[Figure]:
    """Try all ways, leave all connections alone for a while, and use them."""
    trials = [Trial(network, way, v6) for way in WAYS for v6 in (False, True)]
    for trial in trials:
        trial.connect(_IDLE + _BUSY)
        trial.forge(_BUSY)
    time.sleep(_SILENCE)
    note = f"{_IDLE} idle and {_BUSY} busy connections each, {DELAY_MS} ms in front of the gateway"
    note += f"; used again after {_SILENCE:g} s of silence"
    of = f"of {_IDLE + _BUSY}"
    for trial in trials:
        yield at_most(0, f"ways: {name}: {trial.name}: killed", [trial.dead], of, note)
        yield at_most(0, f"ways: {name}: {trial.name}: entries lost", [trial.lost()], of, note)
        yield at_most(0, f"ways: {name}: {trial.name}: stuck", [trial.stuck()], of, note)
        trial.close()
