"""What the tracker must not believe never gets to it: few hops left, or an inside address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.forged import blind_close, forge, state_of
from tests.support.guard import Guard
from tests.support.network import SERVER4, SERVER6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, Service

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: raw
drop_spoofed_after: 0s
protect: {interfaces: [out]}
rules: []
"""
ESTABLISHED, CLOSED = 3, 8


def counted(guard: Guard, what: str) -> int:
    return int(guard.status()["untracked"][what])


def connected(web: Service) -> Link:
    """Return a connection that has carried data both ways."""
    link = web.connect(source(web.v6))
    link.talk()
    return link


@BOTH_FAMILIES
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_reset_with_few_hops_left_does_not_reach_the_tracker(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool, hops: int
) -> None:
    web = serve(8601, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        link = connected(web)
        forge(lab, link, hops=hops)
        wait_until(lambda: counted(guard, "low_ttl") == 1)
        assert state_of(lab, link) == ESTABLISHED
        link.talk()
        forge(lab, link, hops=4)
        assert state_of(lab, link) == CLOSED
        wait_until(lambda: guard.events("low_ttl", "low_ttl") == 1)


@BOTH_FAMILIES
def test_nobody_outside_closes_in_the_servers_name(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8602, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        links = [connected(web) for _ in range(5)]
        for link in links:
            blind_close(lab, link)
        # What comes while the rules are replaced, as when an offer is learned, is not counted.
        wait_until(lambda: counted(guard, "spoofed") > 0)
        assert {state_of(lab, link) for link in links} == {ESTABLISHED}
        for link in links:
            link.talk()


@BOTH_FAMILIES
@pytest.mark.parametrize(
    "policy",
    [
        POLICY.replace("name: raw", "mode: observe"),
        POLICY.replace("drop_spoofed_after: 0s", "least_ttl: 0\ndrop_spoofed_after: never"),
    ],
    ids=["observe", "switched off"],
)
def test_who_does_not_want_it_has_it_not(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool, policy: str
) -> None:
    web = serve(8603, v6)
    with Guard(lab, policy, tmp_path / "guard"):
        one, other = connected(web), connected(web)
        forge(lab, one, hops=1)
        blind_close(lab, other)
        assert (state_of(lab, one), state_of(lab, other)) == (CLOSED, CLOSED)


@BOTH_FAMILIES
def test_spoofed_segments_are_counted_for_a_while_before_they_are_dropped(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8604, v6)
    with Guard(lab, POLICY.replace("0s", "8s"), tmp_path / "guard") as guard:
        first = connected(web)
        blind_close(lab, first)
        assert state_of(lab, first) == CLOSED
        wait_until(lambda: counted(guard, "spoofed_passed") == 1)
        wait_until(lambda: "from now on" in str(guard.status()["recent"]), 20)
        assert guard.status()["untracked"]["drops_spoofed"]
        second = connected(web)
        blind_close(lab, second)
        assert state_of(lab, second) == ESTABLISHED
        wait_until(lambda: counted(guard, "spoofed") == 1)
        assert counted(guard, "spoofed_passed") == 1
        guard.apply(POLICY.replace("0s", "1h"))
        assert not guard.status()["untracked"]["drops_spoofed"]


@BOTH_FAMILIES
def test_what_ends_here_may_have_any_hops(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    """As BGP between neighbours, whose segments have one."""
    here = serve(8605, v6, place="gateway")
    here.address = "fd71:1::1" if v6 else "10.71.1.1"
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        link = connected(here)
        forge(lab, link, hops=1)
        wait_until(lambda: state_of(lab, link) == CLOSED)
        assert counted(guard, "low_ttl") == 0


@BOTH_FAMILIES
def test_nobody_outside_closes_in_the_name_of_this_host(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    here = serve(8606, v6, place="gateway")
    here.address = "fd71:1::1" if v6 else "10.71.1.1"
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        link = connected(here)
        blind_close(lab, link)
        wait_until(lambda: counted(guard, "spoofed") == 1)
        assert state_of(lab, link) == ESTABLISHED
        link.talk()


@BOTH_FAMILIES
def test_unprotected_ports_and_interfaces_are_left_alone(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web, other = serve(8607, v6), serve(8608, v6)
    ports = POLICY.replace("[out]", "[out], ports: [8607]")
    with Guard(lab, ports, tmp_path / "guard") as guard:
        link = connected(other)
        forge(lab, link, hops=1)
        assert state_of(lab, link) == CLOSED
        connected(web)
        assert counted(guard, "low_ttl") == 0
    elsewhere = POLICY.replace("[out]", "[in]")
    with Guard(lab, elsewhere, tmp_path / "other") as guard:
        one, two = connected(web), connected(web)
        forge(lab, one, hops=1)
        blind_close(lab, two)
        assert (state_of(lab, one), state_of(lab, two)) == (CLOSED, CLOSED)


@BOTH_FAMILIES
def test_a_gateway_with_protected_interfaces_alone_drops_no_servers_segments(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    """One-armed: the servers' own segments come in where the clients' do."""
    web = serve(8609, v6)
    both = POLICY.replace("[out]", "[out, in]")
    with Guard(lab, both, tmp_path / "guard") as guard:
        for _ in range(3):
            connected(web)
        with lab.inside("gateway"):
            held = lab.run("gateway", "ipset", "list", f"rstguard-inside{6 if v6 else 4}")
        assert "Number of entries: 0" in held
        assert counted(guard, "spoofed") == 0


@pytest.fixture
def forwarded(lab: ThreeHosts) -> Iterator[dict[bool, str]]:
    """Have the gateway's own addresses lead to the server, and return them."""
    rules = (
        ("iptables", "10.71.1.1", SERVER4),
        ("ip6tables", "fd71:1::1", f"[{SERVER6}]"),
    )
    change = ("PREROUTING", "-i", "out", "-p", "tcp", "--dport", "8610")
    for tool, own, server in rules:
        target = (*change, "-d", own, "-j", "DNAT", "--to-destination", f"{server}:8610")
        lab.run("gateway", tool, "-w", "-t", "nat", "-A", *target)
    yield {False: "10.71.1.1", True: "fd71:1::1"}
    for tool, _, _ in rules:
        lab.run("gateway", tool, "-w", "-t", "nat", "-F", "PREROUTING")


@BOTH_FAMILIES
def test_a_service_that_is_translated_here_is_no_local_one(
    lab: ThreeHosts, serve: Open, tmp_path: Path, forwarded: dict[bool, str], v6: bool
) -> None:
    web = serve(8610, v6)
    web.address = forwarded[v6]
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        one, two = connected(web), connected(web)
        forge(lab, one, hops=1)
        blind_close(lab, two)
        wait_until(lambda: (counted(guard, "low_ttl"), counted(guard, "spoofed")) == (1, 1))
        assert (state_of(lab, one), state_of(lab, two)) == (ESTABLISHED, ESTABLISHED)


def test_nothing_of_it_is_left_behind(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    with Guard(lab, POLICY, tmp_path / "guard"):
        connected(serve(8611))
        assert "rstguard-inside4" in lab.run("gateway", "ipset", "list", "-n")
        assert "rstguard-spoofed" in lab.run("gateway", "iptables-save", "-t", "raw")
    assert "rstguard" not in lab.run("gateway", "ipset", "list", "-n")
    assert "rstguard" not in lab.run("gateway", "iptables-save")


def test_other_programs_do_not_take_it_away(lab: ThreeHosts, serve: Open, tmp_path: Path) -> None:
    web = serve(8612)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        connected(web)
        lab.run("gateway", "iptables", "-w", "-t", "raw", "-F")
        wait_until(lambda: counted(guard, "low_ttl") == 0 and not guard.status()["missing"], 20)
        link = connected(web)
        forge(lab, link, hops=1)
        wait_until(lambda: counted(guard, "low_ttl") == 1)
        assert state_of(lab, link) == ESTABLISHED
