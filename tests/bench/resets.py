"""How soon a client hears of the reset that its own packet brought about."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from tests.bench.figures import Figure, at_most, seen
from tests.bench.gateway import PORT, SERVER, Site, milliseconds_since, policy_of

GOAL_MS = 2.0
_TIMES = 300
_CROSSED = "over: 1/h, burst: 1, then: reset"


def resets() -> Iterator[Figure]:
    """From the packet that crosses a reset rule to ECONNRESET, and from a SYN to ECONNREFUSED."""
    with Site() as site, site.listen("server", PORT):
        path = [_refused(site, PORT + 1) for _ in range(_TIMES)]
        guard = site.guard(policy_of(f"name: met, measure: connection_rate, {_CROSSED}"))
        _let_pass(site)
        reset = [_reset(site) for _ in range(_TIMES)]
        guard.stop()
        guard = site.guard(policy_of(f"name: new, measure: syn_rate, {_CROSSED}"))
        _let_pass(site)
        refused = [_refused(site, PORT) for _ in range(_TIMES)]
        guard.stop()
    yield at_most(
        GOAL_MS,
        "reset: crossing packet to ECONNRESET",
        reset,
        "ms",
        "the first data segment of an established connection crosses a connection_rate rule",
    )
    yield at_most(GOAL_MS, "reset: connect() over a syn_rate to ECONNREFUSED", refused, "ms")
    yield seen("reset: connect() to a closed port, no guard", path, "ms", "what the path costs")


def _let_pass(site: Site) -> None:
    """Use up the one connection that the rules allow."""
    with site.client_socket() as first:
        first.connect((SERVER, PORT))
        first.send(b"x")


def _reset(site: Site) -> float:
    """Time an established connection from the client's crossing segment to its death."""
    with site.client_socket() as client:
        client.settimeout(None)
        # The ACK of the handshake waits for the data to go with (tcp(7), TCP_DEFER_ACCEPT on a
        # client), so that the segment that crosses the rule is the one whose sending is timed.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        client.connect((SERVER, PORT))
        began = time.monotonic_ns()
        client.send(b"x")
        try:
            client.recv(1)
        except ConnectionResetError:
            return milliseconds_since(began)
    raise RuntimeError("the connection was not reset, as the rule asks")


def _refused(site: Site, port: int) -> float:
    with site.client_socket() as client:
        client.settimeout(None)
        began = time.monotonic_ns()
        with contextlib.suppress(ConnectionRefusedError):
            client.connect((SERVER, port))
            raise RuntimeError("the connection was not refused, as the rule asks")
        return milliseconds_since(began)
