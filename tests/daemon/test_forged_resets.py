"""RSTs with the exact number: the end that they name is asked before they pass."""

from __future__ import annotations

import itertools
import os
import signal
import socket

import pytest

from rstguard.engine.flow import TcpState
from rstguard.engine.wire import ACK, FIN
from rstguard.lab.waiting import wait_until
from tests.support.forged import HOLDING, Since, abort, forge, state_of
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, is_dead

pytestmark = pytest.mark.netns

_ports = itertools.count(8610)
NAMES = pytest.mark.parametrize("name", ["client", "server"])


@pytest.mark.usefixtures("tracker")
@BOTH_FAMILIES
@NAMES
def test_a_forged_reset_ends_nothing(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, name: str
) -> None:
    web = serve(next(_ports), v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(20)]
    for link in links:
        link.talk()
        forge(lab, link, name=name)
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    for link in links:
        assert not is_dead(link.client)
        assert not is_dead(link.server)
        link.talk()
    assert since.counts("forged_reset", "forged_reset") == len(links)
    told = [one for one in holding.status()["recent"] if one["kind"] == "forged_reset"]
    assert all(name in one["detail"] for one in told[-3:]), told


@BOTH_FAMILIES
@NAMES
def test_a_forged_fin_ends_nothing_and_an_honest_one_passes(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, name: str
) -> None:
    web = serve(8605, v6)
    fins = HOLDING.replace("forged_resets: hold", "forged_resets: hold\nforged_fins: hold")
    holding.apply(fins)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(10)]
    for link in links:
        link.talk()
        forge(lab, link, FIN | ACK, name=name)
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    for link in links:
        link.talk()
    for link in links:
        one, other = _ends(link, name)
        one.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        other.sendall(b"more")
        assert one.recv(4) == b"more"
        other.close()
        assert one.recv(1) == b""
    assert since.counts("unconfirmed_resets") == 0
    holding.apply(HOLDING)


@pytest.mark.usefixtures("tracker")
@BOTH_FAMILIES
@NAMES
def test_an_honest_reset_passes(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, name: str
) -> None:
    web = serve(next(_ports), v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(20)]
    for link in links:
        link.talk()
        one, other = _ends(link, name)
        abort(one)
        wait_until(lambda other=other: is_dead(other))  # type: ignore[misc]
    wait_until(lambda: since.counts("honest_resets") == len(links))
    assert since.counts("unconfirmed_resets") == 0


def _ends(link: Link, name: str) -> tuple[socket.socket, socket.socket]:
    ends = link.client, link.server
    return ends if name == "client" else (ends[1], ends[0])


@BOTH_FAMILIES
@NAMES
@pytest.mark.usefixtures("strict")
def test_ends_behind_strict_firewalls_are_asked_as_well(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, name: str
) -> None:
    web = serve(8603, v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(10)]
    for link in links:
        link.talk()
        forge(lab, link, name=name)
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    for link in links:
        link.talk()
    assert since.counts("unconfirmed_resets") == 0


@BOTH_FAMILIES
@NAMES
def test_a_killed_asker_leaves_no_connection_lost(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, name: str
) -> None:
    """The RSTs that waited are gone with it, and their connections are still called closed."""
    web = serve(8604, v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(10)]
    for link in links:
        link.talk()
    asker = holding.status()["asker"]["pid"]
    os.kill(asker, signal.SIGSTOP)
    for link in links:
        forge(lab, link, name=name)
    os.kill(asker, signal.SIGKILL)
    wait_until(lambda: since.counts("lost_resets") >= len(links), 15)
    opened = {TcpState.ESTABLISHED}
    wait_until(lambda: {state_of(lab, link) for link in links} == opened)
    for link in links:
        link.talk()
