"""An administrator's own rules, sets, marks and routes work on beside the guard, and outlast it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from rstguard.lab.guard import alive, leftovers
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, network_of, server_address, source
from tests.support.traffic import Open, answer, bind, connect, refused

pytestmark = pytest.mark.netns

MARKED, BLOCKED, MOVED, BACKDOOR = range(8002, 8006)
POLICY = """
version: 1
name: neighbours
sweep_every: 500ms
protect: {interfaces: [out]}
rules:
  - {name: crowd, measure: connection_rate, over: 1/m, burst: 5, then: ban, for: 60s}
  - {name: opens, measure: half_open, over: 200, then: drop}
  - {name: short, measure: short_connections, shorter_than: 1h, over: 1000/s, then: drop}
  - {name: stray, measure: out_of_state, over: 1000/s, then: drop}
"""
OWN = f"""\
*raw
-A PREROUTING -p tcp -m tcp --dport {BLOCKED + 100} -j DROP
-A OUTPUT -p tcp -m tcp --dport 9 -j DROP
COMMIT
*mangle
-A PREROUTING -p tcp -m tcp --dport {MARKED} -j MARK --set-xmark 0x7/0xff
-A PREROUTING -p tcp -m tcp --dport {MARKED} -j CONNMARK --set-xmark 0x7/0xff
-A FORWARD -p tcp -m mark --mark 0x7/0xff -m connmark --mark 0x7/0xff -j ACCEPT
-A POSTROUTING -p tcp -m mark --mark 0x7/0xff -j ACCEPT
COMMIT
*nat
-A PREROUTING -p tcp -m tcp --dport {MOVED} -j REDIRECT --to-ports {BACKDOOR}
COMMIT
*filter
:admin - [0:0]
-A INPUT -m set --match-set OWNSET src -j ACCEPT
-A FORWARD -p tcp -m tcp --dport {BLOCKED} -j REJECT --reject-with tcp-reset
-A FORWARD -j admin
-A admin -p tcp -m tcp --dport 1 -j DROP
COMMIT
"""


@pytest.fixture(scope="module")
def own(lab: ThreeHosts) -> list[str]:
    """Set up what an administrator has; return how the kernel shows it."""
    for tool, family, name in (("iptables", "inet", "own4"), ("ip6tables", "inet6", "own6")):
        lab.run("gateway", "ipset", "create", name, "hash:net", "family", family)
        text = OWN.replace("OWNSET", name)
        lab.run("gateway", f"{tool}-restore", "--noflush", stdin=text)
    lab.run("gateway", "ipset", "add", "own4", "192.0.2.0/24")
    for way, target in (("-4", SERVER4), ("-6", SERVER6)):
        # What bears mark 7 goes by a table of its own: without it, nowhere.
        lab.run("gateway", "ip", way, "rule", "add", "fwmark", "7/0xff", "lookup", "77")
        width = "128" if way == "-6" else "32"
        lab.run(
            "gateway", "ip", way, "route", "add", f"{target}/{width}", "dev", "in", "table", "77"
        )
    return shown(lab)


def shown(lab: ThreeHosts) -> list[str]:
    """Return all rules and sets that are not the guard's, in order."""
    lines = []
    for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"], ["ip", "rule"]):
        lines += lab.run("gateway", *command).splitlines()
    kept = [line.split("[")[0].strip() for line in lines if "rstguard" not in line]
    # An empty table that somebody has looked at is no change.
    return [line for line in kept if line and line[0] not in "#:*" and line != "COMMIT"]


@pytest.fixture(scope="module")
def guard(
    lab: ThreeHosts, own: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("neighbours")) as guard:
        yield guard


def rule_count(lab: ThreeHosts, tool: str, table: str, chain: str, rule: int) -> int:
    """Return how many packets a rule (from 1, those of the guard left out) has seen."""
    listed = lab.run("gateway", tool, "-w", "-t", table, "-L", chain, "-vnx").splitlines()[2:]
    own = [line for line in listed if "rstguard" not in line]
    return int(own[rule - 1].split()[0])


