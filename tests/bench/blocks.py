"""How soon a source is blocked in the kernel after it crossed a rate."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from struct import pack

from rstguard.engine.address import parse_address
from rstguard.kernel.sets import Sets
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_most
from tests.bench.gateway import PORT, SERVER, Site, milliseconds_since, policy_of

GOAL_MS = 5.0
_SOURCES = 100
_BURST = 3
_RULE = f"name: rate, measure: syn_rate, over: 1/h, burst: {_BURST}, then: ban, for: 1m"
_PATIENCE_MS = 5_000


def blocks() -> Iterator[Figure]:
    """From the SYN that crosses a rate to its source's element in the kernel's set."""
    with Site() as site, site.listen("server", PORT), site.inside("client"):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            guard = site.guard(policy_of(_RULE))
            with site.inside("gateway"), Sets() as sets:
                unproven = [f"198.51.100.{number}" for number in range(2, 2 + _SOURCES)]
                proven = [f"198.51.100.{number}" for number in range(120, 120 + _SOURCES)]
                shuns = _times(site, raw, sets, unproven, prove=False)
                bans = _times(site, raw, sets, proven, prove=True)
            kinds = [row["kind"] for row in guard.ask("ban-list")]
            guard.stop()
    if (kinds.count("shun"), kinds.count("ban")) != (_SOURCES, _SOURCES):
        raise RuntimeError(f"not every source was blocked as it should: {sorted(kinds)}")
    note = f"from the sending of the SYN that crosses syn_rate; {_SOURCES} sources, one by one"
    yield at_most(GOAL_MS, "block: crossing SYN to ban, proven source", bans, "ms", note)
    yield at_most(GOAL_MS, "block: crossing SYN to shun, unproven source", shuns, "ms", note)


def _times(
    site: Site, raw: socket.socket, sets: Sets, sources: list[str], prove: bool
) -> list[float]:
    """Use up each source's burst, then time its next SYN."""
    for source in sources:
        if prove:
            _prove(site, sets, source)
        for _ in range(_BURST - 1 if prove else _BURST):
            raw.sendto(_syn(source), (SERVER, 0))
    wait_until(lambda: site.queue().waiting == 0)
    return [_blocked_after(raw, sets, source) for source in sources]


def _prove(site: Site, sets: Sets, source: str) -> None:
    with site.client_socket(source) as client:
        client.connect((SERVER, PORT))
    wait_until(lambda: sets.proven(parse_address(source)))


def _blocked_after(raw: socket.socket, sets: Sets, source: str) -> float:
    address, packet = parse_address(source), _syn(source)
    if sets.contains(address):
        raise RuntimeError(f"{source} was blocked before it crossed the rate")
    began = time.monotonic_ns()
    raw.sendto(packet, (SERVER, 0))
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
