"""A shun challenges: who returns a SYN cookie is served while SYNs are forged in his name."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterable, Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.beside import beside
from tests.support.budget import learned
from tests.support.forged import forger
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Open, Service, connect, fate

pytestmark = pytest.mark.netns

PORT, RARE, UNKNOWN, KEPT = 8080, 8081, 8082, 8083
POLICY = f"""\
version: 1
name: challenge
syn_budget: off
{{head}}
protect: {{{{interfaces: [out]}}}}
sweep_every: 500ms
rules:
  - {{{{name: syn-rate, measure: syn_rate, ports: [{PORT}], over: 50/s, burst: 50, then: ban,
     for: 10m}}}}
  - {{{{name: half-open, measure: half_open, over: 20, within: 30s, then: ban, for: 10m}}}}
  - {{{{name: scan, measure: distinct_ports, over: 15, within: 10s, then: ban, for: 10m}}}}
  - {{{{name: strays, measure: out_of_state, over: 5/s, then: ban, for: 10m}}}}
  - {{{{name: rare, measure: syn_rate, ports: [{RARE}], over: 1/m, burst: 3, then: ban, for: 10m}}}}
  - {{{{name: kept, measure: connection_rate, ports: [{KEPT}], over: 1/m, burst: 4, then: ban,
     for: 10m, keep_existing: true}}}}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY.format(head=""), tmp_path_factory.mktemp("challenge")) as guard:
        yield guard


@contextlib.contextmanager
def meanwhile(act: Callable[[int], None]) -> Iterator[None]:
    """Do something a hundred times a second while the context lasts."""
    numbers = itertools.count()
    with beside(lambda: act(next(numbers)), 0.01):
        yield


def fifty(number: int) -> Iterable[int]:
    """Return fifty ports, others for each of many numbers."""
    first = 1024 + 50 * number % 60_000
    return range(first, first + 50)


@contextlib.contextmanager
def flooded(lab: ThreeHosts, guard: Guard, victim: str, service: Service) -> Iterator[None]:
    """Forge some thousand SYNs a second in the victim's name while the context lasts."""
    with (
        forger(lab, victim, service.address, service.port) as blind,
        meanwhile(lambda number: blind.syns(fifty(number))),
    ):
        wait_until(lambda: guard.block_of(victim) is not None)
        yield


def is_shunned(guard: Guard, address: str) -> bool:
    block = guard.block_of(address)
    return block is not None and (block["kind"], block["answer"]) == ("shun", "challenge")


def bans(guard: Guard) -> int:
    return sum(guard.status()["counts"].get("ban", {}).values())


@pytest.mark.usefixtures("tracker")
@BOTH_FAMILIES
@pytest.mark.parametrize("place", ["server", "gateway"])
def test_a_visitor_in_whose_name_syns_are_forged_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, place: str
) -> None:
    service, victim = learned(guard, serve(PORT, v6, place), place), source(v6)
    before, banned = service.connect(victim), bans(guard)
    before.talk()
    with flooded(lab, guard, victim, service):
        for _ in range(20):
            service.connect(victim).talk()
            before.talk()
            assert is_shunned(guard, victim)
        assert "challenged" in guard.ask("explain", source=victim)["state"]
    assert bans(guard) == banned


@BOTH_FAMILIES
def test_a_newcomer_in_whose_name_ports_are_scanned_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, victim, banned = learned(guard, serve(PORT, v6)), source(v6), bans(guard)

    def scan(number: int) -> None:
        with forger(lab, victim, service.address, 9000 + number) as blind:
            blind.syns([20_000 + number])

    with meanwhile(scan):
        wait_until(lambda: guard.block_of(victim) is not None)
        for _ in range(20):
            service.connect(victim).talk()
        assert is_shunned(guard, victim)
    assert guard.block_of(victim)["rule"] in {"scan", "half-open"}
    assert bans(guard) == banned


