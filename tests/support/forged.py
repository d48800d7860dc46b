"""Segments that an attacker makes by hand, with the exact numbers of a connection or near them."""

from __future__ import annotations

import socket
from typing import Any

from tests.support.network import ThreeHosts
from tests.support.traffic import Link

_REPAIR, _REPAIR_OFF, _REPAIR_QUEUE, _QUEUE_SEQ = 19, -1, 20, 21
_RECEIVED, _SENT = 1, 2


def numbers(one: socket.socket) -> tuple[int, int]:
    """Return the number that a socket sends next, and the one that it expects (TCP_REPAIR)."""
    tcp = socket.IPPROTO_TCP
    one.setsockopt(tcp, _REPAIR, 1)
    try:
        found = []
        for queue in (_SENT, _RECEIVED):
            one.setsockopt(tcp, _REPAIR_QUEUE, queue)
            found.append(one.getsockopt(tcp, _QUEUE_SEQ) & 0xFFFFFFFF)
    finally:
        one.setsockopt(tcp, _REPAIR, _REPAIR_OFF)
    return found[0], found[1]


def forge(
    lab: ThreeHosts,
    link: Link,
    flags: str = "R",
    *,
    name: str = "client",
    ahead: int = 0,
    hops: int = 64,
    options: tuple[Any, ...] = (),
) -> None:
    """Send a segment in the name of one end, `ahead` of the number that the other end expects.

    It is sent from that end's own network: no other way leads through the gateway.
    """
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    one = link.client if name == "client" else link.server
    sends, expects = numbers(one)
    source, target = one.getsockname()[:2], one.getpeername()[:2]
    v6 = ":" in source[0]
    header = {"hlim" if v6 else "ttl": hops}
    ip = (IPv6 if v6 else IP)(src=source[0], dst=target[0], **header)
    sequence = (sends + ahead) & 0xFFFFFFFF
    segment = TCP(
        sport=source[1], dport=target[1], flags=flags, seq=sequence, ack=expects,
        options=list(options),
    )  # fmt: skip
    with lab.inside(name):
        raw = socket.socket(
            socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW
        )
    with raw:
        raw.sendto(bytes(ip / segment), (target[0], 0))
