"""Connections as a sweep finds them in the kernel's table."""

from __future__ import annotations

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.ruleset import CONFIRMED, DEFAULT_LABELS, SECOND
from tests.support.packets import CLIENT, SERVER

START = 1_000 * SECOND


def flow(
    port: int = 40000,
    *,
    source: str = CLIENT,
    destination: str = SERVER,
    service: int = 80,
    state: int = TcpState.ESTABLISHED,
    sent: int = 0,
    received: int = 0,
    packets: int | None = None,
    age: float = 0,
    labels: int = 1 << DEFAULT_LABELS + CONFIRMED,
) -> Flow:
    """Return a connection of the client: bytes `sent` and `received` by it, `age` in seconds."""
    original = Tuple(parse_address(source), parse_address(destination), port, service)
    return Flow(
        ident=port,
        original=original,
        reply=Tuple(original[1], original[0], service, port),
        state=state,
        mark=0,
        seen_reply=True,
        client_packets=(sent + received) // 100 + 3 if packets is None else packets,
        client_bytes=sent,
        server_packets=0,
        server_bytes=received,
        age=-1 if age < 0 else int(age * SECOND),
        timeout=300,
        zone=0,
        labels=labels,
    )
