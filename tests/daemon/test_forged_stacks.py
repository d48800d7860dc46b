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
from tests.support.forged import Since, abort, forge
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


@BOTH_FAMILIES
@pytest.mark.usefixtures("plain")
def test_bare_acks_tell_that_an_end_lives(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web, since = serve(next(PORTS), v6), Since(holding)
    links = [(web.connect(source(v6)), name) for name in NAMES for _ in range(10)]
    for link, name in links:
        link.talk()
        forge(lab, link, name=name)
    # At least: one that still waits in the queue may be asked for as if it were lost as well.
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    assert since.counts("honest_resets") == since.counts("unconfirmed_resets") == 0
    for link, _ in links:
        link.talk()


@BOTH_FAMILIES
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("plain")
def test_a_dead_end_says_so_at_once(serve: Open, holding: Guard, v6: bool, name: str) -> None:
    web, since = serve(next(PORTS), v6), Since(holding)
    links = [web.connect(source(v6)) for _ in range(10)]
    began = time.monotonic_ns()
    for link in links:
        link.talk()
        ends = (link.client, link.server) if name == "client" else (link.server, link.client)
        abort(ends[0])
        wait_until(lambda other=ends[1]: is_dead(other))  # type: ignore[misc]
    waited = (time.monotonic_ns() - began) // len(links)
    assert waited < PATIENCE // 2, f"{waited / SECOND} s each"
    wait_until(lambda: since.counts("honest_resets") >= len(links))
    assert since.counts("unconfirmed_resets") == 0


@BOTH_FAMILIES
@pytest.mark.usefixtures("plain")
def test_such_ends_are_killed(serve: Open, holding: Guard, v6: bool) -> None:
    web, address = serve(next(PORTS), v6), source(v6)
    links = [web.connect(address) for _ in range(10)]
    done = holding.kill(source=network_of(address))
    assert done == {"killed": 10, "confirmed": 10, "unconfirmed": []}
    for link in links:
        link.wait_reset(1)
