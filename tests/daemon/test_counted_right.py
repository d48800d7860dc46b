"""What is counted is what there was: ports used again, handshakes given up, MPTCP connections."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.all import IP, TCP, IPv6

from rstguard.lab.waiting import wait_until
from tests.support.forged import send_into
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, server_address, source
from tests.support.traffic import FREE_BIND, Open, answer, segments

pytestmark = pytest.mark.netns

REUSED, OPENED, CLOSED, MPTCP = 8301, 8302, 8303, 8304
POLICY = f"""
version: 1
name: counted
sweep_every: 500ms
protect: {{interfaces: [out]}}
rules:
  - {{name: handshakes, measure: connection_rate, ports: [{REUSED}], over: 20/s, burst: 60, then: ban, for: 60s}}
  - {{name: opened, measure: half_open, ports: [{OPENED}, {CLOSED}], over: 5, then: drop}}
"""  # noqa: E501
_IPPROTO_MPTCP = 262


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("counted"), workers=1) as guard:
        yield guard


def packets(guard: Guard) -> int:
    """Return how many packets were judged."""
    return int(guard.status()["workers"][0]["packets"])


@BOTH_FAMILIES
def test_ports_used_again_are_new_connections(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """Closed by a RST, and used at once: who does so with five ports is banned as with hundreds."""
    service, client = serve(REUSED, v6), source(v6)
    completed, began = 0, time.monotonic()
    try:
        while completed < 500:
            with lab.inside("client"):
                one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
            with one:
                one.setsockopt(*FREE_BIND[v6], 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                one.settimeout(2)
                one.bind((client, 20_000 + completed % 5))
                one.connect((service.address, REUSED))
                one.sendall(b"x")
                service.accept().close()
            completed += 1
    except OSError as error:
        ended = f"{completed} in {time.monotonic() - began:.1f} s, then {error}"
        assert completed >= 55, ended
    wait_until(lambda: guard.block_of(client) is not None)
    # By RSTs of the server, as here, the entry stays, and with it proof of another connection's.
    assert guard.block_of(client)["rule"] == "handshakes"
    assert 55 <= completed <= 200


@BOTH_FAMILIES
def test_a_handshake_that_a_reset_ends_is_not_half_open(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """The client's host knows nothing of these SYNs, and answers each SYN-ACK with a RST."""
    service, client = serve(OPENED, v6), source(v6)
    for first in range(20_000, 20_040, 4):
        expected = packets(guard) + 8
        segments(lab, client, service.address, OPENED, "S", 4, first_port=first)
        wait_until(lambda wanted=expected: packets(guard) >= wanted)  # type: ignore[misc]
    service.connect(client).talk()
    assert not guard.events("drop", "opened")


@BOTH_FAMILIES
def test_what_the_server_refuses_is_not_half_open(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    client = source(v6)
    for _ in range(20):
        assert answer(lab, client, server_address(v6), CLOSED, 5) == "ECONNREFUSED"
    serve(CLOSED, v6).connect(client).talk()


@BOTH_FAMILIES
def test_what_nobody_gives_up_is_half_open(
    lab: ThreeHosts, guard: Guard, serve: Open, mute: None, v6: bool
) -> None:
    """The control: the same SYNs, and nobody there who answers."""
    service, client = serve(OPENED, v6), source(v6)
    segments(lab, client, service.address, OPENED, "S", 6)
    wait_until(lambda: answer(lab, client, service.address, OPENED) == "silence")


REFUSED: dict[str, dict[str, Any]] = {
    "signature": {"flags": "R", "options": [(19, bytes(16))]},
    "old time stamp": {"flags": "R", "options": [("Timestamp", (1, 0))]},
}
"""RSTs that the tracker takes, and a server with a half-open connection does not."""


@BOTH_FAMILIES
@pytest.mark.parametrize("trick", REFUSED)
def test_a_reset_that_the_server_does_not_take_gives_nothing_up(
    lab: ThreeHosts, guard: Guard, serve: Open, mute: None, v6: bool, trick: str
) -> None:
    service, client = serve(OPENED, v6), source(v6)
    whole = (IPv6 if v6 else IP)(src=client, dst=service.address)
    for port in range(20_000, 20_006):
        ends = {"sport": port, "dport": OPENED}
        syn = TCP(**ends, flags="S", seq=1000, options=[("Timestamp", (5000, 0))])
        expected = packets(guard) + 1
        send_into(lab, "client", bytes(whole / syn))
        wait_until(lambda wanted=expected: packets(guard) >= wanted)  # type: ignore[misc]
        send_into(lab, "client", bytes(whole / TCP(**ends, seq=1001, **REFUSED[trick])))
    assert half_open(lab, client) == 5  # the sixth is one too many
    assert answer(lab, client, service.address, OPENED) == "silence"


def half_open(lab: ThreeHosts, client: str) -> int:
    """Return how many half-open connections of a client the server has."""
    return len(
        lab.run(
            "server",
            "ss",
            "-Htn",
            "state",
            "syn-recv",
            "dst",
            f"[{client}]" if ":" in client else client,
        ).splitlines()
    )


def mptcp_pair(lab: ThreeHosts, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection whose ends are both willing to speak MPTCP."""
    with lab.inside("client"):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
    client.settimeout(5)
    client.connect((server_address(v6=False), MPTCP))
    server = listener.accept()[0]
    server.settimeout(5)
    for one, other in ((client, server), (server, client)):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
    return client, server


def mptcp_sockets(lab: ThreeHosts) -> int:
    """Return how many MPTCP connections the server holds."""
    return len(lab.run("server", "ss", "-HMn", "state", "established").splitlines())


def test_a_kill_of_mptcp_is_not_called_confirmed_and_one_of_plain_tcp_is(
    lab: ThreeHosts, guard: Guard
) -> None:
    with lab.inside("server"):
        try:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        except OSError:
            pytest.skip("this kernel has no MPTCP")
    with listener:
        listener.bind(("0.0.0.0", MPTCP))
        listener.listen()
        client, server = mptcp_pair(lab, listener)
        with client, server:
            assert mptcp_sockets(lab) == 1
            outcome = guard.kill(port=MPTCP)
            assert (outcome["killed"], outcome["confirmed"]) == (1, 0)
            assert "this subflow of it is ended, its sockets may stay" in str(outcome)
        guard.apply(f"{POLICY}mptcp: strip\n")
        wait_until(lambda: mptcp_sockets(lab) == 0)
        client, server = mptcp_pair(lab, listener)
        with client, server:
            assert mptcp_sockets(lab) == 0
            outcome = guard.kill(port=MPTCP)
            assert (outcome["killed"], outcome["confirmed"]) == (1, 1)
            for one in (client, server):
                with pytest.raises(ConnectionResetError):
                    one.recv(1)
        guard.apply(POLICY)
