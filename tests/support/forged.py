"""Segments that an attacker makes by hand, with the exact numbers of a connection or near them."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

from rstguard.kernel.conntrack import Conntrack
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.traffic import Link

HOLDING = """\
version: 1
name: forged
forged_resets: hold
protect: {interfaces: [out]}
rules:
  - {name: resets, measure: reset_rate, over: 1000/s, then: drop}
"""
"""Holds RSTs, and has a worker look at those that pass."""
_REPAIR, _REPAIR_OFF, _REPAIR_QUEUE, _QUEUE_SEQ = 19, -1, 20, 21
_RECEIVED, _SENT = 1, 2
_REPORTED = 0.6
"""Seconds within which a process of the guard has told what it counted."""
_ETHER_IPV4, _ETHER_IPV6 = 0x0800, 0x86DD


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


def state_of(lab: ThreeHosts, link: Link) -> int | None:
    """Return the state in which the gateway has a connection, or None."""
    with lab.inside("gateway"), Conntrack() as table:
        states = [f.state for f in table.dump() if f.original.source_port == link.port]
    return states[0] if states else None


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
    send_into(lab, name, segment_of(link, flags, name, ahead, hops, options))


def segment_of(
    link: Link,
    flags: str,
    name: str = "client",
    ahead: int = 0,
    hops: int = 64,
    options: tuple[Any, ...] = (),
) -> bytes:
    """Return the IP packet that `forge` sends."""
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
    return bytes(ip / segment)


def send_into(lab: ThreeHosts, place: str, *packets: bytes) -> None:
    """Send packets from a host's network to the gateway, past the host's own tracker."""
    port = "out" if place == "client" else "in"
    (link,) = json.loads(lab.run("gateway", "ip", "-j", "link", "show", port))
    mac = bytes.fromhex(link["address"].replace(":", ""))
    with lab.inside(place):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with wire:
        wire.bind(("eth0", 0))
        for packet in packets:
            kind = _ETHER_IPV6 if packet[0] >> 4 == 6 else _ETHER_IPV4
            wire.send(mac + bytes(6) + kind.to_bytes(2, "big") + packet)


def forge_many(lab: ThreeHosts, link: Link, count: int, *, name: str = "client") -> None:
    """Send as many exact RSTs in one end's name as fast as one can."""
    send_into(lab, name, *[segment_of(link, "R", name=name)] * count)


class Since:
    """What a guard has counted since this was made; it waits until older reports are in."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._before = self._now()
        until = time.monotonic() + _REPORTED
        while time.monotonic() < until:
            time.sleep(0.05)
            if (now := self._now()) != self._before:
                self._before, until = now, time.monotonic() + _REPORTED

    def _now(self) -> Any:
        return self._guard.status()["counts"]

    def counts(self, *path: str) -> int:
        """Return a count, by its name or by the kind and rule of events."""
        now, before = self._now(), self._before
        for name in path[:-1]:
            now, before = now.get(name, {}), before.get(name, {})
        return int(now.get(path[-1], 0)) - int(before.get(path[-1], 0))


def abort(one: socket.socket) -> None:
    """Have a socket's own kernel send a RST."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
