"""Connections that their client has closed, or seems to have, and that their server holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.wire import ACK, FIN
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Marks
from rstguard.lab.waiting import wait_until
from tests.support.forged import MD5, forge
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, is_dead

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: half
protect: {interfaces: [out]}
sweep_every: 500ms
rules:
  - {name: hoarder, measure: connections, over: 10, then: reset}
"""
LONG = 1000
"""Seconds that no half-closed connection has left, unless the guard has seen to it."""


@pytest.fixture
def impatient(lab: ThreeHosts) -> Iterator[None]:
    """Have the tracker forget half-closed connections within seconds."""
    base = "net/netfilter/nf_conntrack_tcp_timeout_"
    for name, seconds in (("fin_wait", "4"), ("close_wait", "4")):
        lab.set("gateway", {base + name: seconds})
    yield
    for name, seconds in (("fin_wait", "120"), ("close_wait", "60")):
        lab.set("gateway", {base + name: seconds})


def entry_of(lab: ThreeHosts, link: Link) -> Flow | None:
    """Return what the gateway knows of a connection."""
    return entries_of(lab, [link]).get(link.port)


def entries_of(lab: ThreeHosts, links: list[Link]) -> dict[int, Flow]:
    """Return what the gateway knows of connections, by their clients' ports."""
    names = {(parse_address(link.source), link.port) for link in links}
    with lab.inside("gateway"), Conntrack() as table:
        found = (
            flow
            for flow in table.dump()
            if (flow.original.source, flow.original.source_port) in names
        )
        return {flow.original.source_port: flow for flow in found}


def held(links: list[Link]) -> int:
    """Return how many of these connections the server holds."""
    return sum(not is_dead(link.server) for link in links)


def close_for_the_tracker(lab: ThreeHosts, link: Link, fins: int) -> None:
    """Send FINs that the server does not take, and go on."""
    link.talk()
    for _ in range(fins):
        forge(lab, link, FIN | ACK, options=(MD5,))
    if fins > 1:
        link.client.sendall(b"x")


def lasts(lab: ThreeHosts, link: Link) -> bool:
    flow = entry_of(lab, link)
    return flow is not None and flow.timeout > LONG


@BOTH_FAMILIES
def test_turns_of_connections_that_the_tracker_would_forget_do_not_add_up(
    lab: ThreeHosts, serve: Open, tmp_path: Path, impatient: None, v6: bool
) -> None:
    web = serve(8651, v6)
    with Guard(lab, POLICY, tmp_path / "guard"):
        hoarder, hoard = source(v6), list[Link]()
        for turn in (8, 2):
            links = [web.connect(hoarder) for _ in range(turn)]
            for link in links:
                close_for_the_tracker(lab, link, fins=1)
            hoard += links
            wait_until(lambda links=links: all(lasts(lab, link) for link in links))  # type: ignore[misc]
        web.refuse(hoarder)
        assert held(hoard) == 10


@BOTH_FAMILIES
def test_two_fins_of_a_client_close_nothing_at_its_server(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8652, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        hoarder = source(v6)
        hoard = []
        for _ in range(10):
            hoard.append(link := web.connect(hoarder))
            close_for_the_tracker(lab, link, fins=2)
        for _ in range(5):
            web.refuse(hoarder)
        flow = entry_of(lab, hoard[0])
        assert flow is not None
        assert flow.state == TcpState.TIME_WAIT
        assert held(hoard) == 10
        wait_until(lambda: guard.events("reset", "hoarder") == 5)
        assert guard.kill(source=hoarder)["confirmed"] == 10
        assert held(hoard) == 0


@BOTH_FAMILIES
def test_who_shuts_down_and_waits_gets_his_answer(
    lab: ThreeHosts, serve: Open, tmp_path: Path, impatient: None, v6: bool
) -> None:
    """Also behind a firewall that drops what fits no connection, after a minute and more."""
    tool = "ip6tables" if v6 else "iptables"
    strict = ("FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    web = serve(8653, v6)
    lab.run("gateway", tool, "-w", "-I", *strict)
    try:
        with Guard(lab, POLICY, tmp_path / "guard"):
            link = web.connect(source(v6))
            link.talk()
            link.client.shutdown(1)
            wait_until(lambda: lasts(lab, link))
            link.server.sendall(b"the answer")
            link.server.close()
            link.client.settimeout(5)
            assert link.client.recv(100) == b"the answer"
            assert link.client.recv(100) == b""
    finally:
        lab.run("gateway", tool, "-w", "-D", *strict)


@BOTH_FAMILIES
@pytest.mark.parametrize("first", ["client", "server"])
def test_what_both_ends_have_closed_is_not_looked_after(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool, first: str
) -> None:
    closing = Marks().closing.mask
    web = serve(8654, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        links = [web.connect(source(v6)) for _ in range(5)]
        for link in links:
            link.talk()
            one, other = (link.client, link.server)
            if first == "server":
                one, other = other, one
            one.close()
            assert other.recv(1) == b""
            other.close()

        def settled() -> bool:
            flows = entries_of(lab, links).values()
            assert {flow.server_first for flow in flows} == {first == "server"}
            states = {(flow.state, flow.mark & closing) for flow in flows}
            return states == {(TcpState.TIME_WAIT, 0)}

        wait_until(settled)
        assert guard.status()["counts"].get("outlived", 0) == 0
