"""Many clients behind one address, and an attacker beside them: who is served, who is not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import neighbours
from tests.support.traffic import bind

pytestmark = pytest.mark.netns

PORT = 8080
CLIENTS = 300
AT_ONCE = 60
VIEWS = 20
"""Page views, each of so many connections at once: 1,200 requests from one address."""
ANSWER = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 3000
POLICY = """\
version: 1
name: office
protect: {interfaces: [out]}
sweep_every: 500ms
rules:
  - {name: syn-rate, measure: syn_rate, over: 20/s, burst: 100, unless: {productive: 80%},
     then: ban, for: 10m}
  - {name: opened, measure: connection_rate, over: 20/s, burst: 100, unless: {productive: 80%},
     then: ban, for: 10m}
  - {name: hoarder, measure: connections, over: 50, unless: {productive: 80%}, then: ban, for: 10m}
"""


@pytest.fixture
def web(lab: ThreeHosts) -> Iterator[None]:
    """A server that answers each request, and waits for those that come late."""
    with lab.inside("server"):
        listener = socket.create_server((SERVER4, PORT), backlog=4096)
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(ANSWER)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(answer, sock=listener)

    thread = Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    yield
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


async def fetch(lab: ThreeHosts, address: str) -> bool:
    """Make one request of a page and tell whether it was answered in full."""
    with lab.inside("client"):
        one = socket.socket()
    one.setblocking(False)
    bind(one, address)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(5):
            await loop.sock_connect(one, (SERVER4, PORT))
            await loop.sock_sendall(one, b"GET / HTTP/1.0\r\n\r\n")
            received = b""
            while more := await loop.sock_recv(one, 65536):
                received += more
    except (OSError, TimeoutError):
        return False
    finally:
        one.close()
    return received == ANSWER


async def page(lab: ThreeHosts, address: str, parts: int) -> int:
    """View a page whose parts are asked for all at once; return how many came."""
    return sum(await asyncio.gather(*(fetch(lab, address) for _ in range(parts))))


async def pages(lab: ThreeHosts, address: str) -> int:
    """View big pages, four a second."""
    got = 0
    for _ in range(VIEWS):
        began = time.monotonic()
        got += await page(lab, address, AT_ONCE)
        await asyncio.sleep(max(0, began + 0.25 - time.monotonic()))
    return got


async def work(lab: ThreeHosts, address: str) -> int:
    """Let each of the clients view a small page within some seconds, one after another."""
    got = 0
    for _ in range(CLIENTS // 5):
        began = time.monotonic()
        got += sum(await asyncio.gather(*(page(lab, address, 1) for _ in range(5))))
        await asyncio.sleep(max(0, began + 0.25 - time.monotonic()))
    return got


def attack(lab: ThreeHosts, address: str) -> tuple[float, list[socket.socket]]:
    """Open connections that say nothing, until they fail; return after how many seconds."""
    began, held = time.monotonic(), []
    while time.monotonic() < began + 10:
        with lab.inside("client"):
            one = socket.socket()
        held.append(one)
        bind(one, address)
        one.settimeout(0.5)
        try:
            one.connect((SERVER4, PORT))
        except OSError:
            return time.monotonic() - began - 0.5, held
    return time.monotonic() - began, held


def test_an_office_behind_one_address_beside_an_attacker(
    lab: ThreeHosts, tmp_path: Path, web: None
) -> None:
    office, attacker = neighbours(v6=False, count=2)
    with Guard(lab, POLICY, tmp_path / "guard", workers=1) as guard:
        # The working day begins at 20 connections a second, as the limit allows anybody.
        assert asyncio.run(work(lab, office)) == CLIENTS
        wait_until(lambda: guard.status()["productive"] == 1)
        seconds, held = attack(lab, attacker)
        assert seconds < 1
        wait_until(lambda: guard.block_of(attacker) is not None)
        served = asyncio.run(pages(lab, office))
        assert served == AT_ONCE * VIEWS
        assert guard.block_of(office) is None
        assert guard.block_of(attacker) is not None
        # The attacker's data-less connections earned it nothing.
        assert guard.status()["productive"] == 1
    for one in held:
        one.close()


def test_without_standing_the_same_page_views_are_an_attack(
    lab: ThreeHosts, tmp_path: Path, web: None
) -> None:
    (office,) = neighbours(v6=False, count=1)
    # On a slow machine its first page would earn it standing at the next sweep, which comes at once
    # where many connections are open.
    seldom = POLICY.replace("sweep_every: 500ms", "sweep_every: 1m").partition(
        "  - {name: hoarder"
    )[0]
    with Guard(lab, seldom, tmp_path / "guard", workers=1) as guard:
        # Its burst of 100 takes it to the shun, the same once more by SYN cookies to the ban: how
        # many it is served until then is for its speed to say, and to how soon the ban comes.
        wait_until(lambda: asyncio.run(page(lab, office, 2 * AT_ONCE)) < 2 * AT_ONCE, 30)
        assert guard.events("shun", "syn-rate")
        wait_until(lambda: (guard.block_of(office) or {}).get("kind") == "ban")
