"""Rules for some destinations, rules that except some sources, and carpets over a whole network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import SILENCE, Service, connect, services

pytestmark = pytest.mark.netns

PORT = 8080
POLICY = """\
version: 1
name: partial
protect: {interfaces: [out]}
rules:
  - {name: carpet, measure: syn_rate, per: {destination_ipv4: 24, destination_ipv6: 48},
     over: 5/h, then: drop, ports: [8080], destinations: [203.0.113.0/24, "2001:db8:77::/48"],
     except: [198.51.100.0/24, "2001:db8:1::/48"]}
  - {name: many, measure: connections, over: 2, then: reset, except: %s}
"""


def address_of(number: int, v6: bool) -> str:
    return f"2001:db8:77::{number}" if v6 else f"203.0.113.{number}"


@pytest.fixture
def carpet(lab: ThreeHosts) -> Iterator[None]:
    """Have the server own a network, of which a carpet hits each address a little."""
    networks = (("203.0.113.0/24", SERVER4), ("2001:db8:77::/48", SERVER6))
    for network, server in networks:
        lab.ip("server", f"route add local {network} dev lo")
        lab.ip("gateway", f"route add {network} via {server}")
    yield
    for network, _ in networks:
        lab.ip("gateway", f"route del {network}")
        lab.ip("server", f"route del local {network} dev lo")


@BOTH_FAMILIES
def test_a_carpet_over_a_network_is_one_attack_and_others_are_served(
    lab: ThreeHosts, tmp_path: Path, v6: bool, carpet: None
) -> None:
    with (
        Guard(lab, POLICY % "[192.0.2.1]", tmp_path / "guard"),
        services(service := Service(lab, PORT, v6=v6)),
    ):
        # From different sources: none of them does much, nor does any address get much.
        for number in range(1, 6):
            connect(lab, source(v6), address_of(number, v6), PORT).close()
        for number in range(6, 9):
            with pytest.raises(TimeoutError):
                connect(lab, source(v6), address_of(number, v6), PORT, SILENCE)
        connect(lab, source(v6), service.address, PORT).close()


@BOTH_FAMILIES
def test_whom_a_rule_excepts_it_does_not_concern(lab: ThreeHosts, tmp_path: Path, v6: bool) -> None:
    excepted, other = source(v6), source(v6)
    with (
        Guard(lab, POLICY % f'["{excepted}"]', tmp_path / "guard") as guard,
        services(service := Service(lab, PORT, v6=v6)),
    ):
        links = [service.connect(excepted) for _ in range(6)]
        links += [service.connect(other) for _ in range(2)]
        for _ in range(4):
            service.refuse(other)
        for link in links:
            link.talk()
        wait_until(lambda: guard.events("reset", "many") == 4)