@BOTH_FAMILIES
def test_own_marks_and_routes(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    tool = "ip6tables" if v6 else "iptables"
    before = rule_count(lab, tool, "mangle", "POSTROUTING", 1)
    link = serve(MARKED, v6).connect(source(v6))
    link.talk()
    # SYN, ACK, data and its ACK: none has lost the mark on its way through queue and chains.
    assert rule_count(lab, tool, "mangle", "POSTROUTING", 1) >= before + 4
    assert rule_count(lab, tool, "mangle", "FORWARD", 1) >= before
    entry = lab.run(
        "gateway", "conntrack", "-L", "-f", "ipv6" if v6 else "ipv4", "-p", "tcp",
        "--orig-port-src", str(link.port),
    )  # fmt: skip
    mark = int(entry.split("mark=")[1].split()[0])
    assert mark & 0xFF == 7
    assert mark >> 24
    assert guard.kill(source_port=link.port)["confirmed"] == 1
    link.wait_reset()


@BOTH_FAMILIES
def test_own_rejects(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(BLOCKED, v6)
    assert refused(lab, source(v6), service.address, BLOCKED)
    assert answer(lab, source(v6), service.address, BLOCKED + 100) == "silence"


@BOTH_FAMILIES
def test_own_redirects(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(BACKDOOR, v6, "gateway")
    service.port = MOVED
    link = service.connect(source(v6))
    link.talk()
    assert guard.kill(source_port=link.port)["confirmed"] == 1
    link.wait_reset()


@BOTH_FAMILIES
def test_a_ban_beside_them(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(MARKED, v6)
    address = source(v6)
    links = [service.connect(address) for _ in range(5)]
    connect(lab, address, service.address, MARKED).close()
    for link in links:
        link.wait_reset()
    assert guard.block_of(address)["kind"] == "ban"


@BOTH_FAMILIES
def test_what_is_not_tcp_passes(lab: ThreeHosts, guard: Guard, v6: bool) -> None:
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with lab.inside("server"), socket.socket(family, socket.SOCK_DGRAM) as inbox:
        inbox.bind(("", 5353))
        inbox.settimeout(5)
        with lab.inside("client"), socket.socket(family, socket.SOCK_DGRAM) as outbox:
            bind(outbox, source(v6))
            outbox.sendto(b"hello", (server_address(v6), 5353))
        assert inbox.recv(16) == b"hello"


@BOTH_FAMILIES
def test_connections_from_inside_are_not_looked_at(lab: ThreeHosts, guard: Guard, v6: bool) -> None:
    """They come in on another interface: the guard neither counts nor resets them."""
    address = source(v6)
    with lab.inside("client"):
        family = socket.AF_INET6 if v6 else socket.AF_INET
        listener = socket.create_server(("", 9100), family=family)
    with listener:
        tool = "ip6tables" if v6 else "iptables"
        diverted = rule_count(lab, tool, "mangle", "rstguard-queue", 1)
        for _ in range(20):
            with lab.connect("server", address, 9100) as one, listener.accept()[0] as other:
                one.sendall(b"hello")
                assert other.recv(5) == b"hello"
    assert rule_count(lab, tool, "mangle", "rstguard-queue", 1) == diverted
    assert guard.block_of(network_of(server_address(v6))) is None


def test_they_are_as_they_were(lab: ThreeHosts, own: list[str], guard: Guard) -> None:
    """The last test with this guard: it is applied anew, killed, cleaned up after, and stopped."""
    assert shown(lab) == own
    guard.apply(POLICY.replace("[out]", '[out], ports: ["1-60000"]'))
    guard.apply(POLICY + "blocking: reset\n")
    assert shown(lab) == own
    children = guard.children()
    os.kill(guard.pid, signal.SIGKILL)
    guard.wait()
    wait_until(lambda: not any(map(alive, children)))
    assert guard.cli("cleanup").returncode == 0
    assert shown(lab) == own
    guard.start()
    assert shown(lab) == own
    assert guard.stop() == 0
    assert leftovers(lab) == []
    assert shown(lab) == own
