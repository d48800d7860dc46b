"""Packets for the tests: bytes laid out by hand, and parsed ones that show only the point."""

from __future__ import annotations

from dataclasses import replace
from socket import AF_INET, AF_INET6, inet_pton
from struct import pack
from typing import Any

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope
from rstguard.engine.verdict import Action
from rstguard.engine.wire import ACK, SYN, Packet

MILLISECOND = SECOND // 1000
CLIENT = "198.51.100.7"
SERVER = "203.0.113.10"
CLIENT6 = "2001:db8:1::7"
SERVER6 = "2001:db8:2::10"


def tcp(
    flags: int = SYN,
    *,
    source_port: int = 40000,
    destination_port: int = 80,
    sequence: int = 0x01020304,
    acknowledgement: int = 0,
    window: int = 64240,
    options: bytes = b"",
    payload: bytes = b"",
    offset: int | None = None,
) -> bytes:
    """Lay out a TCP segment (RFC 9293, 3.1); `offset` overrides the data offset, in words."""
    words = 5 + len(options) // 4 if offset is None else offset
    header = pack(
        ">HHIIBBHHH",
        source_port,
        destination_port,
        sequence,
        acknowledgement,
        words << 4,
        flags,
        window,
        0,
        0,
    )
    return header + options + payload


def ipv4(
    body: bytes,
    *,
    source: str = CLIENT,
    destination: str = SERVER,
    protocol: int = 6,
    options: bytes = b"",
    fragment: int = 0x4000,
    total: int | None = None,
    words: int | None = None,
) -> bytes:
    """Lay out an IPv4 packet (RFC 791, 3.1); `total` and `words` may lie about the lengths."""
    ihl = 5 + len(options) // 4 if words is None else words
    length = 20 + len(options) + len(body) if total is None else total
    header = pack(
        ">BBHHHBBH4s4s",
        0x40 | ihl,
        0,
        length,
        1,
        fragment,
        64,
        protocol,
        0,
        inet_pton(AF_INET, source),
        inet_pton(AF_INET, destination),
    )
    return header + options + body


def ipv6(
    body: bytes,
    *,
    source: str = CLIENT6,
    destination: str = SERVER6,
    following: int = 6,
    length: int | None = None,
) -> bytes:
    """Lay out an IPv6 packet (RFC 8200, 3); `following` is the number of the first header in it."""
    payload = len(body) if length is None else length
    ends = inet_pton(AF_INET6, source) + inet_pton(AF_INET6, destination)
    return pack(">IHBB", 6 << 28, payload, following, 64) + ends + body


def extension(following: int, *, units: int = 0) -> bytes:
    """Lay out an options header of 8 bytes and `units` times 8 more (RFC 8200, 4.3 and 4.6)."""
    return bytes([following, units, 1, 4]) + bytes(4 + 8 * units)


def fragment_header(following: int, *, offset: int = 0, more: bool = True) -> bytes:
    """Lay out a fragment header, `offset` in 8-byte units (RFC 8200, 4.5)."""
    return pack(">BBHI", following, 0, offset << 3 | more, 77)


def authentication_header(following: int, *, words: int = 4) -> bytes:
    """Lay out an authentication header whose length field is `words` (RFC 4302, 2.2)."""
    return bytes([following, words]) + bytes((words + 2) * 4 - 2)


def packet(
    flags: int = SYN,
    *,
    source: str = CLIENT,
    destination: str = SERVER,
    source_port: int = 40000,
    port: int = 80,
    state: int = 0,
    window: int = 64240,
    acknowledgement: int = 0,
    window_scale: int = -1,
) -> Packet:
    """Return a parsed packet, by default a SYN of the client to the server's port 80."""
    return Packet(
        source=parse_address(source),
        destination=parse_address(destination),
        source_port=source_port,
        destination_port=port,
        sequence=1,
        acknowledgement=acknowledgement,
        flags=flags,
        window=window,
        payload_length=0,
        state=state,
        window_scale=window_scale,
    )


def reply(
    flags: int = ACK, *, source: str = CLIENT, source_port: int = 40000, state: int = 0
) -> Packet:
    """Return what the server sends to the client on the connection that `packet` is of."""
    return packet(flags, source=source, source_port=source_port, state=state).turned()


def rule(measure: Measure, action: Action = Action.DROP, limit: int = 3, **more: Any) -> Rule:
    """Return a rule with a name of its own: by default more than 3 a second are dropped."""
    given = Rule(
        name=more.pop("name", f"{measure.value}-rule"),
        measure=measure,
        action=action,
        limit=limit,
        period=SECOND,
        burst=limit,
        within=10 * SECOND,
        duration=600 * SECOND,
    )
    return replace(given, **more)


def ruleset(*rules: Rule, trusted: tuple[str, ...] = (), enforce: bool = True) -> RuleSet:
    """Return a policy of just these rules."""
    return RuleSet(
        name="test",
        enforce=enforce,
        fail_open=True,
        scope=Scope(("eth0",), (), None, tuple(parse_prefix(text) for text in trusted)),
        rules=rules,
    )
