"""Routes chosen by marks: no bit of the guard is on a packet while it is routed.

An administrator's rules mark what comes in with 1, and `ip rule` chooses by it, without a mask.  In
each of these networks every packet of a marked connection must go one way, whatever the guard does.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from rstguard.ipc.requests import ControlError
from rstguard.kernel import clearing
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import LENGTH
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, give_sources, server_address, source
from tests.support.traffic import Service, connect, segments, services

pytestmark = pytest.mark.netns

PLAIN, REFUSED, COOKIES = 8101, 8102, 8103
POLICY = f"""
version: 1
name: routed
syn_budget: off
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: rate, measure: connection_rate, ports: [{PLAIN}], over: 1000/s, then: ban, for: 60s}}
  - {{name: opens, measure: half_open, over: 4096, then: drop}}
  - {{name: refuse, measure: connection_rate, ports: [{REFUSED}], over: 1/m, burst: 1, then: reset}}
  - {{name: short, measure: short_connections, shorter_than: 1h, over: 1000/s, then: drop}}
  - {{name: stray, measure: out_of_state, over: 100000/s, then: drop}}
"""
BUDGET = f"syn_budget: {{rate: 20/s, ports: [{COOKIES}]}}\n"
_MARKED = "-A PREROUTING -i out -p tcp -j MARK --set-xmark 0x1/0xffffffff\n"
_COOKIES = f"-A OUTPUT -o in -p tcp -m tcp --dport {COOKIES} -j MARK --set-xmark 0x1/0xff\n"
_RESTORED = """\
-A PREROUTING -j CONNMARK --restore-mark
-A PREROUTING -i out -p tcp -m conntrack --ctstate NEW,INVALID -j MARK --set-xmark 0x1/0xffffffff
-A PREROUTING -j CONNMARK --save-mark
-A OUTPUT -j CONNMARK --restore-mark
"""


@dataclass(frozen=True, slots=True)
class Network:
    """How packets are marked, the rule by which they are routed, and out of which device."""

    rules: str
    choice: str
    device: str
    marks: int = 0xFF000000
    """The bits that are the guard's."""

    @property
    def policy(self) -> str:
        """The guard's policy."""
        return f"{POLICY}marks: {self.marks:#x}\n"


NETWORKS = {
    "marked packets have a table": Network(_MARKED + _COOKIES, "fwmark 0x1", "alt"),
    "so do connections": Network(_RESTORED, "fwmark 0x1", "alt", marks=0xFF00),
    "all others go into a tunnel": Network(_MARKED, "not fwmark 0x1", "in"),
    "marked packets go to a proxy": Network(_MARKED, "fwmark 0x1", ""),
}


