"""Ports used again at once, so that the tracker keeps the old entry: what was another's is not.

The server's RST comes last, and the client's next SYN finds the entry that it has closed.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow
from rstguard.engine.ruleset import SECOND
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Labels
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import FREE_BIND, Link, Open, Service, is_dead

pytestmark = pytest.mark.netns

AGED, SLOW, PROOF = 8311, 8312, 8313
_OLD = 4
POLICY = f"""
version: 1
name: reused
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: age, measure: age, ports: [{AGED}], over: {_OLD}s, then: reset}}
  - {{name: slow, measure: slow, ports: [{SLOW}], after: {_OLD}s, under: 100 B/s, then: reset}}
  - {{name: hoard, measure: connections, ports: [{PROOF}], over: 100, then: reset}}
"""
_PORT = 20_000


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("reused"), workers=1) as guard:
        yield guard


def opened(lab: ThreeHosts, service: Service, address: str) -> Link:
    """Return a connection from one port of an address: the same each time."""
    with lab.inside("client"):
        client = socket.socket(socket.AF_INET6 if service.v6 else socket.AF_INET)
    client.setsockopt(*FREE_BIND[service.v6], 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.settimeout(5)
    client.bind((address, _PORT))
    client.connect((service.address, service.port))
    return Link(client, service.accept())


def closed_by_server(link: Link) -> None:
    """Have the server close with data unread, which it does by a RST."""
    link.client.sendall(b"unread")
    wait_until(lambda: len(link.server.recv(10, socket.MSG_PEEK)) == 6)
    link.server.close()
    wait_until(lambda: is_dead(link.client))
    link.client.close()


def entry(lab: ThreeHosts, address: str) -> Flow:
    with lab.inside("gateway"), Conntrack() as table:
        (flow,) = (f for f in table.dump() if f.original.source == parse_address(address))
        return flow


def has(lab: ThreeHosts, address: str, label: int) -> bool:
    return bool(entry(lab, address).labels >> label & 1)


@BOTH_FAMILIES
def test_the_age_is_its_own(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service, address = serve(AGED, v6), source(v6)
    first = opened(lab, service, address)
    first.talk()
    wait_until(lambda: entry(lab, address).age > 3 * SECOND)
    closed_by_server(first)
    before = entry(lab, address).ident
    second = opened(lab, service, address)
    second.talk()
    assert entry(lab, address).ident == before
    began = entry(lab, address).age
    second.wait_reset()
    assert entry(lab, address).age > began + _OLD * SECOND  # not before it was that old itself
    second.close()


@BOTH_FAMILIES
def test_the_bytes_are_its_own(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service, address = serve(SLOW, v6), source(v6)
    first = opened(lab, service, address)
    first.client.sendall(bytes(100_000))
    assert len(first.server.recv(100_000, socket.MSG_WAITALL)) == 100_000
    closed_by_server(first)
    second = opened(lab, service, address)
    assert entry(lab, address).client_bytes > 100_000
    second.wait_reset(20)
    second.close()


@BOTH_FAMILIES
def test_what_is_proved_is_its_own(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service, address, labels = serve(PROOF, v6), source(v6), Labels()
    first = opened(lab, service, address)
    first.talk()
    assert has(lab, address, labels.confirmed)
    for _ in range(2):  # the second time, too
        closed_by_server(first)
        first = opened(lab, service, address)
        wait_until(lambda: not has(lab, address, labels.anew))
        assert has(lab, address, labels.reused)
        assert not has(lab, address, labels.confirmed)
        first.talk()
        assert has(lab, address, labels.confirmed)
    first.close()
