"""Floods of requests on connections that stay open, and who looks like one and is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

RESET, BAN, WATCH = 8701, 8702, 8703
POLICY = f"""
version: 1
name: packets
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: hasty, measure: packet_rate, ports: [{RESET}], per: connection, over: 100/s,
     then: reset}}
  - {{name: flood, measure: packet_rate, ports: [{BAN}], over: 400/s, then: ban, for: 60s}}
  - {{name: watch, measure: packet_rate, ports: [{WATCH}], over: 400/s, then: observe}}
"""
REQUEST = b"GET / HTTP/1.1\r\nHost: www.example\r\n\r\n"
ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("packets")) as guard:
        yield guard


@contextmanager
def going_on(*turns: Callable[[], None]) -> Iterator[None]:
    """Do things again and again beside the test, each until it fails or the test is done."""
    ended = threading.Event()

    def run(turn: Callable[[], None]) -> None:
        with suppress(OSError):
            while not ended.is_set():
                turn()

    threads = [threading.Thread(target=run, args=(turn,)) for turn in turns]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def exchange(link: Link, answer: bytes = ANSWER) -> None:
    """Ask once, and take the whole answer."""
    for one in (link.client, link.server):
        one.settimeout(5)
    link.client.sendall(REQUEST)
    if not link.server.recv(len(REQUEST)):
        raise OSError
    link.server.sendall(answer)
    left = len(answer)
    while left:
        left -= len(got := link.client.recv(left))
        if not got:
            raise OSError


def browse(link: Link) -> None:
    """Ask for a page, and read it for a moment."""
    exchange(link, bytes(30_000))
    time.sleep(0.05)


def test_a_connection_that_asks_without_a_pause_is_reset(
    guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(RESET, v6)
    who = source(v6)
    flooding, calm, other = (service.connect(one) for one in (who, who, source(v6)))
    with going_on(lambda: exchange(flooding), lambda: browse(calm), lambda: browse(other)):
        wait_until(lambda: flooding.dead)
    for link in (calm, other):
        exchange(link)
    assert guard.block_of(who) is None
    assert guard.events("reset", "hasty") == 1 + v6


def test_a_source_that_floods_on_many_connections_is_banned(
    guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(BAN, v6)
    flooder, honest = source(v6), source(v6)
    links = [service.connect(flooder) for _ in range(8)]
    visitor = service.connect(honest)

    def flood() -> None:
        for link in links:
            exchange(link)

    with going_on(flood, lambda: browse(visitor)):
        wait_until(lambda: guard.block_of(flooder) is not None)
        wait_until(lambda: all(link.dead for link in links))
    block = guard.block_of(flooder)
    assert (block["kind"], block["rule"]) == ("ban", "flood")
    assert guard.block_of(honest) is None
    exchange(visitor)


@pytest.mark.parametrize("port", [RESET, BAN])
def test_bulk_in_either_direction_is_no_flood(
    guard: Guard, serve: Open, v6: bool, port: int
) -> None:
    service = serve(port, v6)
    down, up = (service.connect(source(v6)) for _ in range(2))
    done = guard.status()["counts"]["sweeps"]
    with ExitStack() as stack:
        for link in (down, up):
            link.client.settimeout(5)
            link.server.settimeout(5)
        stack.enter_context(
            going_on(
                lambda: down.server.sendall(bytes(1 << 16)),
                lambda: _swallow(down.client.recv(1 << 16)),
                lambda: up.client.sendall(bytes(1 << 16)),
                lambda: _swallow(up.server.recv(1 << 16)),
            )
        )
        wait_until(lambda: guard.status()["counts"]["sweeps"] >= done + 6, 20)
        assert not down.dead
        assert not up.dead
    for link in (down, up):
        assert guard.block_of(link.source) is None


def _swallow(data: bytes) -> None:
    if not data:
        raise OSError


def test_what_is_only_observed_goes_on(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(WATCH, v6)
    link = service.connect(source(v6))
    with going_on(lambda: exchange(link)):
        wait_until(lambda: guard.events("observed", "watch") >= 1 + v6)
    exchange(link)
