"""Segments in others' names, sent from the hosts of a test."""

from __future__ import annotations

import json
import socket
import struct
import time
from contextlib import ExitStack
from typing import Any

from rstguard.engine.address import parse_address
from rstguard.engine.wire import RST
from rstguard.kernel.conntrack import Conntrack
from rstguard.lab.forging import Forger, segment
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
_REPORTED = 0.6
"""Seconds within which a process of the guard has told what it counted."""
_ETHER_IPV4, _ETHER_IPV6 = 0x0800, 0x86DD
MD5 = 19, bytes(16)
"""A signature (RFC 2385) that the server has no key for: it takes no such segment."""


def state_of(lab: ThreeHosts, link: Link) -> int | None:
    """Return the state in which the gateway has a connection, or None."""
    return entry_state(lab, link.source, link.port)


def entry_state(lab: ThreeHosts, source: str, port: int) -> int | None:
    """Return the state in which the gateway has the connection of a client's address and port.

    The port alone does not tell: clients of tests before have used others of the same range.
    """
    client = parse_address(source), port
    with lab.inside("gateway"), Conntrack() as table:
        originals = [(flow.original, flow.state) for flow in table.dump()]
    return next((s for o, s in originals if (o.source, o.source_port) == client), None)


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
    send_at_once(lab, *((place, packet) for packet in packets))


def send_at_once(lab: ThreeHosts, *packets: tuple[str, bytes]) -> None:
    """Send packets from the networks of hosts, one right behind the other, in this order."""
    with ExitStack() as stack:
        wires = {place: wire_of(lab, place, stack) for place in {place for place, _ in packets}}
        for place, packet in packets:
            wire, mac = wires[place]
            kind = _ETHER_IPV6 if packet[0] >> 4 == 6 else _ETHER_IPV4
            wire.send(mac + bytes(6) + kind.to_bytes(2, "big") + packet)


def wire_of(lab: ThreeHosts, place: str, stack: ExitStack) -> tuple[socket.socket, bytes]:
    """Return a socket on a host's wire until the stack ends, and the gateway's address there."""
    port = "out" if place == "client" else "in"
    (link,) = json.loads(lab.run("gateway", "ip", "-j", "link", "show", port))
    with lab.inside(place):
        wire = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
    wire.bind(("eth0", 0))
    return wire, bytes.fromhex(link["address"].replace(":", ""))


def forge_many(lab: ThreeHosts, link: Link, count: int, *, name: str = "client") -> None:
    """Send as many exact RSTs in one end's name as fast as one can."""
    send_into(lab, name, *[segment_of(link, RST, name=name)] * count)


def forger(lab: ThreeHosts, source: str, target: str, port: int) -> Forger:
    """Return who sends from the client's host in the name of `source`, to one service."""
    with lab.inside("client"):
        return Forger(source, target, port)


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


def blind_close(lab: ThreeHosts, link: Link) -> None:
    """Have the tracker take a connection for closed, in both names, without knowing its numbers.

    The server takes no SYN with a signature that it has no key for, but the tracker does; the RST
    that answers it may have any number (nf_conntrack_proto_tcp.c).
    """
    send_into(lab, "client", *closing_blindly(link))


def closing_blindly(link: Link) -> list[bytes]:
    """Return the packets that `blind_close` sends."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    (own, port), (there, service) = link.client.getsockname()[:2], link.client.getpeername()[:2]
    ip = IPv6 if ":" in own else IP
    syn = TCP(sport=port, dport=service, flags="S", seq=1_000_000, options=[MD5])
    rst = TCP(sport=service, dport=port, flags="RA", seq=123_456, ack=1_000_001)
    packets = (ip(src=own, dst=there) / syn, ip(src=there, dst=own) / rst)
    return [bytes(packet) for packet in packets]
