"""Each action, seen from both ends of real connections through a real gateway."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from rstguard.kernel.readers import BINDING, BUILT_IN, CHOICE
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import CLIENT4, CLIENT6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, network_of, server_address, source
from tests.support.traffic import (
    Open,
    answer,
    bind,
    connect,
    is_dead,
    refused,
    segments,
    server_sockets,
)

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

SUBNET, REFUSE, BAN, KEEP, SHUN, OBSERVE, PROVEN, RESET, WORSE, WIDE, HELD = range(8001, 8012)
POLICY = f"""
version: 1
name: actions
shun: drop
syn_budget: off
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
  - {{name: first-ack, measure: connection_rate, ports: [{RESET}], over: 1/m, burst: 2,
     then: reset}}
  - {{name: held, measure: connection_rate, ports: [{HELD}], over: 1/m, burst: 2, then: drop}}
  - {{name: worse, measure: connection_rate, ports: [{WORSE}], over: 1/m, burst: 3,
     then: ban, for: 2s, escalate: {{factor: 25, up_to: 1h, memory: 1h}}}}
  - {{name: wide, measure: connection_rate, ports: [{WIDE}], per: {{ipv4: 24, ipv6: 48}}, over: 1/m,
     burst: 3, then: ban, for: 60s}}
  - {{name: known, measure: syn_rate, ports: [{PROVEN}], over: 1/m, burst: 3, then: ban, for: 60s}}
"""


@pytest.fixture(scope="module", params=[BUILT_IN, BINDING])
def guard(
    request: pytest.FixtureRequest, lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guard]:
    """The guard, once with each of the ways to read a queue."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHOICE, request.param)
        with Guard(lab, POLICY, tmp_path_factory.mktemp("actions")) as guard:
            assert {worker["reader"] for worker in guard.status()["workers"]} == {request.param}
            yield guard


def test_drop_by_subnet(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(SUBNET, v6)
    crowd = neighbours(v6, 5)
    for address in crowd[:3]:
        service.connect(address).talk()
    assert answer(lab, crowd[3], service.address, SUBNET) == "silence"
    assert answer(lab, crowd[4], service.address, SUBNET) == "silence"
    service.connect(source(v6)).talk()
    assert server_sockets(lab, crowd[3]) == []


def test_reset_refuses_a_syn_at_once(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    """A client in SYN-SENT believes a RST only if it acknowledges its SYN (RFC 9293, 3.10.7.3)."""
    service = serve(REFUSE, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(2)]
    began = time.monotonic()
    assert refused(lab, address, service.address, REFUSE)
    assert time.monotonic() - began < 0.5
    for link in links:
        link.talk()
    assert len(server_sockets(lab, address)) == 2
    service.connect(source(v6)).talk()


def test_ban_of_a_proven_source(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
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


def test_a_ban_is_of_every_protocol(lab: ThreeHosts, guard: Guard, v6: bool) -> None:
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


def test_keep_existing(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
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


def test_shun_of_an_unproven_source_ends_by_itself(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
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


def test_a_shun_frees_the_server_of_unfinished_handshakes(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """Nobody answers behind the address, and the server would wait for a minute."""
    service = serve(SHUN, v6)
    version, silent, net, via = (
        ("-6", "2001:db8:77::1", "2001:db8:77::/64", CLIENT6)
        if v6
        else ("-4", "198.51.100.77", "198.51.100.0/24", CLIENT4)
    )
    lab.run("gateway", "ip", version, "route", "replace", net, "via", via)
    segments(lab, silent, service.address, SHUN, "S", 4, first_port=3000)
    assert len(half_open(lab)) == 4
    segments(lab, silent, service.address, SHUN, "S", 20, first_port=4000)
    wait_until(lambda: guard.block_of(silent) is not None)
    wait_until(lambda: not half_open(lab))


def half_open(lab: ThreeHosts) -> list[str]:
    """Return the server's handshakes that wait for their last ACK."""
    return lab.run("server", "ss", "-tnH", "state", "syn-recv").splitlines()


def test_a_shunned_source_keeps_its_connections(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
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


def test_a_flood_in_the_name_of_a_proven_source_leaves_its_connections_alone(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(PROVEN, v6)
    address = source(v6)
    link = service.connect(address)
    link.talk()
    segments(lab, address, service.address, PROVEN, "S", 10)
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["kind"] == "shun"
    link.talk()


def test_a_rule_that_observes(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(OBSERVE, v6)
    address = source(v6)
    before = guard.events("observed", "watched")
    for _ in range(4):
        service.connect(address).talk()
    wait_until(lambda: guard.events("observed", "watched") == before + 3)
    assert guard.block_of(address) is None
    event = guard.status()["recent"][-1]
    assert (event["kind"], event["rule"], event["reason"]) == ("observed", "watched", "syn_rate")


def test_reset_of_a_connection(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(RESET, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(2)]
    with pytest.raises(ConnectionResetError):  # here, or already as connect() returns
        connect(lab, address, service.address, RESET).recv(1)
    wait_until(lambda: len(server_sockets(lab, address)) == 2)
    for link in links:
        link.talk()
    assert guard.block_of(address) is None


def test_drop_of_a_handshake_holds_against_its_repetition(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(HELD, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(2)]
    with connect(lab, address, service.address, HELD) as third:
        before = guard.status()["counts"].get("rule.held", 0)
        # The server repeats its SYN-ACK after a second; the ACK that this draws is dropped, too.
        wait_until(lambda: guard.status()["counts"].get("rule.held", 0) >= before + 2)
        states = [line.split()[0] for line in server_sockets(lab, address)]
        assert sorted(states) == ["ESTAB", "ESTAB", "SYN-RECV"]
        assert not is_dead(third)
    for link in links:
        link.talk()


def test_the_next_ban_lasts_longer(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(WORSE, v6)
    address = source(v6)
    for _ in range(3):
        service.connect(address)
    connect(lab, address, service.address, WORSE).close()
    wait_until(lambda: guard.block_of(address) is not None)
    assert guard.block_of(address)["remaining_s"] <= 2
    wait_until(lambda: guard.block_of(address) is None)
    connect(lab, address, service.address, WORSE).close()
    wait_until(lambda: guard.block_of(address) is not None)
    assert 40 < guard.block_of(address)["remaining_s"] <= 50


def test_a_ban_of_a_whole_prefix(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(WIDE, v6)
    crowd = neighbours(v6, 5)
    links = [service.connect(address) for address in crowd[:3]]
    connect(lab, crowd[3], service.address, WIDE).close()
    for link in links:
        link.wait_reset()
    banned = {row["source"] for row in guard.ask("ban-list") if row["rule"] == "wide"}
    assert (crowd[0].removesuffix("1::1") + ":/48" if v6 else crowd[0][:-1] + "0/24") in banned
    assert answer(lab, crowd[4], service.address, WIDE) == "silence"
    service.connect(source(v6)).talk()
