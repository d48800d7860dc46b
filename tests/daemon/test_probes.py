"""Probes are answered however busy the receiver is, and what they carry gets nowhere."""

from __future__ import annotations

import time
from pathlib import Path
from random import getrandbits

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Tuple
from rstguard.engine.segment import probe
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.odd import odd_segments
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Open

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: busy
protect: {interfaces: [out]}
rules: []
"""


@BOTH_FAMILIES
def test_a_kill_does_not_wait_for_a_busy_limiter(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8521, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        took = []
        for _ in range(5):
            link = web.connect(source(v6))
            link.talk()
            with odd_segments(lab, link.client):
                began = time.monotonic()
                killed = guard.kill(source=link.client.getsockname()[0])
                took.append(time.monotonic() - began)
            assert killed["confirmed"] == 1
            assert link.dead
        # With probes that have to wait for their turn it is half a second.
        assert sorted(took)[2] < 0.3


@BOTH_FAMILIES
def test_the_byte_of_a_probe_gets_into_no_stream(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8522, v6)
    with Guard(lab, POLICY, tmp_path / "guard"):
        link = web.connect(source(v6))
        link.talk()
        (own, port), (there, service) = link.client.getsockname()[:2], link.client.getpeername()[:2]
        to_server = Tuple(parse_address(own), parse_address(there), port, service)
        to_client = Tuple(parse_address(there), parse_address(own), service, port)
        with lab.inside("gateway"), Injector(Marks()) as injector:
            for _ in range(1000):
                paths = (to_server, to_client)
                drawn = [probe(path, getrandbits(32), getrandbits(32)) for path in paths]
                assert injector.send(drawn) == 2
        link.talk()
        for end in (link.client, link.server):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)


@BOTH_FAMILIES
@pytest.mark.usefixtures("strict")
def test_ends_behind_firewalls_that_drop_what_does_not_fit_die_all_the_same(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8453, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        address = source(v6)
        links = [web.connect(address) for _ in range(10)]
        for link in links:
            link.talk()
        done = guard.kill(source=address)
        assert (done["killed"], done["confirmed"]) == (10, 10), done
        for link in links:
            link.wait_reset()
