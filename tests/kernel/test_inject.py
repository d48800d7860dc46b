"""Raw packets with foreign source addresses reach their receivers, untracked and marked."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Tuple
from rstguard.engine.segment import probe
from rstguard.engine.wire import Packet, parse
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from tests.support.network import INSIDE4, INSIDE6, SERVER4, SERVER6, ThreeHosts

pytestmark = pytest.mark.netns

FOREIGN4, FOREIGN6 = "203.0.113.9", "2001:db8::9"


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgb") as lab:
        mark = str(Marks().probe)
        for tool in ("iptables", "ip6tables"):
            rule = ("-m", "mark", "--mark", mark, "-j", "CT", "--notrack")
            lab.run("gateway", tool, "-w", "-t", "raw", "-A", "OUTPUT", *rule)
            lab.run("gateway", tool, "-w", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW")
        yield lab


@pytest.fixture
def injector(lab: ThreeHosts) -> Iterator[Injector]:
    with lab.inside("gateway"), Injector(Marks()) as injector:
        yield injector


TARGETS = [
    ("server", FOREIGN4, SERVER4),
    ("server", FOREIGN6, SERVER6),
    ("gateway", FOREIGN4, INSIDE4),
    ("gateway", FOREIGN6, INSIDE6),
]


@pytest.mark.parametrize(("place", "source", "target"), TARGETS)
def test_a_packet_arrives_with_its_foreign_source(
    lab: ThreeHosts, injector: Injector, place: str, source: str, target: str
) -> None:
    path = Tuple(parse_address(source), parse_address(target), 4000, 9)
    with lab.inside(place):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    with wire, lab.inside("gateway"), Conntrack() as table:
        wire.settimeout(5)
        assert injector.send([probe(path, 77, 88)]) == 1
        while True:
            seen = parse(wire.recv(2048))
            if isinstance(seen, Packet) and seen[:4] == path:
                break
        assert (seen.sequence, seen.acknowledgement) == (77, 88)
        assert path not in {flow.original for flow in table.dump()}
    assert injector.failed == {}


def test_one_unroutable_packet_does_not_keep_the_others(injector: Injector) -> None:
    good = probe(Tuple(parse_address(FOREIGN4), parse_address(SERVER4), 1, 2), 3, 4)
    nowhere4 = probe(Tuple(parse_address(FOREIGN4), parse_address("198.18.0.1"), 1, 2), 3, 4)
    nowhere6 = probe(Tuple(parse_address(FOREIGN6), parse_address("2001:db8:f::1"), 1, 2), 3, 4)
    assert injector.send([nowhere4, good, nowhere6, good]) == 2
    assert injector.failed == {"ENETUNREACH": 2}
    assert injector.sent == 2
