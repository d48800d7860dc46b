"""A service whose answers take another way: its clients are left alone, and it is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Open, Service, segments

pytestmark = pytest.mark.netns

TWO_SIDED, FIRST = 8010, 8020
POLICY = """\
version: 1
name: oneway
on_failure: closed
protect: {interfaces: [out]}
shun: drop
syn_budget: off
rules:
  - {name: strays, measure: out_of_state, over: 1/m, burst: 20, then: drop}
  - {name: half-open, measure: half_open, over: 10, within: 30s, then: ban, for: 10m}
"""
DIRECT = "10.240.0.0/16", "fd73:0:f000::/36"
"""Clients to whom the server has a link of its own."""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    lab.join(("server", "back"), ("client", "back"))
    for place, number in (("server", 1), ("client", 2)):
        lab.set(place, {f"net/ipv4/conf/{which}/rp_filter": "0" for which in ("all", "back")})
        lab.ip(
            place,
            f"address add 192.0.2.{number}/24 dev back",
            f"address add 2001:db8::{number}/64 dev back",
            "link set back up",
        )
    for network, via in zip(DIRECT, ("192.0.2.2", "2001:db8::2"), strict=True):
        lab.ip("server", f"route add {network} via {via}")
    with Guard(lab, POLICY, tmp_path_factory.mktemp("oneway"), workers=1) as guard:
        yield guard


def direct(number: int, v6: bool) -> str:
    """Return a client whose answers bypass the gateway."""
    return f"fd73:0:f{number:03x}::1" if v6 else f"10.240.{number}.1"


def told(guard: Guard, service: Service) -> bool:
    name = f"[{service.address}]" if service.v6 else service.address
    return f"{name}:{service.port}" in guard.status()["one_sided"]


def goes_on_straying(lab: ThreeHosts, guard: Guard, who: str, target: str, port: int) -> None:
    """Send segments of no connection until they count, which the first two seconds' do not."""
    before = guard.status()["limited"]["out_of_state"]

    def counted() -> bool:
        segments(lab, who, target, port, "A", 100)
        return bool(guard.status()["limited"]["out_of_state"] > before + 30)

    wait_until(counted, 20)


@BOTH_FAMILIES
def test_clients_of_a_one_sided_service_are_served_and_it_is_told(
    guard: Guard, serve: Open, v6: bool
) -> None:
    service, client = serve(FIRST + v6, v6), direct(1, v6)
    for _ in range(40):
        link = service.connect(client)
        link.talk()
        link.close()
    assert guard.block_of(client) is None

    def goes_on() -> bool:
        service.connect(client).talk()
        return told(guard, service)

    wait_until(goes_on, 30)
    shown = guard.cli("status")
    assert shown.returncode == 1
    assert shown.stdout.startswith("DEGRADED")
    assert "only one side is seen of" in shown.stdout
    service.connect(source(v6)).talk()  # its answer passes here
    wait_until(lambda: not told(guard, service))


@BOTH_FAMILIES
def test_who_sends_acks_does_not_switch_it_off_where_the_service_answers(
    lab: ThreeHosts, guard: Guard, serve: Open, mute: None, v6: bool
) -> None:
    service, attacker = serve(TWO_SIDED, v6), source(v6)
    segments(lab, attacker, service.address, TWO_SIDED, "S", 5)
    segments(lab, attacker, service.address, TWO_SIDED, "A", 200, first_port=50000)
    segments(lab, attacker, service.address, TWO_SIDED, "S", 15, first_port=30000)
    wait_until(lambda: guard.block_of(attacker) is not None)
    goes_on_straying(lab, guard, source(v6), service.address, TWO_SIDED)
    assert not told(guard, service)


def test_segments_to_a_port_that_refuses_are_strays(lab: ThreeHosts, guard: Guard) -> None:
    attacker, port = source(False), 8999
    with lab.inside("client"), socket.socket() as one, pytest.raises(ConnectionRefusedError):
        one.connect(("10.71.2.2", port))
    goes_on_straying(lab, guard, attacker, "10.71.2.2", port)
