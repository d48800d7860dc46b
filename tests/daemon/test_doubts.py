"""RSTs that the gateway believes and the server does not: nobody gets away by them."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from rstguard.engine.wire import ACK, FIN, RST, SYN
from rstguard.lab.forging import POISON
from rstguard.lab.waiting import wait_until
from tests.support.forged import MD5, forge, state_of
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import FREE_BIND, Link, Open, is_dead

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: doubts
least_ttl: 0
protect: {interfaces: [out]}
sweep_every: 500ms
rules:
  - {name: hoarder, measure: connections, over: 100, then: reset}
"""
SYN_SENT, CLOSED, ESTABLISHED, FIN_WAIT = 1, 8, 3, 4


@BOTH_FAMILIES
@pytest.mark.parametrize(
    "trick", [{"hops": 1}, {"options": (MD5,)}], ids=["low TTL", "unknown signature"]
)
def test_a_connection_that_only_the_gateway_believes_to_be_over_ends_at_the_server(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool, trick: dict[str, Any]
) -> None:
    web = serve(8501, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        hoard = [web.connect(source(v6)) for _ in range(20)]
        for link in hoard:
            link.talk()
            forge(lab, link, **trick)
        assert state_of(lab, hoard[-1]) == CLOSED
        assert not is_dead(hoard[-1].server)
        wait_until(lambda: all(is_dead(link.server) for link in hoard))
        wait_until(lambda: guard.status()["counts"].get("outlived", 0) >= len(hoard))


@BOTH_FAMILIES
@pytest.mark.parametrize("flags", [(RST,), (FIN | ACK, FIN | ACK, ACK)], ids=["RST", "FINs"])
def test_a_syn_behind_it_does_not_wipe_out_the_traces(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool, flags: tuple[int, ...]
) -> None:
    """The tracker forgets what it takes for over as soon as a SYN of the same ends comes."""
    web = serve(8505, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        hoard = [web.connect(source(v6)) for _ in range(10)]
        for link in hoard:
            link.talk()
            for flag in (*flags, SYN):
                forge(lab, link, flag, ahead=int(flag == ACK), options=(MD5,))
        assert state_of(lab, hoard[-1]) == SYN_SENT
        assert not is_dead(hoard[-1].server)
        wait_until(lambda: all(is_dead(link.server) for link in hoard))
        wait_until(lambda: guard.status()["counts"].get("outlived", 0) >= len(hoard))


@BOTH_FAMILIES
def test_a_port_may_be_used_again_at_once(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8506, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        who = source(v6)
        first = web.connect(who)
        first.talk()
        port = first.port
        first.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first.client.close()
        with lab.inside("client"):
            again = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        again.settimeout(5)
        again.setsockopt(*FREE_BIND[v6], 1)
        again.bind((who, port))
        began = time.monotonic()
        again.connect((web.address, web.port))
        assert time.monotonic() - began < 0.5
        link = Link(again, web.accept())
        swept = guard.status()["counts"].get("sweeps", 0)
        wait_until(lambda: guard.status()["counts"].get("sweeps", 0) > swept + 5)
        link.talk()
        link.close()
        assert guard.status()["counts"].get("outlived", 0) == 0


@BOTH_FAMILIES
def test_a_fin_that_only_the_gateway_believes_hides_nothing(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8504, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        hoarder = source(v6)
        hoard = [web.connect(hoarder) for _ in range(20)]
        for link in hoard:
            link.talk()
            forge(lab, link, FIN | ACK, options=(MD5,))
        assert state_of(lab, hoard[-1]) == FIN_WAIT
        guard.apply(POLICY.replace("over: 100", "over: 5"))
        wait_until(lambda: sum(not is_dead(link.server) for link in hoard) == 5)


@BOTH_FAMILIES
def test_an_honest_reset_is_no_trick(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    web = serve(8502, v6)
    with Guard(lab, POLICY, tmp_path / "guard") as guard:
        tricky, *honest = [web.connect(source(v6)) for _ in range(20)]
        for link in honest:
            link.talk()
            forge(lab, link)
            wait_until(lambda link=link: is_dead(link.server))  # type: ignore[misc]
        tricky.talk()
        forge(lab, tricky, options=(MD5,))
        wait_until(lambda: guard.status()["counts"].get("outlived", 0) > 0)
        assert guard.status()["counts"].get("outlived", 0) == 1


@BOTH_FAMILIES
def test_a_window_that_forged_resets_have_moved_is_cured(
    lab: ThreeHosts, serve: Open, tmp_path: Path, v6: bool
) -> None:
    tool = "ip6tables" if v6 else "iptables"
    strict = ("FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    web = serve(8503, v6)
    lab.run("gateway", tool, "-w", "-I", *strict)
    try:
        with Guard(lab, POLICY, tmp_path / "guard") as guard:
            links = [web.connect(source(v6)) for _ in range(10)]
            for link in links:
                link.talk()
                for ahead in POISON:
                    forge(lab, link, ahead=ahead)
            assert {state_of(lab, link) for link in links} == {ESTABLISHED}
            wait_until(lambda: guard.status()["counts"].get("window_cured", 0) >= len(links))
            for link in links:
                link.talk()
    finally:
        lab.run("gateway", tool, "-w", "-D", *strict)
