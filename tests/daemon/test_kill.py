"""`rstguard kill`: whichever way a connection goes, both its ends die, and nothing else does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, SERVER4, SERVER6, ThreeHosts
from tests.support.sources import network_of, source
from tests.support.traffic import Link, Open, Service

pytestmark = pytest.mark.netns

FORWARDED, LOCAL, NAT, BEHIND_NAT = 8001, 8002, 7000, 7001
POLICY = """
version: 1
name: kill
protect: {interfaces: [out]}
rules:
  - {name: unused, measure: syn_rate, over: 10000/s, then: drop}
"""
WAYS = [
    pytest.param((place, v6), id=f"{place}-{'IPv6' if v6 else 'IPv4'}")
    for place in ("forwarded", "local", "nat")
    for v6 in (False, True)
]
Way = tuple[str, bool]


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    for tool, target in (("iptables", SERVER4), ("ip6tables", f"[{SERVER6}]")):
        nat = ("gateway", tool, "-w", "-t", "nat", "-A")
        to = ("-j", "DNAT", "--to-destination", f"{target}:{BEHIND_NAT}")
        lab.run(*nat, "PREROUTING", "-p", "tcp", "--dport", str(NAT), *to)
        back = ("-p", "tcp", "--dport", str(BEHIND_NAT), "-o", "in", "-j", "MASQUERADE")
        lab.run(*nat, "POSTROUTING", *back)
    with Guard(lab, POLICY, tmp_path_factory.mktemp("kill")) as guard:
        yield guard


@pytest.fixture
def join(serve: Open) -> Callable[[Way], Service]:
    """Open the service at the end of a way."""

    def open_service(way: Way) -> Service:
        place, v6 = way
        outside = OUTSIDE6 if v6 else OUTSIDE4
        if place == "forwarded":
            return serve(FORWARDED, v6)
        if place == "local":
            service = serve(LOCAL, v6, "gateway")
        else:
            service = serve(BEHIND_NAT, v6)
            service.port, service.masked = NAT, True
        service.address = outside
        return service

    return open_service


Join = Callable[[Way], Service]


@pytest.mark.parametrize("way", WAYS)
def test_idle(guard: Guard, join: Join, way: Way) -> None:
    service = join(way)
    address = source(way[1])
    condemned, other = service.connect(address), service.connect(address)
    done = guard.kill(source_port=condemned.port)
    assert done == {"killed": 1, "confirmed": 1, "unconfirmed": []}
    condemned.wait_reset(1)
    other.talk()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("closer", ["client", "server"])
def test_half_closed(guard: Guard, join: Join, way: Way, closer: str) -> None:
    condemned = join(way).connect(source(way[1]))
    first, second = condemned.client, condemned.server
    if closer == "server":
        first, second = second, first
    condemned.talk()
    first.shutdown(1)
    assert second.recv(1) == b""
    done = guard.kill(source_port=condemned.port)
    assert (done["killed"], done["confirmed"]) == (1, 1)
    condemned.wait_reset(1)


@pytest.mark.parametrize("way", WAYS)
def test_busy(guard: Guard, join: Join, way: Way) -> None:
    condemned = join(way).connect(source(way[1]))
    moved = threading.Event()

    def send() -> None:
        try:
            while True:
                condemned.client.sendall(bytes(1 << 16))
        except OSError:
            return

    def receive() -> None:
        try:
            while condemned.server.recv(1 << 16):
                moved.set()
        except OSError:
            return

    threads = [threading.Thread(target=work) for work in (send, receive)]
    for thread in threads:
        thread.start()
    try:
        assert moved.wait(5)
        done = guard.kill(source_port=condemned.port)
    finally:
        condemned.client.settimeout(1)
        for thread in threads:
            thread.join(10)
    assert (done["killed"], done["confirmed"]) == (1, 1)
    assert condemned.dead


@pytest.mark.parametrize("way", WAYS)
def test_a_ban_ends_what_there_is(guard: Guard, join: Join, way: Way) -> None:
    service = join(way)
    address, bystander = source(way[1]), source(way[1])
    links = [service.connect(address) for _ in range(3)]
    other = service.connect(bystander)
    guard.ask("ban-add", source=network_of(address), seconds=60)
    for link in links:
        link.wait_reset(2)
    other.talk()


def test_conditions_and_counts(guard: Guard, serve: Open) -> None:
    one, two = serve(8010), serve(8011)
    address, stranger = source(False), source(False)
    links: dict[str, Link] = {
        "a1": one.connect(address),
        "a2": two.connect(address),
        "s1": one.connect(stranger),
        "s2": two.connect(stranger),
    }
    alone = ("--source", address, "--port", "8011")
    done = guard.json("kill", *alone)
    assert done == {"killed": 1, "confirmed": 1, "unconfirmed": []}
    links.pop("a2").wait_reset()
    done = guard.json("kill", "--destination", SERVER4, "--source-port", str(links["s1"].port))
    assert (done["killed"], done["confirmed"]) == (1, 1)
    links.pop("s1").wait_reset()
    done = guard.json("kill", "--source", "10.128.0.0/9", "--port", "8010")
    assert (done["killed"], done["confirmed"]) == (1, 1)
    links.pop("a1").wait_reset()
    links["s2"].talk()
    said = guard.cli("kill", "--destination", SERVER4, "--port", "8011")
    assert (said.returncode, said.stdout) == (0, "killed 1, confirmed 1\n")
    links.pop("s2").wait_reset()
    said = guard.cli("kill", "--source", address)
    assert (said.returncode, said.stdout) == (0, "killed 0, confirmed 0\n")


def test_a_client_that_has_left_is_reported(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    address = source(False)
    link = serve(8012).connect(address)
    drop = ("INPUT", "-d", address, "-j", "DROP")
    lab.run("client", "iptables", "-w", "-A", *drop)
    try:
        said = guard.cli("kill", "--source", address, "--json")
    finally:
        lab.run("client", "iptables", "-w", "-D", *drop)
    assert said.returncode == 1
    done = json.loads(said.stdout)
    assert (done["killed"], done["confirmed"]) == (1, 0)
    assert "stayed silent" in done["unconfirmed"][0]["why"]
    assert address in done["unconfirmed"][0]["connection"]
    link.client.sendall(b"back")  # condemned it stays: the first word is its last
    link.wait_reset()


def test_four_hundred_at_once(guard: Guard, serve: Open) -> None:
    service = serve(8013)
    address = source(False)
    links = [service.connect(address) for _ in range(400)]
    other = service.connect(source(False))
    done = guard.kill(source=address)
    assert done == {"killed": 400, "confirmed": 400, "unconfirmed": []}
    assert all(link.dead for link in links)
    other.talk()
