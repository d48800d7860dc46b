"""Two uplinks, chosen by marks of connections: probes leave by the connection's own.

As mwan3 does it: what comes in by an uplink marks its connection, and the mark is restored on what
goes back, by `ip rule`; the main table knows another way to the client, which leads nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.forged import Since, forge
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import host
from tests.support.traffic import Link, Service, connect, services

pytestmark = pytest.mark.netns

PORT = 8401
POLICY = """
version: 1
name: uplinks
forged_resets: hold
protect: {interfaces: [out, up2]}
rules:
  - {name: hoarder, measure: connections, over: 200, then: ban, for: 60s}
"""
_MARK = "0x200/0x3f00"
_MANGLE = (
    f"PREROUTING -i up2 -m conntrack --ctstate NEW -j CONNMARK --set-xmark {_MARK}",
    "PREROUTING -i in -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00",
    "OUTPUT -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00",
)
CLIENT = host(4000, 1, v6=False)


class Uplinks(ThreeHosts):
    """The client is reached by its second link alone, which only a marked packet takes."""

    def build(self) -> None:
        super().build()
        self.join(("gateway", "up2"), ("client", "eth1"))
        self.ip("gateway", "addr add 10.72.1.1/24 dev up2", "link set up2 up")
        self.ip("client", "addr add 10.72.1.2/24 dev eth1", "link set eth1 up")
        for place, device in (("gateway", "up2"), ("client", "eth1")):
            both = {f"net/ipv4/conf/{name}/rp_filter": "0" for name in ("all", device)}
            self.set(place, both)
        self.set("client", {"net/ipv4/conf/all/arp_ignore": "1"})
        self.ip("client", f"addr add {CLIENT}/32 dev lo", "route replace default via 10.72.1.1")
        self.ip(
            "gateway",
            f"route add {CLIENT}/32 via 10.72.1.2 table 102",
            f"rule add fwmark {_MARK} lookup 102",
            f"route add {CLIENT}/32 dev out",  # the main uplink: nobody there answers for it
        )
        for rule in _MANGLE:
            self.run("gateway", "iptables", "-w", "-t", "mangle", "-A", *rule.split())


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with Uplinks("rgu") as lab:
        yield lab


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("uplinks"), workers=1) as guard:
        yield guard


def test_a_forged_reset_in_the_name_of_a_client_behind_it_ends_nothing(
    lab: ThreeHosts, guard: Guard
) -> None:
    service = Service(lab, PORT)
    with services(service):
        client = connect(lab, CLIENT, SERVER4, PORT)
        link = Link(client, service.accept())
        link.talk()
        since = Since(guard)
        forge(lab, link)
        wait_until(lambda: since.counts("forged_resets") == 1)
        link.talk()


def test_a_silent_client_behind_the_second_uplink_is_reset(lab: ThreeHosts, guard: Guard) -> None:
    service = Service(lab, PORT)
    with services(service):
        client = connect(lab, CLIENT, SERVER4, PORT)
        server = service.accept()
        with client, server:
            client.settimeout(5)
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            outcome = guard.kill(source_port=client.getsockname()[1])
            assert (outcome["killed"], outcome["confirmed"]) == (1, 1), outcome
            with pytest.raises(ConnectionResetError):
                client.recv(1)
