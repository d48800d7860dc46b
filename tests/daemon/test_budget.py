"""The SYN budget with the real kernel: cookies for clients, silence for forged sources."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.budget import Flood, engaged, learned, over_budget, state_of
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, give_sources, source
from tests.support.traffic import Link, Service, connect, fate

pytestmark = pytest.mark.netns

RATE = 200
PLAIN, ONCE, ELSEWHERE, FLOODED = range(8001, 8005)
FREE_BIND = {False: (socket.IPPROTO_IP, 15), True: (socket.IPPROTO_IPV6, 78)}
"""IP_FREEBIND and IPV6_FREEBIND."""

POLICY = f"""
version: 1
sweep_every: 500ms
{{head}}
protect: {{{{interfaces: [out]}}}}
syn_budget: {{{{rate: {RATE}/s, half_open: 4096, ports: [{PLAIN}, {ONCE}, {FLOODED}]}}}}
rules:
  - {{{{name: once, measure: syn_rate, ports: [{ONCE}], over: 1/m, burst: 1, then: drop}}}}
  - {{{{name: flood, measure: syn_rate, ports: [{FLOODED}], over: 1/m, burst: 5, then: ban,
     for: 60s}}}}
  - {{{{name: joined, measure: connection_rate, over: 1/s, burst: 5, then: observe}}}}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgh") as lab:
        give_sources(lab)
        yield lab


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY.format(head=""), tmp_path_factory.mktemp("budget")) as guard:
        yield guard


@pytest.fixture
def opened(lab: ThreeHosts) -> Iterator[list[Service]]:
    services: list[Service] = []
    yield services
    for service in services:
        service.close()


def open_service(
    lab: ThreeHosts, guard: Guard, opened: list[Service], port: int, v6: bool, place: str
) -> Service:
    """Open a service and wait until the guard knows what it offers."""
    opened.append(Service(lab, port, place, v6))
    return learned(guard, opened[-1], place)


def accepted(guard: Guard) -> int:
    return int(guard.status()["syn_budget"]["cookies"]["accepted"])


@pytest.mark.usefixtures("tracker")
@BOTH_FAMILIES
@pytest.mark.parametrize("place", ["server", "gateway"])
def test_clients_connect_while_their_service_is_over_budget(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool, place: str
) -> None:
    service = open_service(lab, guard, opened, PLAIN, v6, place)
    before = service.connect(source(v6))
    with over_budget(lab, guard, service):
        links = [service.connect(source(v6)) for _ in range(30)]
        for link in links:
            link.talk()
        before.talk()
    before.talk()
    wait_until(lambda: accepted(guard) >= 30)
    for link in links:
        link.talk()


