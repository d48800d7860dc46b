"""Whom a rule counts a packet or a connection against, and a connection's name, as integers."""

from __future__ import annotations

from collections.abc import Callable

from rstguard.engine.address import source_key
from rstguard.engine.flow import Flow
from rstguard.engine.ruleset import Per, Rule
from rstguard.engine.wire import Packet


def key_function(rule: Rule) -> Callable[[Packet], int]:
    """Return the function that says whom a rule counts a packet against."""
    if rule.per is Per.SERVICE:
        return lambda packet: packet.destination << 16 | packet.destination_port
    ipv4, ipv6 = rule.ipv4_length, rule.ipv6_length
    if rule.per is Per.DESTINATION:
        return lambda packet: source_key(packet.destination, ipv4, ipv6)
    return lambda packet: source_key(packet.source, ipv4, ipv6)


def flow_key_function(rule: Rule) -> Callable[[Flow], int]:
    """Return the function that says whom a rule counts a connection against."""
    if rule.per is Per.SERVICE:
        return service_key
    ipv4, ipv6 = rule.ipv4_length, rule.ipv6_length
    if rule.per is Per.DESTINATION:
        return lambda flow: source_key(flow.original.destination, ipv4, ipv6)
    return lambda flow: source_key(flow[1][0], ipv4, ipv6)  # by index: a sweep asks for each


def service_key(flow: Flow) -> int:
    """Return the key of a connection's service, as rules count by with `Per.SERVICE`."""
    return flow.original.destination << 16 | flow.original.destination_port


def key_of(rule: Rule, source: int) -> int:
    """Return the key that a rule counts a source (a tagged address) by."""
    return source_key(source, rule.ipv4_length, rule.ipv6_length)


def flow_key(packet: Packet) -> int:
    """Return a connection's name as one integer: a third of the memory of a tuple of four."""
    return ((packet[0] << 129 | packet[1]) << 16 | packet[2]) << 16 | packet[3]


def service_of(flow: int) -> tuple[int, int]:
    """Return destination and port of a connection's name: the source's port is between them."""
    return flow >> 32 & (1 << 129) - 1, flow & 0xFFFF
