"""How soon a source is blocked in the kernel after it crossed a rate."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from struct import pack

from rstguard.engine.address import parse_address
from rstguard.kernel.sets import Sets
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_most
from tests.bench.gateway import PORT, SERVER, Site, milliseconds_since, policy_of

GOAL_MS = 5.0
_SOURCES = 100
_BURST = 3
_LIMIT = f"over: 1/h, burst: {_BURST}, then: ban, for: 1m"
_PATIENCE_MS = 5_000


def blocks() -> Iterator[Figure]:
    """From what crosses a rate to its source's element in the kernel's set."""
    with Site() as site, site.listen("server", PORT), site.inside("client"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            shuns = _of_guard(site, "shun", 2, "syn_rate", lambda s: _send(raw, _syn(s)))
            bans = _of_guard(site, "ban", 120, "connection_rate", partial(_connect, site))
    note = f"{_SOURCES} sources, one by one; from "
    yield at_most(
        GOAL_MS, "block: crossing handshake to ban", bans, "ms", f"{note}connect(): connection_rate"
    )
    yield at_most(
        GOAL_MS, "block: crossing SYN to shun", shuns, "ms", f"{note}the SYN's sending: syn_rate"
    )


def _of_guard(
    site: Site, kind: str, first: int, measure: str, act: Callable[[str], None]
) -> list[float]:
    """Use up each source's burst, then time its next act."""
    sources = [f"198.51.100.{number}" for number in range(first, first + _SOURCES)]
    guard = site.guard(policy_of(f"name: rate, measure: {measure}, {_LIMIT}"))
    with site.inside("gateway"), Sets() as sets:
        for source in sources:
            for _ in range(_BURST):
                act(source)
        wait_until(lambda: site.queue().waiting == 0)
        times = [_blocked_after(partial(act, source), sets, source) for source in sources]
    kinds = [row["kind"] for row in guard.ask("ban-list") if row["source"] in sources]
    guard.stop()
    if kinds != [kind] * _SOURCES:
        raise RuntimeError(f"not every source was blocked as it should: {sorted(kinds)}")
    return times


def _send(raw: socket.socket, packet: bytes) -> None:
    raw.sendto(packet, (SERVER, 0))


def _connect(site: Site, source: str) -> None:
    with site.client_socket(source) as client:
        client.connect((SERVER, PORT))


def _blocked_after(act: Callable[[], None], sets: Sets, source: str) -> float:
    address = parse_address(source)
    if sets.contains(address):
        raise RuntimeError(f"{source} was blocked before it crossed the rate")
    began = time.monotonic_ns()
    act()
    while not sets.contains(address):
        if milliseconds_since(began) > _PATIENCE_MS:
            raise RuntimeError(f"{source} crossed the rate and was not blocked")
    return milliseconds_since(began)


def _syn(source: str) -> bytes:
    """Return a SYN with right checksums (the kernel itself fills in the one of the IP header)."""
    addresses = socket.inet_aton(source) + socket.inet_aton(SERVER)
    segment = pack(
        ">HHIIBBHHH", 4000, PORT, time.monotonic_ns() & 0xFFFFFFFF, 0, 0x50, 2, 64240, 0, 0
    )
    total = sum(int.from_bytes(part, "big") for part in _words(addresses + segment)) + 6 + 20
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~(total + (total >> 16)) & 0xFFFF
    header = pack(">BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0) + addresses
    return header + segment[:16] + checksum.to_bytes(2, "big") + segment[18:]


def _words(data: bytes) -> list[bytes]:
    return [data[at : at + 2] for at in range(0, len(data), 2)]
