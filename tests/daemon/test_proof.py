"""Proof of address: who tries out ACK numbers in another's name proves nothing, who is real does.

The attacker sees no answer.  He has as many segments as he likes, and knows address and service.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from rstguard.engine.address import parse_address
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Labels, Marks
from rstguard.lab.forging import GUESSES, Forger
from rstguard.lab.waiting import wait_until
from tests.support.forged import forger
from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Open, Service, connect

pytestmark = pytest.mark.netns

PORT, RARE, HOARD = 8080, 8081, 8082
POLICY = f"""\
version: 1
name: proof
syn_budget: off
protect: {{interfaces: [out]}}
sweep_every: 500ms
shun_for: 1s
rules:
  - {{name: syn-rate, measure: syn_rate, over: 50/s, burst: 50, then: ban, for: 10m}}
  - {{name: scan, measure: distinct_ports, over: 15, within: 10s, then: ban, for: 10m}}
  - {{name: rare, measure: connection_rate, ports: [{RARE}], over: 1/h, burst: 4, then: ban,
     for: 10m}}
  - {{name: hoard, measure: connections, ports: [{HOARD}], over: 5, then: ban, for: 10m}}
  - {{name: short, measure: short_connections, over: 5/m, shorter_than: 10s, then: ban, for: 10m}}
"""
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    for command, network in (("iptables", "10.255.0.0/16"), ("ip6tables", "fd73:0:ff00::/40")):
        # The hosts there say nothing to what comes unasked.
        lab.run("client", command, "-w", "-A", "INPUT", "-d", network, "-j", "DROP")
    with Guard(lab, POLICY, tmp_path_factory.mktemp("proof")) as guard:
        yield guard


def silent(v6: bool) -> str:
    """Return the address of a host that answers nothing, and that no test has used yet."""
    number = next(_numbers)
    return f"fd73:0:ff00:{number:x}::1" if v6 else f"10.255.{number}.1"


def explain(guard: Guard, address: str) -> Any:
    return guard.ask("explain", source=address)


def is_deceived(lab: ThreeHosts, victim: str) -> bool:
    """Tell whether the tracker believes that a silent host has completed a handshake."""
    established, source_of = Marks().established, parse_address(victim)
    with lab.inside("gateway"), Conntrack() as table:
        flows = [flow for flow in table.dump(*established) if flow.original.source == source_of]
    labels = Labels()
    proof = 1 << labels.likely | 1 << labels.confirmed
    assert not any(flow.labels & proof for flow in flows)
    return bool(flows)


def flood(blind: Forger, guard: Guard, address: str) -> None:
    """Forge SYNs until they are too many, and many more; nobody is banned for them."""
    for _ in range(2):
        blind.syns(range(20_000, 20_400))
        wait_until(lambda: guard.block_of(address) is not None)
        assert guard.block_of(address)["kind"] == "shun"
        wait_until(lambda: guard.block_of(address) is None)


@BOTH_FAMILIES
def test_acks_tried_out_prove_nothing(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(PORT, v6)
    deceived = 0
    for trial in range(20):
        if trial >= 5 and deceived >= 2:
            break
        victim = silent(v6)
        with forger(lab, victim, service.address, PORT) as blind:
            blind.handshake(1000)
            deceived += is_deceived(lab, victim)
            assert not explain(guard, victim)["proven"]
            flood(blind, guard, victim)
        assert not explain(guard, victim)["proven"]
    assert deceived >= 2, f"{GUESSES} ACKs did not even deceive the tracker"


@BOTH_FAMILIES
def test_a_visitor_in_whose_name_acks_are_tried_out_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, visitor = serve(PORT, v6), source(v6)
    link = service.connect(visitor)
    link.talk()
    with forger(lab, visitor, service.address, PORT) as blind:
        for port in (1000, 1001):
            blind.handshake(port)
            assert guard.block_of(visitor) is None
            link.talk()
        late = service.connect(visitor)  # a suspect's
        late.talk()
        assert explain(guard, visitor)["proven"]
        flood(blind, guard, visitor)
    for one in (link, late):
        one.talk()
    assert not guard.events("ban", "syn-rate")


@BOTH_FAMILIES
def test_handshakes_tried_out_do_not_ban_a_visitor_who_has_some_too(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """Even a rule of some connections an hour bans nobody for connections that he never had."""
    service, visitor = serve(RARE, v6), silent(v6)
    with forger(lab, visitor, service.address, RARE) as blind:
        shuns = guard.events("shun", "rare")
        for port in range(1000, 1160):
            blind.handshake(port)
            assert not guard.events("ban", "rare")
            if guard.events("shun", "rare") > shuns:
                break
        assert guard.events("shun", "rare") > shuns, "no five handshakes of 160 were deceptions"
    assert not guard.events("ban", "short")


def greeting(service: Service, address: str, words: bytes) -> None:
    """Connect, say nothing, and be told some words."""
    link = service.connect(address)
    link.server.sendall(words)
    link.client.settimeout(5)
    assert link.client.recv(100) == words


@BOTH_FAMILIES
@pytest.mark.parametrize("words", [b"\n", b"+OK\r\n", bytes(100)], ids=["1", "5", "100"])
@pytest.mark.parametrize("place", ["server", "gateway"])
def test_the_shortest_answer_proves(
    guard: Guard, serve: Open, v6: bool, words: bytes, place: str
) -> None:
    service, visitor = serve(PORT, v6, place), source(v6)
    if place == "gateway":
        service.address = OUTSIDE6 if v6 else OUTSIDE4
    link = service.connect(visitor)
    link.client.sendall(b"hello")
    assert link.server.recv(5) == b"hello"
    assert not explain(guard, visitor)["proven"]
    greeting(service, visitor, words)
    assert explain(guard, visitor)["proven"]


@BOTH_FAMILIES
def test_who_connects_and_says_nothing_is_banned(guard: Guard, serve: Open, v6: bool) -> None:
    service, attacker, other = serve(HOARD, v6), source(v6), source(v6)
    for _ in range(5):
        service.connect(other)
    links = [service.connect(attacker) for _ in range(6)]
    wait_until(lambda: (guard.block_of(attacker) or {}).get("kind") == "ban", 1)
    for link in links:
        link.wait_reset()
    assert guard.block_of(other) is None


@BOTH_FAMILIES
def test_a_wrong_ack_does_not_make_immune(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """Silent connections of a suspect are ended beyond the limit; answered ones ban him."""
    service, attacker = serve(HOARD, v6), source(v6)
    with forger(lab, attacker, service.address, HOARD) as blind:
        blind.acks(999, [1])
    links = [service.connect(attacker) for _ in range(6)]
    wait_until(lambda: (guard.block_of(attacker) or {}).get("kind") == "shun")
    links[-1].wait_reset()
    for link in links[:5]:
        link.talk()
    wait_until(lambda: guard.block_of(attacker) is None)
    service.connect(attacker).talk()
    wait_until(lambda: (guard.block_of(attacker) or {}).get("kind") == "ban")


def test_a_forged_ack_does_not_take_a_proof_away(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service, visitor = serve(PORT), source(False)
    with forger(lab, visitor, service.address, PORT) as blind:
        blind.acks(999, [1])
        with connect(lab, visitor, service.address, PORT):
            pass
        assert not explain(guard, visitor)["proven"]
        service.accept().close()
        service.connect(visitor).talk()
        assert explain(guard, visitor)["proven"]
        blind.acks(999, [1])
        assert explain(guard, visitor)["proven"]
