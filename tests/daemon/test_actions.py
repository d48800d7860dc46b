"""Each action, seen from both ends of real connections through a real gateway."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.daemon.conftest import Open
from tests.guard import (
    BOTH_FAMILIES,
    Guard,
    answer,
    bind,
    connect,
    neighbours,
    network_of,
    segments,
    server_address,
    server_sockets,
    source,
)
from tests.netns import Lab, wait_until

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

SUBNET, REFUSE, BAN, KEEP, SHUN, OBSERVE, PROVEN = range(8001, 8008)
POLICY = f"""
version: 1
name: actions
shun_for: 2s
protect: {{interfaces: [out]}}
rules:
  - {{name: subnet, measure: syn_rate, ports: [{SUBNET}], per: {{ipv4: 24, ipv6: 48}},
     over: 1/m, burst: 3, then: drop}}
  - {{name: refuse, measure: syn_rate, ports: [{REFUSE}], over: 1/m, burst: 2, then: reset}}
  - {{name: crowd, measure: connection_rate, ports: [{BAN}], over: 1/m, burst: 3,
     then: ban, for: 60s}}
  - {{name: gentle, measure: connection_rate, ports: [{KEEP}], over: 1/m, burst: 3,
     then: ban, for: 60s, keep_existing: true}}
  - {{name: unknown, measure: syn_rate, ports: [{SHUN}], over: 5/s, burst: 5, then: ban, for: 60s}}
  - {{name: watched, measure: syn_rate, ports: [{OBSERVE}], over: 1/m, burst: 1, then: observe}}
  - {{name: known, measure: syn_rate, ports: [{PROVEN}], over: 1/m, burst: 3, then: ban, for: 60s}}
"""


@pytest.fixture(scope="module")
def guard(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("actions")) as guard:
        yield guard


def test_drop_by_subnet(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(SUBNET, v6)
    crowd = neighbours(v6, 5)
    for address in crowd[:3]:
        service.connect(address).talk()
    assert answer(lab, crowd[3], service.address, SUBNET) == "silence"
    assert answer(lab, crowd[4], service.address, SUBNET) == "silence"
    service.connect(source(v6)).talk()
    assert server_sockets(lab, crowd[3]) == []


def test_reset_refuses_a_syn_at_once(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    """A client in SYN-SENT believes a RST only if it acknowledges its SYN (RFC 9293, 3.10.7.3)."""
    service = serve(REFUSE, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(2)]
    began = time.monotonic()
    assert answer(lab, address, service.address, REFUSE, 5) == "ECONNREFUSED"
    assert time.monotonic() - began < 0.5
    for link in links:
        link.talk()
    assert len(server_sockets(lab, address)) == 2
    service.connect(source(v6)).talk()


def test_ban_of_a_proven_source(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service, other_port = serve(BAN, v6), serve(9000, v6)
    address, bystander = source(v6), source(v6)
    links = [service.connect(address) for _ in range(3)]
    elsewhere, uninvolved = other_port.connect(address), service.connect(bystander)
    for link in (*links, elsewhere, uninvolved):
        link.talk()
    connect(lab, address, service.address, BAN).close()
    for link in (*links, elsewhere):
        link.wait_reset()
    wait_until(lambda: server_sockets(lab, address) == [])
    block = guard.block_of(address)
    assert (block["kind"], block["rule"]) == ("ban", "crowd")
    assert 50 <= block["remaining_s"] <= 60
    assert answer(lab, address, service.address, BAN) == "silence"
    assert answer(lab, address, service.address, 9000) == "silence"
    uninvolved.talk()
    service.connect(bystander).talk()


def test_a_ban_is_of_every_protocol(lab: Lab, guard: Guard, v6: bool) -> None:
    banned, free = source(v6), source(v6)
    guard.ask("ban-add", source=network_of(banned), seconds=60)
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with lab.inside("server"), socket.socket(family, socket.SOCK_DGRAM) as inbox:
        inbox.bind(("", 5353))
        inbox.settimeout(5)
        for address in (banned, free):
            with lab.inside("client"), socket.socket(family, socket.SOCK_DGRAM) as outbox:
                bind(outbox, address)
                outbox.sendto(b"hello", (server_address(v6), 5353))
        assert inbox.recvfrom(16)[1][0] == free


def test_keep_existing(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(KEEP, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(3)]
    crossing = connect(lab, address, service.address, KEEP)
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["kind"] == "ban"
    assert answer(lab, address, service.address, KEEP) == "silence"
    for link in links:
        link.talk()
    crossing.close()


def test_shun_of_an_unproven_source_ends_by_itself(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(SHUN, v6)
    address = source(v6)
    segments(lab, address, service.address, SHUN, "S", 30)
    wait_until(lambda: guard.block_of(address) is not None)
    block = guard.block_of(address)
    assert (block["kind"], block["rule"]) == ("shun", "unknown")
    assert block["remaining_s"] <= 2
    assert answer(lab, address, service.address, SHUN) == "silence"
    wait_until(lambda: guard.block_of(address) is None)
    service.connect(address).talk()


def test_a_shunned_source_keeps_its_connections(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    """Whoever forges an address can shut out its newcomers for seconds, and no more than that."""
    service = serve(9001, v6)
    address = source(v6)
    lab.run("gateway", "ipset", "flush", f"rstguard-proven{6 if v6 else 4}")
    link = service.connect(address)
    lab.run("gateway", "ipset", "flush", f"rstguard-proven{6 if v6 else 4}")
    segments(lab, address, service.address, SHUN, "S", 30)
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["kind"] == "shun"
    link.talk()


def test_a_flood_of_a_proven_source_is_banned(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(PROVEN, v6)
    address = source(v6)
    link = service.connect(address)
    segments(lab, address, service.address, PROVEN, "S", 10)
    link.wait_reset()
    assert guard.block_of(address)["kind"] == "ban"
    wait_until(lambda: server_sockets(lab, address) == [])


def test_a_rule_that_observes(lab: Lab, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(OBSERVE, v6)
    address = source(v6)
    before = guard.events("observed", "watched")
    for _ in range(4):
        service.connect(address).talk()
    wait_until(lambda: guard.events("observed", "watched") == before + 3)
    assert guard.block_of(address) is None
    event = guard.status()["recent"][-1]
    assert (event["kind"], event["rule"], event["reason"]) == ("observed", "watched", "syn_rate")
