"""A guard knows where it stands: a first policy that fits, and told where nothing can match."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from rstguard.policy.load import parse
from tests.support.guard import Guard
from tests.support.network import CLIENT4, OUTSIDE4, OUTSIDE6, SERVER4, ThreeHosts
from tests.support.traffic import is_dead

pytestmark = pytest.mark.netns

WEB, ENCRYPTED, INSIDE = 8080, 8443, 80
MOST_FILLED, PORTS = 300_000, 65536
VISITORS = {WEB: "10.71.1.77", ENCRYPTED: "10.71.1.78"}
"""Not the next hop, which is never reset."""
POLICY = """\
version: 1
name: stands
protect: {{{protect}}}
rules:
  - {{name: many, measure: connections, over: 200, then: reset}}
"""
NFT = f"""\
table ip there {{
    chain in_zone {{
        tcp dport {ENCRYPTED} dnat to {SERVER4}:{INSIDE}
    }}
    chain pre {{
        type nat hook prerouting priority dstnat;
        iifname "out" goto in_zone
    }}
}}
"""


@pytest.fixture(scope="module")
def gateway() -> Iterator[ThreeHosts]:
    """A gateway with a default route, a service of its own, and two that are translated."""
    with ThreeHosts("rgs") as lab:
        lab.ip("gateway", f"route add default via {CLIENT4}")
        for visitor in VISITORS.values():
            lab.ip("client", f"address add {visitor}/24 dev eth0")
        rule = ("PREROUTING", "-d", OUTSIDE4, "-p", "tcp", "--dport", str(WEB), "-j", "DNAT")
        to = ("--to-destination", f"{SERVER4}:{INSIDE}")
        lab.run("gateway", "iptables", "-w", "-t", "nat", "-A", *rule, *to)
        lab.run("gateway", "nft", "-f", "-", stdin=NFT)
        yield lab


def rstguard(
    lab: ThreeHosts, *words: str, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in the gateway."""
    command = lab.command("gateway", sys.executable, "-m", "rstguard", *words)
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_new_policy_fits_is_good_and_guards(gateway: ThreeHosts, tmp_path: Path) -> None:
    with gateway.listen("gateway", 22), gateway.listen("server", INSIDE) as listener:
        done = rstguard(gateway, "policy", "new")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        text = done.stdout
        policy = parse(text, "new").policy
        assert policy.protect.interfaces == ("out",)
        named = {str(one) for one in policy.protect.destinations}
        assert named == {OUTSIDE4, OUTSIDE6}
        assert f"{OUTSIDE4} port {WEB} to {SERVER4} port {INSIDE}" in " ".join(text.split("\n  # "))
        assert f"port {ENCRYPTED} to {SERVER4} port {INSIDE}" in " ".join(text.split("\n  # "))
        assert "ports: [22]" in text
        done = rstguard(gateway, "policy", "check", "-", "--json", text=text)
        assert done.returncode == 0
        problems = json.loads(done.stdout)["problems"]
        assert [problem for problem in problems if problem["severity"] != "note"] == []
        # What is written, but that it acts, and sooner.
        strict = text.replace("mode: observe", "mode: enforce").replace("over: 500", "over: 5")
        with Guard(gateway, strict, tmp_path / "guard", workers=1) as guard:
            wait_until(guard.filtering)
            for port in (WEB, ENCRYPTED):
                hoard(gateway, listener, port)


def accepted(listener: socket.socket, there: list[socket.socket]) -> int:
    """Accept what waits, beside what is there; return how many there are now."""
    with suppress(BlockingIOError):
        while True:
            there.append(listener.accept()[0])
    return len(there)


def hoard(lab: ThreeHosts, listener: socket.socket, port: int) -> None:
    """Try to hold twelve connections to a port, and see that those beyond five are refused."""
    held = []
    with lab.inside("client"):
        for _ in range(12):
            with suppress(ConnectionResetError):
                at, visitor = (OUTSIDE4, port), (VISITORS[port], 0)
                held.append(socket.create_connection(at, 10, source_address=visitor))
    listener.settimeout(0)
    there: list[socket.socket] = []
    wait_until(lambda: accepted(listener, there) == 5, 20)
    wait_until(lambda: sum(map(is_dead, held)) == len(held) - 5, 20)
    for one in (*held, *there):
        one.close()
    wait_until(lambda: "ESTABLISHED" not in lab.run("gateway", "conntrack", "-L", "-p", "tcp"), 20)


