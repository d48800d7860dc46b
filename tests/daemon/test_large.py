"""A CDN that carries most connections is named and not hit for numbers; who floods is hit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, source
from tests.support.traffic import Link, Open, Service, connect, is_dead

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

PORT, LIMIT, NEAR = 8001, 60, 52
POLICY = f"""
version: 1
name: behind-a-cdn
mode: {{mode}}
sweep_every: 500ms
protect: {{{{interfaces: [out]}}}}
large_sources: {{{{after: 10s, ordinary: [{{ordinary}}]}}}}
rules:
  - {{{{name: hoarder, measure: connections, over: {LIMIT}, then: reset}}}}
  - {{{{name: opened, measure: connection_rate, over: 20/m, burst: 400, then: reset}}}}
"""


def policy(mode: str, ordinary: str = "") -> str:
    return POLICY.format(mode=mode, ordinary=f'"{ordinary}"' if ordinary else "")


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, policy("observe"), tmp_path_factory.mktemp("large")) as guard:
        yield guard


def served(service: Service, count: int, address: str = "") -> list[Link]:
    """Return new connections that were answered, of one source or of one each."""
    links = [service.connect(address or source(service.v6)) for _ in range(count)]
    for link in links:
        link.talk()
    return links


def attempt(held: contextlib.ExitStack, service: Service, address: str) -> list[socket.socket]:
    """Return one more connection, which may be refused once it is made, or none."""
    try:
        return [held.enter_context(connect(service.lab, address, service.address, PORT))]
    except OSError:
        return []


def sweeps(guard: Guard) -> int:
    return int(guard.status()["counts"].get("sweeps", 0))


def after_sweeps(guard: Guard, links: list[Link]) -> int:
    """Return how many connections are alive after some more sweeps."""
    done = sweeps(guard)
    wait_until(lambda: sweeps(guard) >= done + 4, 20)
    return sum(not is_dead(link.client) for link in links)


def named(guard: Guard, address: str) -> dict[str, int]:
    """Return what the status says of a large source, or nothing."""
    rows = guard.status()["large_sources"]
    found: list[dict[str, int]] = [row for row in rows if row["source"] == network_of(address)]
    return found[0] if found else {}


def is_spared(guard: Guard, address: str) -> bool:
    return named(guard, address).get("may_hold", 0) > 0


def test_a_cdn_is_named_and_goes_on_until_somebody_says_what_it_is(
    guard: Guard, serve: Open, v6: bool
) -> None:
    service, cdn = serve(PORT, v6), source(v6)
    assert guard.cli("policy", "learn", "--live", "--start").returncode == 0
    visitors = served(service, 20)
    links = served(service, 2 * LIMIT, cdn)
    wait_until(lambda: is_spared(guard, cdn), 30)
    out = guard.runtime / "proposed.yaml"
    enough = ("--least-sources", "0", "--least-time", "1s")
    assert guard.cli("policy", "learn", "--live", "--out", str(out), *enough).returncode == 0
    assert f"# Note: {network_of(cdn)} carries " in out.read_text()
    assert named(guard, cdn)["may_hold"] == 4 * LIMIT
    would = guard.events("reset", "hoarder")  # before it was known
    guard.apply(policy("enforce"))
    assert after_sweeps(guard, links) == 2 * LIMIT
    links += served(service, LIMIT, cdn)
    assert after_sweeps(guard, links) == 3 * LIMIT
    assert guard.events("reset", "hoarder") == would

    text = guard.cli("status").stdout
    assert re.search(rf"LARGE for \d+ s: {re.escape(network_of(cdn))}, \d+% of all", text)
    assert "`large_sources: {ordinary: [...]}`" in text
    assert guard.events("large_source", "large_source") == 1
    event = next(e for e in guard.status()["recent"] if e["kind"] == "large_source")
    assert event["subject"] == network_of(cdn)

    sweeper = guard.status()["sweeper"]["pid"]
    os.kill(sweeper, signal.SIGKILL)
    wait_until(lambda: guard.status()["sweeper"]["pid"] != sweeper, 20)
    wait_until(lambda: guard.status()["sweeper"]["ready"], 20)
    assert after_sweeps(guard, links) == 3 * LIMIT  # its successor knows it

    known = named(guard, cdn)
    guard.stop()
    guard.file.write_text(policy("enforce"))
    guard.start()
    assert after_sweeps(guard, links) == 3 * LIMIT  # and so does the next guard, at once
    assert named(guard, cdn)["may_hold"] == known["may_hold"]
    assert named(guard, cdn)["since_s"] >= known["since_s"]
    assert guard.events("large_source", "large_source") == 0

    guard.apply(policy("enforce", network_of(cdn)))
    wait_until(lambda: not named(guard, cdn), 20)
    wait_until(lambda: sum(not is_dead(link.client) for link in links) == LIMIT, 20)
    assert after_sweeps(guard, visitors) == 20


def test_one_who_floods_is_contained_while_he_goes_on_and_is_named(
    guard: Guard, serve: Open, v6: bool
) -> None:
    guard.apply(policy("enforce"))
    service, attacker = serve(PORT, v6), source(v6)
    visitors = served(service, 20)
    flood = served(service, NEAR, attacker)
    more: list[socket.socket] = []
    with contextlib.ExitStack() as held:

        def is_named() -> bool:
            more.extend(attempt(held, service, attacker))
            return bool(named(guard, attacker))

        wait_until(is_named, 60)
        assert named(guard, attacker)["may_hold"] == 0
        wait_until(lambda: sum(not is_dead(one) for one in more) <= LIMIT - NEAR, 20)
        assert len(more) > LIMIT
    assert after_sweeps(guard, flood) == NEAR
    assert after_sweeps(guard, visitors) == 20
    assert f"{network_of(attacker)}, " in guard.cli("status").stdout