def test_what_a_server_offers_is_learned_in_full(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    state = state_of(guard, service)
    assert state is not None
    offers = state["offers"]
    assert isinstance(offers, dict)
    assert (offers["mss"], offers["sack"], offers["timestamps"]) == (1460, True, True)
    assert offers["scale"] > 0
    said = guard.cli("status").stdout
    assert f"SYN budget {RATE}/s and 4096 half-open: " in said
    assert f"    {SERVER4}:{PLAIN}: " in said


def test_the_server_speaks_first_without_a_wait(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    with over_budget(lab, guard, service):
        began = time.monotonic()
        for _ in range(10):
            link = service.connect(source(False))
            link.server.sendall(b"220 ready")
            assert link.client.recv(9) == b"220 ready"
        # If SYNPROXY's ACK is refused, each waits a second for the server's next SYN-ACK.
        assert time.monotonic() - began < 5


def test_bulk_data_passes_whole_both_ways(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    data = random.randbytes(4 << 20)
    with over_budget(lab, guard, service):
        link = service.connect(source(False))
        for one, other in ((link.client, link.server), (link.server, link.client)):
            one.settimeout(10)
            sender = threading.Thread(target=one.sendall, args=(data,))
            sender.start()
            other.settimeout(10)
            received = b"".join(_read(other, len(data)))
            sender.join()
            assert received == data


def _read(one: socket.socket, size: int) -> Iterator[bytes]:
    while size:
        part = one.recv(min(size, 1 << 16))
        assert part
        size -= len(part)
        yield part


@BOTH_FAMILIES
def test_a_port_that_was_used_just_before_works_again(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool
) -> None:
    """The tracker still holds the old connection, whose sequence numbers it had to shift."""
    service = open_service(lab, guard, opened, PLAIN, v6, "server")
    address = source(v6)
    with over_budget(lab, guard, service):
        for _ in range(5):
            with lab.inside("client"):
                client = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.setsockopt(*FREE_BIND[v6], 1)
            client.bind((address, 30_000))
            client.settimeout(3)
            client.connect((service.address, service.port))
            server = service.accept()
            Link(client, server).talk()
            server.close()
            assert client.recv(1) == b""
            client.close()


@BOTH_FAMILIES
@pytest.mark.parametrize("place", ["server", "gateway"])
def test_who_is_refused_after_his_cookie_hears_a_reset(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool, place: str
) -> None:
    service = open_service(lab, guard, opened, ONCE, v6, place)
    address = source(v6)
    with over_budget(lab, guard, service):
        service.connect(address).talk()
        with pytest.raises(ConnectionResetError):  # here or, if it is quick, there
            connect(lab, address, service.address, ONCE).recv(1)
        service.connect(source(v6)).talk()


@BOTH_FAMILIES
@pytest.mark.parametrize("place", ["server", "gateway"])
def test_a_connection_that_began_with_a_cookie_can_be_killed(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool, place: str
) -> None:
    service = open_service(lab, guard, opened, PLAIN, v6, place)
    address = source(v6)
    with over_budget(lab, guard, service):
        link = service.connect(address)
        link.talk()
        silent = service.connect(address)
        outcome = guard.kill(source=address)
    assert (outcome["killed"], outcome["confirmed"]) == (2, 2)
    link.wait_reset()
    silent.wait_reset()


def test_completed_cookies_are_judged_as_handshakes(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    with over_budget(lab, guard, service):
        before, address = guard.events("observed", "joined"), source(False)
        for _ in range(10):
            service.connect(address)
        wait_until(lambda: guard.events("observed", "joined") > before)


@BOTH_FAMILIES
def test_a_flood_of_returned_cookies_is_banned(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool
) -> None:
    service = open_service(lab, guard, opened, FLOODED, v6, "server")
    attacker = source(v6)
    with over_budget(lab, guard, service):
        for _ in range(5):
            service.connect(attacker).talk()
        assert guard.block_of(attacker) is None
        with contextlib.suppress(OSError):
            connect(lab, attacker, service.address, FLOODED).close()
        wait_until(lambda: guard.block_of(attacker) is not None)
    assert guard.block_of(attacker)["kind"] == "ban"


def test_forged_syns_stay_away_from_server_and_engine(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    with over_budget(lab, guard, service) as flood:
        first, arrived, seen = flood.sent, inside(lab), guard.status()["counts"]["packets"]
        wait_until(lambda: flood.sent - first > 10_000)
        # Twice the rate may pass when it begins, and counts are told a moment later.
        assert inside(lab) - arrived < 3 * RATE
        assert guard.status()["counts"]["packets"] - seen < 3 * RATE


def inside(lab: ThreeHosts) -> int:
    """Return how many packets the server's host has received."""
    return int(lab.run("server", "cat", "/sys/class/net/eth0/statistics/rx_packets"))


def test_it_disengages_by_itself_and_says_so(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    with over_budget(lab, guard, service):
        pass
    wait_until(lambda: not engaged(guard, service), 15)
    kinds = [event["kind"] for event in guard.status()["recent"]]
    assert kinds.index("cookies_on") < len(kinds) - 1 - kinds[::-1].index("cookies_off")
    sent = guard.status()["syn_budget"]["cookies"]["sent"]
    service.connect(source(False)).talk()
    assert guard.status()["syn_budget"]["cookies"]["sent"] == sent


@BOTH_FAMILIES
def test_who_began_before_and_was_not_answered_hears_a_reset(
    lab: ThreeHosts, guard: Guard, opened: list[Service], v6: bool
) -> None:
    """His first SYN has an entry in the tracker, which SYNPROXY cannot take over."""
    service = open_service(lab, guard, opened, PLAIN, v6, "server")
    address = source(v6)
    late = guard.status()["syn_budget"]["cookies"]["late"]
    rule = ("INPUT", "-s", address, "-j", "DROP")
    tables = "ip6tables" if v6 else "iptables"
    lab.run("server", tables, "-A", *rule)
    try:
        with lab.inside("client"):
            client = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        client.setsockopt(*FREE_BIND[v6], 1)
        client.bind((address, 0))
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((service.address, service.port))
        with over_budget(lab, guard, service):
            wait_until(lambda: fate(client) == "ECONNRESET")
    finally:
        lab.run("server", tables, "-D", *rule)
    client.close()
    assert guard.status()["syn_budget"]["cookies"]["late"] == late + 1


def test_a_service_without_cookies_fills_no_queue(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    service = Service(lab, ELSEWHERE)
    opened.append(service)
    service.connect(source(False)).talk()
    with Flood(lab, service.address, ELSEWHERE) as flood:
        wait_until(lambda: flood.sent > 2 * RATE)
        began, first, seen = time.monotonic(), flood.sent, guard.status()["counts"]["packets"]
        wait_until(lambda: flood.sent - first > 5_000)
        link = service.connect(source(False))
        link.talk()
        seconds = time.monotonic() - began + 1.5  # the counts are told twice a second
        assert guard.status()["counts"]["packets"] - seen < RATE * seconds
    assert state_of(guard, service) is None


def test_a_policy_that_observes_gives_out_no_cookies(
    lab: ThreeHosts, guard: Guard, opened: list[Service]
) -> None:
    guard.apply(POLICY.format(head="mode: observe"))
    try:
        assert guard.status()["syn_budget"] is None
        saved = lab.run("gateway", "iptables-save").splitlines()
        proxies = [line for line in saved if "SYNPROXY" in line]
        # One rule that no packet comes to may stay: see Footprint.
        assert all(line.startswith("-A rstguard-kept ") for line in proxies), proxies
        assert "-j rstguard-kept" not in "\n".join(saved)
    finally:
        guard.apply(POLICY.format(head=""))
    service = open_service(lab, guard, opened, PLAIN, False, "server")
    with over_budget(lab, guard, service):
        service.connect(source(False)).talk()
