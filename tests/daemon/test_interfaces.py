"""Interfaces whose traffic no rule can see, and traffic that others take out: told, with advice."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.traffic import Open, Service

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: seen
protect: {{interfaces: [{names}]}}
rules:
  - {{name: many, measure: connections, over: 200, then: reset}}
"""
PORT = 8030


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, POLICY.format(names="out"), tmp_path / "guard", workers=1) as guard:
        yield guard


def problems(guard: Guard) -> str:
    return "; ".join(guard.status()["problems"])


def move(service: Service, count: int = 40_000, times: int = 40) -> None:
    """Have a client send a server some megabytes."""
    link = service.connect()
    link.client.settimeout(5)
    for _ in range(times):
        link.client.sendall(b"x" * count)
        received = 0
        while received < count:
            received += len(link.server.recv(count))
    link.close()


def test_a_bridges_port_is_named_with_its_bridge(lab: ThreeHosts, tmp_path: Path) -> None:
    lab.ip("gateway", "link add br0 type bridge", "link add leg type veth peer name gel",
           "link set leg master br0", "link set leg up")  # fmt: skip
    text = POLICY.format(names="out, leg, gone0")
    with Guard(lab, text, tmp_path / "guard", workers=1) as guard:
        wait_until(lambda: "leg is a port of the bridge br0" in problems(guard))
        assert "name br0" in problems(guard)
        assert "no interface here is called gone0" in problems(guard)
        assert guard.cli("status").returncode == 1
        assert guard.cli("status", "--filtering").returncode == 0
        assert guard.events("unseen", "unseen") == 2
        lab.ip("gateway", "link set leg nomaster", "link set leg down")
        wait_until(lambda: "leg is down" in problems(guard), 12)
        file = tmp_path / "seen.yaml"
        file.write_text(text)
        command = [sys.executable, "-m", "rstguard", "policy", "check", str(file)]
        command = lab.command("gateway", *command)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "leg is down: `ip link set leg up`" in said
    lab.ip("gateway", "link del leg", "link del br0")


def test_what_is_kept_from_the_tracker_is_told_with_the_rule(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    rule = ("PREROUTING", "-p", "tcp", "--dport", str(PORT), "-j", "CT", "--notrack")
    lab.run("gateway", "iptables", "-w", "-t", "raw", "-A", *rule)
    service = serve(PORT)

    def told() -> bool:
        move(service)
        return "kept from the connection tracker" in problems(guard)

    wait_until(told, 40)
    assert "--notrack" in problems(guard)
    lab.run("gateway", "iptables", "-w", "-t", "raw", "-D", *rule)

    def over() -> bool:
        move(service)
        return problems(guard) == ""

    wait_until(over, 20)


def test_traffic_of_an_interface_on_top_is_told(lab: ThreeHosts, guard: Guard) -> None:
    """As a flowtable or an XDP program would, it makes the interface count and no rule."""
    lab.ip("gateway", "link add link out name top type macvlan mode bridge",
           "address add 198.18.0.1/24 dev top", "link set top up")  # fmt: skip
    lab.ip("client", "address add 198.18.0.2/24 dev eth0")
    with lab.inside("client"):
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("198.18.0.2", 0))

    def told() -> bool:
        for _ in range(1000):
            one.sendto(b"x" * 1400, ("198.18.0.1", 9))
        return "does not come to the guard's rules" in problems(guard)

    try:
        wait_until(told, 40)
    finally:
        one.close()
        lab.ip("client", "address del 198.18.0.2/24 dev eth0")
        lab.ip("gateway", "link del top")