def test_a_shunned_source_gets_nothing_where_no_offer_is_known(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service, victim = learned(guard, serve(PORT)), source(False)
    serve(UNKNOWN)
    with flooded(lab, guard, victim, service):
        with pytest.raises(TimeoutError):
            connect(lab, victim, service.address, UNKNOWN, timeout=1.5)
        service.connect(victim).talk()


@BOTH_FAMILIES
def test_who_returns_cookies_in_a_hurry_is_banned(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """What a flooder has from being challenged is his limit once more, and then a ban."""
    service, attacker = learned(guard, serve(RARE, v6)), source(v6)
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            try:
                one = connect(lab, attacker, service.address, RARE, timeout=3)
            except OSError:
                break
            opened.append(stack.enter_context(one))
        wait_until(lambda: (guard.block_of(attacker) or {}).get("kind") == "ban")
        # Of a later one the last ACK may have come behind the ban: its server never heard of it.
        for one in opened[: 3 + 3 + 1]:
            wait_until(lambda one=one: fate(one) in ("ECONNRESET", "EPIPE"))  # type: ignore[misc]
        assert service.waiting() <= 3 + 3


def test_the_owners_resets_are_no_strays(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    """His host refuses each cookie that he has not asked for, hundreds a second."""
    service, victim = learned(guard, serve(PORT)), source(False)
    with flooded(lab, guard, victim, service):
        strays = guard.events("shun", "strays")
        for _ in range(30):
            service.connect(victim).talk()
        used = {rule["name"]: rule["used_percent"] for rule in _explained(guard, victim)}
    assert guard.events("shun", "strays") == strays
    assert not used["strays"]


def _explained(guard: Guard, address: str) -> list[dict[str, object]]:
    rules: list[dict[str, object]] = guard.ask("explain", source=address)["rules"]
    return rules


def test_a_ban_that_keeps_connections_is_not_challenged(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service, attacker = learned(guard, serve(KEPT)), source(False)
    links = [service.connect(attacker) for _ in range(4)]
    for link in links:
        link.talk()
    with contextlib.suppress(OSError):
        service.connect(attacker, timeout=1).talk()
    wait_until(lambda: guard.block_of(attacker) is not None)
    block = guard.block_of(attacker)
    assert (block["kind"], block["answer"]) == ("ban", "drop")
    with pytest.raises(TimeoutError):
        connect(lab, attacker, service.address, KEPT, timeout=1.5)
    for link in links:
        link.talk()


@pytest.mark.parametrize("options", [0, 4, 12, 20, 40])
def test_an_answer_is_no_longer_than_what_it_answers(
    lab: ThreeHosts, guard: Guard, serve: Open, options: int
) -> None:
    from scapy.layers.inet import IP, TCP

    service, victim = learned(guard, serve(PORT)), source(False)
    stamps, size = ("Timestamp", (1, 0)), ("MSS", 1460)
    more = [("SAckOK", b""), ("WScale", 7)]
    rich = [size, ("SAckOK", b""), stamps, ("NOP", None), ("WScale", 7)]
    chosen = {0: [], 4: [size], 12: [stamps, *more[:1]], 20: rich, 40: [*rich, *[("NOP", 0)] * 20]}
    lab.run("client", "iptables", "-A", "INPUT", "-d", victim, "-j", "DROP")
    with lab.inside("client"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with sender, seen, flooded(lab, guard, victim, service):
        seen.settimeout(5)
        segment = TCP(sport=777, dport=PORT, flags="S", seq=1, options=chosen[options])
        syn = bytes(IP(src=victim, dst=SERVER4) / segment)
        assert len(syn) == 40 + options
        sender.sendto(syn, (SERVER4, 0))
        answer = next(iter(lambda: _to_port(seen, 777), b""))
        assert len(answer) <= len(syn)
    lab.run("client", "iptables", "-D", "INPUT", "-d", victim, "-j", "DROP")


def _to_port(seen: socket.socket, port: int) -> bytes:
    """Return the next IPv4 packet that comes in for a port."""
    while True:
        data, where = seen.recvfrom(2000)
        if where[2] != socket.PACKET_OUTGOING and data[22:24] == port.to_bytes(2, "big"):
            return data


@pytest.mark.parametrize("blocking", ["reset", "unreachable"])
def test_a_policy_that_refuses_challenges_as_well(
    lab: ThreeHosts, guard: Guard, serve: Open, blocking: str
) -> None:
    guard.apply(POLICY.format(head=f"blocking: {blocking}"))
    try:
        service, victim = learned(guard, serve(PORT)), source(False)
        serve(UNKNOWN)
        with flooded(lab, guard, victim, service):
            for _ in range(10):
                service.connect(victim).talk()
            with pytest.raises(OSError, match=r"refused|No route|unreachable"):
                connect(lab, victim, service.address, UNKNOWN)
    finally:
        guard.apply(POLICY.format(head=""))


def test_a_policy_may_drop_instead(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service, victim = learned(guard, serve(PORT)), source(False)
    guard.apply(POLICY.format(head="shun: drop"))
    try:
        found = {"answer": "drop", "services": [], "why_not": "", "why_no_dnat": "", "cookies": {}}
        assert guard.status()["shun"] == found
        with flooded(lab, guard, victim, service), pytest.raises(TimeoutError):
            service.connect(victim, timeout=1.5)
        assert guard.block_of(victim)["answer"] == "drop"
    finally:
        guard.apply(POLICY.format(head=""))


@pytest.mark.parametrize("place", ["server", "gateway"])
@BOTH_FAMILIES
def test_what_others_rules_forbid_a_source_stays_forbidden(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, place: str
) -> None:
    """Who gets himself shunned must not come past the rest of the firewall by a cookie."""
    service, attacker = learned(guard, serve(PORT, v6, place), place), source(v6)
    tables, chain = "ip6tables" if v6 else "iptables", "FORWARD" if place == "server" else "INPUT"
    rule = (chain, "-s", attacker, "-p", "tcp", "--dport", str(PORT), "-j", "DROP")
    established = (chain, "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
    for one in (established, rule):
        lab.run("gateway", tables, "-A", *one)
    try:
        with flooded(lab, guard, attacker, service), pytest.raises(OSError, match="timed out"):
            service.connect(attacker, timeout=1.5).talk()
        assert not service.waiting()
    finally:
        for one in (established, rule):
            lab.run("gateway", tables, "-D", *one)


@BOTH_FAMILIES
def test_a_firewall_that_lets_only_new_connections_in_lets_the_visitor_in(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, victim = learned(guard, serve(PORT, v6)), source(v6)
    tables = "ip6tables" if v6 else "iptables"
    admitted = ("-p", "tcp", "--dport", str(PORT), "-m", "conntrack", "--ctstate", "NEW")
    rules = (
        ("FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"),
        ("FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"),
        ("FORWARD", *admitted, "-j", "ACCEPT"),
        ("FORWARD", "-p", "tcp", "-j", "DROP"),
    )
    for rule in rules:
        lab.run("gateway", tables, "-A", *rule)
    try:
        with flooded(lab, guard, victim, service):
            for _ in range(10):
                service.connect(victim).talk()
    finally:
        for rule in rules:
            lab.run("gateway", tables, "-D", *rule)
