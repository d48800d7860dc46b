"""Forged RSTs on every way through the gateway, and honest RSTs of every kind."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from rstguard.engine.flow import TcpState
from rstguard.lab.waiting import wait_until
from tests.support.forged import HOLDING, Since, abort, forge, forge_many, state_of
from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, Service, connect, is_dead

pytestmark = pytest.mark.netns

NAT, BEHIND = 8610, 8611
WAYS = [
    pytest.param((place, v6), id=f"{place}-{'IPv6' if v6 else 'IPv4'}")
    for place in ("nat", "local")
    for v6 in (False, True)
]
Way = tuple[str, bool]


@pytest.fixture
def translated(lab: ThreeHosts) -> Iterator[None]:
    """Have the gateway translate both addresses of what goes to one port."""
    done = []
    for tool, target in (("iptables", SERVER4), ("ip6tables", f"[{SERVER6}]")):
        to = ("--dport", str(NAT), "-j", "DNAT", "--to-destination", f"{target}:{BEHIND}")
        back = ("--dport", str(BEHIND), "-o", "in", "-j", "MASQUERADE")
        for chain, rule in (("PREROUTING", to), ("POSTROUTING", back)):
            lab.run("gateway", tool, "-w", "-t", "nat", "-A", chain, "-p", "tcp", *rule)
            done.append((tool, "-w", "-t", "nat", "-D", chain, "-p", "tcp", *rule))
    yield
    for command in done:
        lab.run("gateway", *command)


def service_on(serve: Open, way: Way) -> Service:
    place, v6 = way
    if place == "nat":
        service = serve(BEHIND, v6)
        service.port, service.masked = NAT, True
    else:
        service = serve(8612, v6, "gateway")
    service.address = OUTSIDE6 if v6 else OUTSIDE4
    return service


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("way", WAYS)
def test_translated_and_local_connections_are_kept(
    lab: ThreeHosts, serve: Open, holding: Guard, way: Way
) -> None:
    service = service_on(serve, way)
    names = ("client", "server") if way[0] == "nat" else ("client",)
    since = Since(holding)
    links = [service.connect(source(way[1])) for _ in range(10)]
    for link in links:
        link.talk()
        for name in names:
            forge(lab, link, name=name)
            link.talk()
    wait_until(lambda: since.counts("forged_resets") >= len(links) * len(names))
    for link in links:
        link.talk()


@BOTH_FAMILIES
def test_a_flood_of_exact_resets_neither_kills_nor_hangs(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    """Far more than may wait: the rest is dropped, and the connection repaired all the same."""
    web = serve(8613, v6)
    since = Since(holding)
    link, other = web.connect(source(v6)), web.connect(source(v6))
    link.talk()
    forge_many(lab, link, 5_000)
    other.talk()
    link.talk()
    wait_until(lambda: state_of(lab, link) == TcpState.ESTABLISHED, 15)
    wait_until(lambda: since.counts("waiting_resets") == 0, 15)
    assert since.counts("honest_resets") == since.counts("unconfirmed_resets") == 0
    link.talk()
    assert since.counts("held_resets") < 1_000


@pytest.fixture
def strict_client(lab: ThreeHosts) -> Iterator[None]:
    """Have the client behind a firewall of its own that drops what fits no connection."""
    rule = ("INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    for tool in ("iptables", "ip6tables"):
        lab.run("client", tool, "-w", "-I", *rule)
    yield
    for tool in ("iptables", "ip6tables"):
        lab.run("client", tool, "-w", "-D", *rule)


@BOTH_FAMILIES
@pytest.mark.usefixtures("strict_client")
def test_resets_in_both_names_at_once_end_nothing(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    """One is decided at once, the other when the client has been asked what it cannot ignore."""
    web = serve(8609, v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(10)]
    for link in links:
        link.talk()
        forge(lab, link)
        forge(lab, link, name="server")
    wait_until(lambda: since.counts("forged_resets") >= 2 * len(links))
    for link in links:
        link.talk()
    assert since.counts("unconfirmed_resets") == 0


@BOTH_FAMILIES
def test_bulk_data_that_forged_resets_chase_arrives(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web = serve(8614, v6)
    amount = 200 << 20
    link = web.connect(source(v6))
    link.talk()
    received = []

    def receive() -> None:
        total = 0
        while total < amount and (data := link.server.recv(1 << 20)):
            total += len(data)
        received.append(total)

    reader = threading.Thread(target=receive)
    link.client.settimeout(30)
    link.server.settimeout(30)
    reader.start()
    sender = threading.Thread(target=lambda: link.client.sendall(bytes(amount)))
    sender.start()
    while sender.is_alive():
        forge(lab, link, name="server")
    sender.join()
    reader.join()
    assert received == [amount]


def by_linger(lab: ThreeHosts, web: Service, link: Link) -> None:
    abort(link.client)


def by_unread_data(lab: ThreeHosts, web: Service, link: Link) -> None:
    link.server.sendall(b"nobody reads this")
    link.client.recv(1)
    link.client.close()


HONEST: dict[str, Callable[[ThreeHosts, Service, Link], None]] = {
    "linger 0": by_linger,
    "unread data": by_unread_data,
}


@BOTH_FAMILIES
@pytest.mark.parametrize("kind", HONEST)
def test_honest_resets_of_every_kind_pass(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, kind: str
) -> None:
    web = serve(8615, v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(100)]
    for link in links:
        link.talk()
        HONEST[kind](lab, web, link)
    for link in links:
        wait_until(lambda link=link: is_dead(link.server))  # type: ignore[misc]
    assert since.counts("unconfirmed_resets") == since.counts("forged_resets") == 0


@BOTH_FAMILIES
def test_refused_connections_are_not_held(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web = serve(8616, v6)
    since = Since(holding)
    for _ in range(50):
        with pytest.raises(ConnectionRefusedError):
            connect(lab, source(v6), web.address, 8617)
    assert since.counts("held_resets") == 0


@BOTH_FAMILIES
def test_a_port_that_is_used_again_at_once_connects(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    """Its SYN waits until the RST is decided on, and that is asked of where a new socket is."""
    web = serve(8618, v6)
    since = Since(holding)
    for _ in range(10):
        address = source(v6)
        link = web.connect(address)
        for _ in range(2):
            port = link.port
            link.talk()
            abort(link.client)
            with lab.inside("client"):
                again = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.setsockopt(*((41, 78) if v6 else (0, 15)), 1)
            again.bind((address, port))
            again.settimeout(5)
            again.connect((web.address, web.port))
            link = Link(again, web.accept())
        link.talk()
        link.close()
    assert since.counts("unconfirmed_resets") == 0


@BOTH_FAMILIES
def test_a_killed_process_resets_its_connections(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web = serve(8619, v6)
    program = (
        "import socket, sys, time\n"
        f"one = socket.create_connection(({web.address!r}, {web.port}))\n"
        "one.recv(1)\nprint('read', flush=True)\ntime.sleep(60)\n"
    )
    since = Since(holding)
    process = subprocess.Popen(
        lab.command("client", sys.executable, "-c", program), stdout=subprocess.PIPE
    )
    with web.accept() as server:
        server.sendall(b"more than one byte: the rest is unread when it is killed")
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        process.stdout.close()
        wait_until(lambda: is_dead(server))
        wait_until(lambda: since.counts("honest_resets") == 1)
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNRESET)


@BOTH_FAMILIES
def test_a_worker_counts_the_honest_resets_and_no_others(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web = serve(8620, v6)
    counting = HOLDING.replace("over: 1000/s, then: drop", "over: 1/h, burst: 3, then: observe")
    holding.apply(counting)
    since = Since(holding)
    address = source(v6)
    links = [web.connect(address) for _ in range(8)]
    for link in links:
        link.talk()
        forge(lab, link)
        link.talk()
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    assert since.counts("rule.resets") == 0
    for link in links:
        abort(link.client)
    wait_until(lambda: since.counts("rule.resets") == len(links) - 3)
    holding.apply(HOLDING)
