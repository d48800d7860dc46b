"""Segments in others' names, sent from the hosts of a test."""

from __future__ import annotations

import json
import socket

from rstguard.engine.wire import RST
from rstguard.kernel.conntrack import Conntrack
from rstguard.lab.forging import Forger, segment
from tests.support.network import ThreeHosts
from tests.support.traffic import Link

_ETHER_IPV4, _ETHER_IPV6 = 0x0800, 0x86DD


def state_of(lab: ThreeHosts, link: Link) -> int | None:
    """Return the state in which the gateway has a connection, or None."""
    with lab.inside("gateway"), Conntrack() as table:
        states = [f.state for f in table.dump() if f.original.source_port == link.port]
    return states[0] if states else None


def forge(
    lab: ThreeHosts,
    link: Link,
    flags: int = RST,
    *,
    name: str = "client",
    ahead: int = 0,
    hops: int = 64,
    options: tuple[tuple[int, bytes], ...] = (),
) -> None:
    """Send a segment in the name of one end, `ahead` of the number that the other end expects.

    It is sent from that end's own network: no other way leads through the gateway.
    """
    send_into(lab, name, segment_of(link, flags, name, ahead, hops, options))


def segment_of(
    link: Link,
    flags: int,
    name: str = "client",
    ahead: int = 0,
    hops: int = 64,
    options: tuple[tuple[int, bytes], ...] = (),
) -> bytes:
    """Return the IP packet that `forge` sends."""
    one = link.client if name == "client" else link.server
    return segment(one, flags, ahead=ahead, hops=hops, options=options)


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
    send_into(lab, name, *[segment_of(link, RST, name=name)] * count)


def forger(lab: ThreeHosts, source: str, target: str, port: int) -> Forger:
    """Return who sends from the client's host in the name of `source`, to one service."""
    with lab.inside("client"):
        return Forger(source, target, port)
