"""Two customers with the same addresses, kept apart by zones of the tracker.

Each has a client and a server of its own; what comes from the second's is in zone 2, and routed by
a table of its own, which `ip rule` chooses by the interface or by the connection's mark.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rstguard.engine.wire import RST
from rstguard.kernel import surroundings
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.lab.network import Host
from rstguard.lab.waiting import wait_until
from tests.support.forged import Since, segment_of
from tests.support.guard import Guard
from tests.support.network import CLIENT4, INSIDE4, OUTSIDE4, SERVER4, ThreeHosts
from tests.support.traffic import Link, is_dead

pytestmark = pytest.mark.netns

PORT, IDLE = 8411, 8412
_ZONE = 2
POLICY = f"""
version: 1
name: zones
forged_resets: hold
sweep_every: 500ms
protect: {{interfaces: [out, out2]}}
rules:
  - {{name: idle, measure: idle, ports: [{IDLE}], over: 3s, then: reset}}
"""
_MARK = "0x200/0x3f00"
_RULES = (
    ("raw", f"PREROUTING -i out2 -j CT --zone {_ZONE}"),
    ("raw", f"PREROUTING -i in2 -j CT --zone {_ZONE}"),
    ("mangle", f"PREROUTING -i out2 -m conntrack --ctstate NEW -j CONNMARK --set-xmark {_MARK}"),
    ("mangle", "OUTPUT -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00"),
)


class Customers(ThreeHosts):
    """A second client and server, whose addresses are those of the first."""

    def __init__(self) -> None:
        super().__init__("rgz")
        self._hosts = {**self._hosts, "client2": Host(), "server2": Host()}
        self.names |= {place: f"{self._stem}-{place}" for place in ("client2", "server2")}

    def build(self) -> None:
        super().build()
        ends = (
            ("client2", "out2", CLIENT4, OUTSIDE4, "10.71.1.0/24"),
            ("server2", "in2", SERVER4, INSIDE4, "10.71.2.0/24"),
        )
        off = {f"net/ipv4/conf/{name}/rp_filter": "0" for name in ("all", "out", "in")}
        self.set("gateway", off)
        for place, device, address, router, network in ends:
            self.join(("gateway", device), (place, "eth0"))
            self.set("gateway", {f"net/ipv4/conf/{device}/rp_filter": "0"})
            self.ip(
                "gateway",
                f"addr add {router}/24 dev {device} noprefixroute",
                f"link set {device} up",
                f"route add {network} dev {device} table 102",
                f"rule add iif {device} lookup 102",
            )
            self.ip(place, f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up",
                    f"route add default via {router}")  # fmt: skip
        self.ip("gateway", f"rule add fwmark {_MARK} lookup 102")
        for table, rule in _RULES:
            self.run("gateway", "iptables", "-w", "-t", table, "-A", *rule.split())

    def reach(self, number: str, port: int, source_port: int) -> Link:
        """Return a connection between a customer's client and server."""
        with self.listen(f"server{number}", port) as listener:
            with self.inside(f"client{number}"):
                client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.settimeout(5)
            client.bind((CLIENT4, source_port))
            client.connect((SERVER4, port))
            return Link(client, listener.accept()[0])


@pytest.fixture(scope="module")
def lab() -> Iterator[Customers]:
    with Customers() as lab:
        yield lab


@pytest.fixture(scope="module")
def guard(lab: Customers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("zones"), workers=1) as guard:
        yield guard


def both(lab: Customers, port: int, source_port: int) -> tuple[Link, Link]:
    """Return a connection of each customer, with the same addresses and ports."""
    links = lab.reach("", port, source_port), lab.reach("2", port, source_port)
    for link in links:
        link.talk()
    with lab.inside("gateway"), Conntrack() as table:
        zones = [f.zone for f in table.dump() if f.original.source_port == source_port]
    assert sorted(zones) == [0, _ZONE]
    return links


def test_a_kill_ends_those_of_both(lab: Customers, guard: Guard) -> None:
    links = both(lab, PORT, 20_001)
    outcome = guard.kill(source_port=20_001)
    assert (outcome["killed"], outcome["confirmed"]) == (2, 2), outcome
    for link in links:
        link.wait_reset()


@pytest.mark.parametrize("idle", [0, 1])
def test_each_is_idle_by_itself(lab: Customers, guard: Guard, idle: int) -> None:
    links = both(lab, IDLE, 20_002 + idle)
    busy = links[1 - idle]

    def is_over() -> bool:
        busy.talk()
        return is_dead(links[idle].client)

    wait_until(is_over, 20)
    links[idle].wait_reset()
    busy.talk()
    busy.close()


@pytest.mark.parametrize("others", [False, True], ids=["alone", "of two alike"])
@pytest.mark.parametrize("number", ["", "2"])
def test_a_forged_reset_ends_nothing(
    lab: Customers, guard: Guard, number: str, others: bool
) -> None:
    port = 20_004 + 2 * others + len(number)
    links = list(both(lab, PORT, port)) if others else [lab.reach(number, PORT, port)]
    since, named = Since(guard), links[-1 if number else 0]
    named.talk()
    with lab.inside(f"client{number}"), Injector(Marks()) as injector:
        assert injector.send([segment_of(named, RST)]) == 1
    wait_until(lambda: since.counts("forged_resets") >= 1)
    for link in links:
        link.talk()
        link.close()


def test_doctor_tells_of_zones(lab: Customers, guard: Guard) -> None:
    with lab.inside("gateway"):
        told = {check.name: check.sentence for check in surroundings.checks()}
    assert "-i out2 -j CT --zone 2" in told["zones"]
    with lab.inside("client"):
        assert "zones" not in {check.name for check in surroundings.checks()}
