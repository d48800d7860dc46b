"""Ends that report no duplicates: Linux without DSACK, and without SACK at all.

All that tells that such an end lives are bare ACKs, and those count after a second only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest

from rstguard.engine.holding import PATIENCE
from rstguard.engine.ruleset import SECOND
from rstguard.lab.waiting import wait_until
from tests.daemon.test_forged_resets import POLICY, abort, counts
from tests.support.forged import forge
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Open, is_dead

pytestmark = pytest.mark.netns

NAMES = ("client", "server")
# TCP_REPAIR keeps a port from being bound again until its last connection is forgotten.
PORTS = itertools.count(8621)


@pytest.fixture(params=["tcp_sack", "tcp_dsack"])
def plain(lab: ThreeHosts, request: pytest.FixtureRequest) -> Iterator[None]:
    """Have both ends do without a capability."""
    key = f"net/ipv4/{request.param}"
    for place in NAMES:
        lab.set(place, {key: "0"})
    yield
    for place in NAMES:
        lab.set(place, {key: "1"})


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("guard")) as guard:
        yield guard


OUTCOMES = ("forged_resets", "honest_resets", "unconfirmed_resets")


def outcomes(guard: Guard) -> tuple[int, ...]:
    """Return how many RSTs were found forged, honest, and neither."""
    return tuple(counts(guard, name) for name in OUTCOMES)


def since(guard: Guard, before: tuple[int, ...]) -> tuple[int, ...]:
    """Return likewise what has been added."""
    return tuple(now - then for now, then in zip(outcomes(guard), before, strict=True))


@BOTH_FAMILIES
@pytest.mark.usefixtures("plain")
def test_bare_acks_tell_that_an_end_lives(
    lab: ThreeHosts, serve: Open, guard: Guard, v6: bool
) -> None:
    web, before = serve(next(PORTS), v6), outcomes(guard)
    links = [(web.connect(source(v6)), name) for name in NAMES for _ in range(10)]
    for link, name in links:
        link.talk()
        forge(lab, link, name=name)
    # At least: one that still waits in the queue may be asked for as if it were lost as well.
    wait_until(lambda: since(guard, before)[0] >= len(links))
    assert since(guard, before)[1:] == (0, 0)
    for link, _ in links:
        link.talk()


@BOTH_FAMILIES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("plain")
def test_a_dead_end_says_so_at_once(serve: Open, guard: Guard, v6: bool, name: str) -> None:
    web, before = serve(next(PORTS), v6), outcomes(guard)
    links = [web.connect(source(v6)) for _ in range(10)]
    began = time.monotonic_ns()
    for link in links:
        link.talk()
        ends = (link.client, link.server) if name == "client" else (link.server, link.client)
        abort(ends[0])
        wait_until(lambda other=ends[1]: is_dead(other))  # type: ignore[misc]
    waited = (time.monotonic_ns() - began) // len(links)
    assert waited < PATIENCE // 2, f"{waited / SECOND} s each"
    wait_until(lambda: since(guard, before)[1] >= len(links))
    assert since(guard, before)[2] == 0


@BOTH_FAMILIES
@pytest.mark.usefixtures("plain")
def test_such_ends_are_killed(serve: Open, guard: Guard, v6: bool) -> None:
    web, address = serve(next(PORTS), v6), source(v6)
    links = [web.connect(address) for _ in range(10)]
    done = guard.kill(source=network_of(address))
    assert done == {"killed": 10, "confirmed": 10, "unconfirmed": []}
    for link in links:
        link.wait_reset(1)
