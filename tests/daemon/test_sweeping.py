"""Each measure of the sweep: which of a source's connections die, and which live on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, source
from tests.support.traffic import Link, Open, is_dead, server_sockets

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

HOARD, CROWD, BYTES, SLOW, IDLE, AGE, TELL_SOURCE, TELL_SERVER, WATCH, SUBNET = range(8001, 8011)
POLICY = f"""
version: 1
name: sweeping
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: hoard, measure: connections, ports: [{HOARD}], over: 5, then: reset}}
  - {{name: subnet, measure: connections, ports: [{SUBNET}], per: {{ipv4: 24, ipv6: 48}}, over: 5,
     then: reset}}
  - {{name: crowd, measure: connections, ports: [{CROWD}], over: 5, then: ban, for: 60s}}
  - {{name: bytes, measure: byte_rate, ports: [{BYTES}], over: 100 kB/s, burst: 1 MB, then: reset}}
  - {{name: slow, measure: slow, ports: [{SLOW}], after: 2s, under: 300 B/s, then: reset}}
  - {{name: idle, measure: idle, ports: [{IDLE}], over: 2s, then: reset}}
  - {{name: age, measure: age, ports: [{AGE}], over: 2s, then: reset}}
  - {{name: tell-source, measure: age, ports: [{TELL_SOURCE}], over: 1s, then: reset, ends: source}}
  - {{name: tell-server, measure: age, ports: [{TELL_SERVER}], over: 1s, then: reset,
     ends: destination}}
  - {{name: watch, measure: age, ports: [{WATCH}], over: 1s, then: observe}}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("sweeping")) as guard:
        yield guard


def sweeps(guard: Guard, count: int) -> None:
    """Wait until so many more sweeps are over."""
    done = guard.status()["counts"]["sweeps"]
    wait_until(lambda: guard.status()["counts"]["sweeps"] >= done + count)


def chatting(say: Callable[[], None], pause: float) -> tuple[threading.Thread, threading.Event]:
    """Do something again and again in a thread until told to end or until it fails."""
    ended = threading.Event()

    def run() -> None:
        try:
            while not ended.wait(pause):
                say()
        except OSError:
            return

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def until_it_fails(say: Callable[[], None]) -> None:
    """Do something again and again; it is to raise within ten seconds."""
    began = time.monotonic()
    while time.monotonic() - began < 10:
        say()


def test_connections_beyond_the_limit(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(HOARD, v6)
    hoarder, honest = source(v6), source(v6)
    uninvolved = [service.connect(honest) for _ in range(5)]
    links = [service.connect(hoarder) for _ in range(5)]
    for _ in range(4):
        service.refuse(hoarder)
    sweeps(guard, 2)
    for link in (*links, *uninvolved):
        link.talk()
    # What was half-open ends when the server repeats its SYN-ACK.
    wait_until(lambda: len(server_sockets(lab, hoarder)) == 5)
    assert guard.block_of(hoarder) is None


def test_connections_of_a_subnet(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(SUBNET, v6)
    *first, one_more, last = neighbours(v6, 7)
    links = [service.connect(address) for address in first]
    for address in (one_more, last):
        service.refuse(address)
    for link in links:
        link.talk()


def test_connections_may_bring_a_ban(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(CROWD, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(6)]
    for link in links:
        link.wait_reset()
    block = guard.block_of(address)
    assert (block["kind"], block["rule"]) == ("ban", "crowd")
    wait_until(lambda: server_sockets(lab, address) == [])


def test_byte_rate(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(BYTES, v6)
    pump, calm = service.connect(source(v6)), service.connect(source(v6))
    pump.client.settimeout(10)

    def swallow() -> None:
        if not pump.server.recv(1 << 16):
            raise OSError

    threads = [chatting(swallow, 0), chatting(calm.talk, 0.05)]
    try:
        with pytest.raises(ConnectionError):
            until_it_fails(lambda: pump.client.sendall(bytes(1 << 14)))
        sweeps(guard, 2)
    finally:
        for thread, ended in threads:
            ended.set()
            thread.join()
    calm.talk()
    assert guard.events("reset", "bytes") >= 1


def test_slow(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(SLOW, v6)
    dripping, normal = service.connect(source(v6)), service.connect(source(v6))
    drip, drip_end = chatting(lambda: dripping.client.sendall(b"."), 0.4)
    flow, flow_end = chatting(lambda: normal.client.sendall(bytes(400)), 0.4)
    try:
        dripping.wait_reset()
        sweeps(guard, 3)
        assert not is_dead(normal.client)
    finally:
        for thread, end in ((drip, drip_end), (flow, flow_end)):
            end.set()
            thread.join()
    assert normal.server.recv(1 << 16)
    assert not is_dead(normal.server)


def test_idle(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(IDLE, v6)
    address = source(v6)
    silent, talking = service.connect(address), service.connect(address)
    began = time.monotonic()

    def died() -> bool:
        talking.talk()
        return silent.dead

    wait_until(died)
    assert time.monotonic() - began > 1.9
    silent.wait_reset()
    talking.talk()
    assert guard.events("reset", "idle") >= 1


def test_age(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(AGE, v6)
    old = service.connect(source(v6))
    began = time.monotonic()
    with pytest.raises(OSError, match=r"reset|pipe"):
        until_it_fails(old.talk)
    assert time.monotonic() - began > 1.9
    wait_until(lambda: old.dead)
    service.connect(source(v6)).talk()


@pytest.mark.parametrize("port", [TELL_SOURCE, TELL_SERVER])
def test_only_one_end_is_told(guard: Guard, serve: Open, v6: bool, port: int) -> None:
    link = serve(port, v6).connect(source(v6))
    told, other = link.client, link.server
    if port == TELL_SERVER:
        told, other = other, told
    wait_until(lambda: is_dead(told))
    sweeps(guard, 2)
    assert not is_dead(other)


def test_observing_tells_once(guard: Guard, serve: Open, v6: bool) -> None:
    link: Link = serve(WATCH, v6).connect(source(v6))
    before = guard.events("observed", "watch")
    wait_until(lambda: guard.events("observed", "watch") == before + 1)
    sweeps(guard, 3)
    assert guard.events("observed", "watch") == before + 1
    link.talk()
