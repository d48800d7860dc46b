"""The network that a module's tests share, and the services they open in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.forged import HOLDING
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import give_sources
from tests.support.traffic import Open, Service


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    """Client, gateway and server; the client has as many addresses as one likes."""
    with ThreeHosts("rgf") as lab:
        give_sources(lab)
        yield lab


@pytest.fixture(params=["as usual", "strict", "liberal", "strict about SYNs alone"])
def tracker(lab: ThreeHosts, request: pytest.FixtureRequest) -> Iterator[str]:
    """Have the connection tracker set in each way that an administrator may choose."""
    strict = {"tcp_loose": "0"} if "strict" in request.param else {}
    liberal = {"tcp_be_liberal": "1"} if request.param not in ("as usual", "strict") else {}
    usual = {"tcp_loose": "1", "tcp_be_liberal": "0"}
    set_tracker(lab, usual | strict | liberal)
    yield request.param
    set_tracker(lab, usual)


def set_tracker(lab: ThreeHosts, values: dict[str, str]) -> None:
    """Set sysctls of the gateway's connection tracker."""
    lab.set("gateway", {f"net/netfilter/nf_conntrack_{n}": v for n, v in values.items()})


@pytest.fixture(scope="module")
def holding(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    """A guard for all tests of a module, which holds RSTs."""
    with Guard(lab, HOLDING, tmp_path_factory.mktemp("holding")) as guard:
        yield guard


@pytest.fixture(params=["1", "0"], ids=["loose", "strict"])
def loose(lab: ThreeHosts, request: pytest.FixtureRequest) -> Iterator[None]:
    """Have the tracker take up what it has not seen begin, or not."""
    set_tracker(lab, {"tcp_loose": request.param})
    yield
    set_tracker(lab, {"tcp_loose": "1"})


@pytest.fixture
def mute(lab: ThreeHosts) -> Iterator[None]:
    """Have the client's host send no RST for what no socket of its own has begun.

    So forged SYNs leave half-open connections, as those in the name of addresses that nobody has.
    """
    rule = ("OUTPUT", "-p", "tcp", "--tcp-flags", "RST,ACK", "RST", "-j", "DROP")
    for how in ("-I", "-D"):
        for tool in ("iptables", "ip6tables"):
            lab.run("client", tool, "-w", how, *rule)
        if how == "-I":
            yield


@pytest.fixture
def strict(lab: ThreeHosts) -> Iterator[None]:
    """Have both ends behind firewalls of their own that drop what fits no connection."""
    rule = ("INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    tools = [(place, tool) for place in ("client", "server") for tool in ("iptables", "ip6tables")]
    for place, tool in tools:
        lab.run(place, tool, "-w", "-I", *rule)
    yield
    for place, tool in tools:
        lab.run(place, tool, "-w", "-D", *rule)


@pytest.fixture
def serve(lab: ThreeHosts) -> Iterator[Open]:
    """Open TCP ports, closed after the test together with all their connections."""
    opened: list[Service] = []

    def open_service(port: int, v6: bool = False, place: str = "server") -> Service:
        opened.append(Service(lab, port, place, v6))
        return opened[-1]

    yield open_service
    for service in opened:
        service.close()