DOCKER = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
KUBE = """\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 53 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-A
-A KUBE-SVC-A -m comment --comment "a pod" -j KUBE-SEP-A
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.244.0.3:53
COMMIT
"""
FIREWALLD = """\
table inet firewalld {
    chain nat_PRE_public_allow {
        tcp dport 8444 dnat ip to 10.9.9.9:443
    }
    chain nat_PRE_public {
        jump nat_PRE_public_allow
    }
    chain nat_PREROUTING_ZONES {
        iifname "out" goto nat_PRE_public
        goto nat_PRE_public
    }
    chain nat_PREROUTING {
        type nat hook prerouting priority dstnat + 10;
        jump nat_PREROUTING_ZONES
    }
}
"""
NEIGHBOURS = {
    "docker": ("iptables-restore", DOCKER, "172.17.0.2", "port 8081 to 172.17.0.2 port 80"),
    "kube-proxy": ("iptables-restore", KUBE, "10.244.0.3", "port 30080 to 10.244.0.3 port 53"),
    "firewalld": ("nft", FIREWALLD, "10.9.9.9", "port 8444 to 10.9.9.9 port 443"),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_neighbours_translate(name: str, tmp_path: Path) -> None:
    tool, rules, inside, translation = NEIGHBOURS[name]
    words = ("-f", "-") if tool == "nft" else ("--noflush",)
    with ThreeHosts("rgn") as lab:
        lab.ip("gateway", f"route add default via {CLIENT4}")
        lab.run("gateway", tool, *words, stdin=rules)
        done = rstguard(lab, "policy", "new")
        assert translation in " ".join(done.stdout.split("\n  # "))
        assert {str(one) for one in parse(done.stdout, "new").policy.protect.destinations} == {
            OUTSIDE4, OUTSIDE6,
        }  # fmt: skip
        checked = rstguard(lab, "policy", "check", "-", text=done.stdout)
        assert "warning" not in checked.stderr
        policy = POLICY.format(protect=f"interfaces: [out], destinations: [{inside}]")
        checked = rstguard(lab, "policy", "check", "-", text=policy)
        assert f"clients reach {inside} as {OUTSIDE4}" in checked.stderr


def test_all_uplinks_are_found(tmp_path: Path) -> None:
    with ThreeHosts("rgu") as lab:
        lab.ip("gateway", f"route add default via {CLIENT4}",
               f"route add default via {SERVER4} table 100")  # fmt: skip
        done = rstguard(lab, "policy", "new")
        assert set(parse(done.stdout, "new").policy.protect.interfaces) == {"out", "in"}
        assert "warning" not in rstguard(lab, "policy", "check", "-", text=done.stdout).stderr


def test_for_mail_where_none_is(gateway: ThreeHosts) -> None:
    done = rstguard(gateway, "policy", "new", "--for", "mail", "--interface", "in")
    assert done.returncode == 0
    assert "Nothing was found that serves mail" in done.stdout
    assert parse(done.stdout, "new").policy.protect.interfaces == ("in",)


@pytest.fixture(scope="module")
def guard(gateway: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    policy = POLICY.format(protect="interfaces: [eth0]")
    guard = Guard(gateway, policy, tmp_path_factory.mktemp("stands"), workers=1)
    try:
        guard.launch()
        wait_until(lambda: guard.cli("status").returncode == 1, 30)
        yield guard
    finally:
        guard.end()


def told(guard: Guard, protect: str, sentence: str) -> None:
    """Have a policy applied: status, top, doctor, check and apply say what is amiss."""
    text = POLICY.format(protect=protect)
    file = guard.runtime / "other.yaml"
    file.write_text(text)
    said = guard.cli("policy", "apply", str(file))
    assert said.returncode == 0
    assert sentence in said.stderr
    wait_until(lambda: any(sentence in problem for problem in guard.status()["problems"]), 15)
    done = guard.cli("status")
    assert done.returncode == 1
    assert "filtering" not in done.stdout.split(",")[0].replace("NOT FILTERING", "")
    assert sentence in done.stdout
    beginning = sentence[:20]
    assert beginning in guard.cli("top", "--once", "--interval", "0.2").stdout
    assert sentence in guard.cli("doctor").stdout
    checked = rstguard(guard.lab, "policy", "check", str(file))
    assert "warning: protect." in checked.stderr
    assert sentence in checked.stderr


def test_an_interface_that_is_not_there(guard: Guard) -> None:
    assert guard.status()["state"] == "not filtering"
    told(guard, "interfaces: [eth0]", "no interface here is called eth0")
    guard.lab.ip("gateway", "link add eth0 type bridge", "link set eth0 up")
    wait_until(guard.filtering, 15)
    guard.lab.ip("gateway", "link del eth0")
    wait_until(lambda: guard.status()["state"] == "not filtering", 15)


def test_a_destination_that_is_nowhere(guard: Guard) -> None:
    protect = "interfaces: [out], destinations: [203.0.113.10]"
    told(guard, protect, "nothing can match: nothing comes for 203.0.113.10")
    assert guard.status()["state"] == "degraded"
    assert guard.cli("status", "--filtering").returncode == 0
    guard.lab.ip("gateway", "address add 203.0.113.10/32 dev in")
    guard.apply(POLICY.format(protect="interfaces: [out], destinations: [203.0.113.10]") + "\n")
    wait_until(guard.filtering, 45)
    guard.lab.ip("gateway", "address del 203.0.113.10/32 dev in")


def test_an_inside_address_that_clients_know_by_another(guard: Guard) -> None:
    protect = f"interfaces: [out], destinations: [{SERVER4}]"
    told(guard, protect, f"clients reach {SERVER4} as {OUTSIDE4}")
    protect = f"interfaces: [out], ports: [{INSIDE}]"
    told(guard, protect, f"port {INSIDE} is protected, but clients reach it as port")
    guard.apply(POLICY.format(protect=f"interfaces: [out], destinations: [{OUTSIDE4}]"))
    wait_until(guard.filtering, 15)


def test_a_full_table_is_told(guard: Guard) -> None:
    """The real table, filled by datagrams to every port that nobody answers."""
    guard.apply(POLICY.format(protect="interfaces: [out]"))
    wait_until(guard.filtering, 15)
    most = int(guard.lab.run("gateway", "sysctl", "-n", "net.netfilter.nf_conntrack_max"))
    if most > MOST_FILLED:
        pytest.skip(f"a table of {most} entries is too large to be filled")
    with guard.lab.inside("client"):
        senders = [
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(1 + most // PORTS)
        ]
    for sender in senders:
        for port in range(1, PORTS):
            with contextlib.suppress(OSError):  # "connection refused", of one before
                sender.sendto(b"", (SERVER4, port))
        sender.close()

    def told() -> bool:
        return any("the connection table" in problem for problem in guard.status()["problems"])

    wait_until(told, 20)
    status = guard.status()
    assert status["state"] == "degraded"
    assert "nf_conntrack_max" in str(status["problems"])
    assert "table_full" in status["counts"]
    guard.lab.run("gateway", "conntrack", "-F")