class Routed(ThreeHosts):
    """The network, a second link to the server, and a count of what went out of a wrong device."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def build(self) -> None:
        super().build()
        give_sources(self)
        self._second_link()
        for version, target in (("-4", f"{SERVER4}/32"), ("-6", f"{SERVER6}/128")):
            self._ip(version, "rule", "add", *self.network.choice.split(), "lookup", "100")
            far = "10.71.3.2" if version == "-4" else "fd71:3::2"
            way: tuple[str, ...] = ("local", "default", "dev", "lo")
            if self.network.device:
                way = (target, "via", far, "dev", "alt")
            self._ip(version, "route", "add", *way, "table", "100")
        elsewhere = f"! -o {self.network.device}" if self.network.device else ""
        wrong = f"-A FORWARD -i out -p tcp {elsewhere}\n"
        wrong += f"-A POSTROUTING -p tcp -m tcp --dport {COOKIES} {elsewhere}\n"
        for tool in ("iptables", "ip6tables"):
            text = f"*mangle\n{self.network.rules}{wrong}COMMIT\n"
            self.run("gateway", f"{tool}-restore", "--noflush", stdin=text)

    def _ip(self, *words: str) -> None:
        self.run("gateway", "ip", *words)

    def _second_link(self) -> None:
        self.join(("gateway", "alt"), ("server", "eth1"))
        for place, device, last in (("gateway", "alt", 1), ("server", "eth1", 2)):
            self.ip(
                place,
                f"addr add 10.71.3.{last}/24 dev {device}",
                f"addr add fd71:3::{last}/64 dev {device} nodad",
                f"link set {device} up",
            )
            both = ("all", device)
            self.set(place, {f"net/ipv4/conf/{name}/rp_filter": "0" for name in both})

    def astray(self, v6: bool, chain: str = "FORWARD") -> int:
        """Return how many packets were about to leave by a wrong device."""
        tool = "ip6tables" if v6 else "iptables"
        saved = self.run("gateway", f"{tool}-save", "-c", "-t", "mangle").splitlines()
        (line,) = (line for line in saved if f"] -A {chain} " in line and "rstguard" not in line)
        return int(line[1:].partition(":")[0])

    def service(self, port: int, v6: bool) -> Service:
        """Return the service where marked connections arrive."""
        if self.network.device:
            return Service(self, port, "server", v6)
        service = Service(self, port, "gateway", v6)
        level, option = (socket.IPPROTO_IPV6, 75) if v6 else (socket.IPPROTO_IP, 19)
        service._listener.setsockopt(level, option, 1)  # IPV6_TRANSPARENT, IP_TRANSPARENT
        return service


@pytest.fixture(scope="module", params=list(NETWORKS.values()), ids=list(NETWORKS))
def lab(request: pytest.FixtureRequest) -> Iterator[Routed]:
    lab = Routed(request.param)
    with lab:
        yield lab


@pytest.fixture(scope="module")
def guard(lab: Routed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, lab.network.policy, tmp_path_factory.mktemp("routed"), workers=1) as guard:
        yield guard


@contextmanager
def stopped(guard: Guard, worker: int = signal.SIGCONT) -> Iterator[None]:
    """The supervisor stands still, and puts nothing right; the worker gets a signal."""
    wait_until(lambda: guard.status()["workers"][0]["overload"] == 0)
    pid = int(guard.status()["workers"][0]["pid"])
    os.kill(guard.pid, signal.SIGSTOP)
    try:
        os.kill(pid, worker)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        os.kill(guard.pid, signal.SIGCONT)
        wait_until(guard.at_work)


def life(lab: Routed, v6: bool, port: int = PLAIN) -> None:
    """Two connections of one source from beginning to end: SYNs, ACKs, data, FINs, and strays."""
    address = source(v6)
    service = lab.service(port, v6)
    with services(service):
        for _ in range(2):  # with the second the address is proven
            link = service.connect(address)
            for _ in range(3):
                link.talk()
            link.close()
    segments(lab, address, server_address(v6), port, "A", 5)


def flood(lab: Routed, v6: bool, count: int) -> None:
    """Send SYNs of one source, each from a port of its own."""
    target = server_address(v6)
    header = IPv6(src=source(v6), dst=target) if v6 else IP(src=source(v6), dst=target)
    packet = bytearray(bytes(header / TCP(sport=0, dport=PLAIN, flags="S", seq=0xFFFF)))
    at = 40 if v6 else 20
    with lab.inside("client"):
        family = socket.AF_INET6 if v6 else socket.AF_INET
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for port in range(10_000, 10_000 + count):  # port and number always have the same sum
            struct.pack_into(">HHI", packet, at, port, PLAIN, 0xFFFF - port)
            raw.sendto(packet, (target, 0))


@BOTH_FAMILIES
def test_a_worker_reads(lab: Routed, guard: Guard, v6: bool) -> None:
    before = guard.status()["counts"].get("packets", 0)
    life(lab, v6)
    assert lab.astray(v6) == 0
    wait_until(lambda: guard.status()["counts"].get("packets", 0) >= before + 4)


@BOTH_FAMILIES
def test_nobody_reads(lab: Routed, guard: Guard, v6: bool) -> None:
    with stopped(guard, signal.SIGKILL):
        life(lab, v6)
    assert lab.astray(v6) == 0


@BOTH_FAMILIES
def test_the_worker_is_overrun(lab: Routed, guard: Guard, v6: bool) -> None:
    with stopped(guard, signal.SIGSTOP):
        flood(lab, v6, LENGTH + 50)
        life(lab, v6)
    assert lab.astray(v6) == 0


@BOTH_FAMILIES
def test_what_is_condemned(lab: Routed, guard: Guard, v6: bool) -> None:
    address = source(v6)
    service = lab.service(REFUSED, v6)
    with services(service):
        link = service.connect(address)
        link.talk()
        with pytest.raises(ConnectionResetError):
            connect(lab, address, service.address, REFUSED).recv(1)
        link.talk()
        if lab.network.device:  # a proxy's end is reached by nothing that is not marked
            assert guard.kill(source_port=link.port)["confirmed"] == 1
            link.wait_reset()
    assert lab.astray(v6) == 0
    assert guard.events("reset", "refuse") >= 1


@BOTH_FAMILIES
def test_cookies(lab: Routed, guard: Guard, v6: bool) -> None:
    """The SYN that the kernel opens for a client is routed by the administrator's marks alone."""
    if "OUTPUT" not in lab.network.rules or "restore" in lab.network.rules:
        pytest.skip("what leaves this host is not marked here")
    guard.apply(lab.network.policy.replace("syn_budget: off\n", BUDGET))
    service = lab.service(COOKIES, v6)
    with services(service):
        service.connect(source(v6)).talk()
        shown = f"[{service.address}]" if v6 else service.address
        wait_until(lambda: f"{shown}:{COOKIES}" in str(guard.status()["syn_budget"]["services"]))
        before = guard.status()["syn_budget"]["cookies"]["accepted"]
        segments(lab, source(v6), service.address, COOKIES, "S", 200)
        link = service.connect(source(v6))
        link.talk()
        link.close()
        wait_until(lambda: guard.status()["syn_budget"]["cookies"]["accepted"] > before)
    assert lab.astray(v6) == 0
    assert lab.astray(v6, "POSTROUTING") == 0
    guard.apply(lab.network.policy)


@BOTH_FAMILIES
def test_without_the_table_packets_are_routed_with_bits(
    lab: Routed, guard: Guard, v6: bool
) -> None:
    """The control: it is the table that does it all, and a policy that is applied puts it back."""
    if not lab.network.device:
        pytest.skip("the kernel forwards nothing that belongs to a socket of its own")
    with stopped(guard):
        with lab.inside("gateway"):
            assert clearing.remove(Linux())
        life(lab, v6)
        assert lab.astray(v6) > 0
    guard.apply(lab.network.policy)
    lab.run("gateway", "ip6tables" if v6 else "iptables", "-w", "-t", "mangle", "-Z", "FORWARD")
    life(lab, v6)
    assert lab.astray(v6) == 0


def test_the_bits_cannot_change_while_connections_bear_them(lab: Routed, guard: Guard) -> None:
    with pytest.raises(ControlError, match="restart the guard with the new policy"):
        guard.apply(f"{POLICY}marks: 0xff0\n")
    assert guard.at_work()


def test_nothing_is_left(lab: Routed, guard: Guard) -> None:
    assert guard.stop() == 0
    with lab.inside("gateway"):
        assert len(clearing.missing(Linux(), clearing.Place(Marks(lab.network.marks)))) == 2
        assert not clearing.remove(Linux())
