"""What each measure counts: for every kind of packet it needs, a check.

The tables of a check live in its closure.  What rules make of them is in `rstguard.engine.rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from rstguard.engine.address import V6
from rstguard.engine.handshakes import is_same_handshake, number_of
from rstguard.engine.keys import flow_key, key_function
from rstguard.engine.limiter import Distinct, Limiter, Memory
from rstguard.engine.onesided import Handshakes, OneSided
from rstguard.engine.refusals import Refusals
from rstguard.engine.ruleset import Measure, Rule
from rstguard.engine.verdict import Action
from rstguard.engine.wire import KNOWN, OVER, RST, Packet

Check = Callable[[Packet, int], bool]
"""Count a packet at a time (nanoseconds); True if the rule is crossed by it."""


class Kind(Enum):
    """The kinds of packets that rules tell apart; each packet is of exactly one."""

    SYN = "new SYN"
    HANDSHAKE = "first ACK"
    CLOSE = "FIN or RST"
    GIVEN_UP = "RST of a handshake"
    BAD = "impossible flags"
    STRAY = "no known connection"
    OTHER = "small window, or nothing of note"


def rate_check(rule: Rule, limiter: Limiter) -> Check:
    """Every packet of the kind counts."""
    over = limiter.over
    if rule.of_target:
        key = key_function(rule)
        return lambda packet, now: over(key(packet), now)
    shift4, shift6 = 32 - rule.ipv4_length, 128 - rule.ipv6_length

    def check(packet: Packet, now: int) -> bool:
        source = packet[0]  # by index, and `source_key` spelled out: this runs for every SYN
        return over(source >> (shift6 if source >= V6 else shift4), now)

    return check


def beside_the_kernel(rule: Rule) -> Check:
    """What the kernel counts comes here only if it is too many, or with a SYN cookie.

    Any other SYN found no room in the kernel's table (`rstguard.kernel.counting`) and counts here.
    """
    rate = rate_check(rule, Limiter(rule.limit, rule.period, rule.burst))

    def check(packet: Packet, now: int) -> bool:
        return bool(packet.state & OVER) or (not packet.state & KNOWN and rate(packet, now))

    return check


def syn_rate(rule: Rule, limiter: Limiter, returned: Limiter) -> dict[Kind, Check]:
    """SYNs of clients that returned a SYN cookie have a count of their own.

    Anybody can forge the others; they must not use up what the owner of the address may send.
    """
    usual, proven = limiter.over, returned.over
    shift4, shift6 = 32 - rule.ipv4_length, 128 - rule.ipv6_length

    def check(packet: Packet, now: int) -> bool:
        source = packet[0]  # as in `rate_check`: this runs for every SYN
        over = proven if packet[9] & KNOWN else usual
        return over(source >> (shift6 if source >= V6 else shift4), now)

    return {Kind.SYN: check}


def _service_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    return {Kind.SYN: rate_check(rule, limiter)}


def _connection_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    """A connection counts once, though its first data may follow before its ACK has a verdict.

    An ACK that was dropped comes again with the next SYN-ACK: it is not to pass for that.  What
    tells it from a new connection of the same ports is the number that the server has drawn.
    """
    rate = rate_check(rule, limiter)
    drops = rule.action is Action.DROP
    counted: Memory[tuple[int, int, bool]] = Memory()

    def completed(packet: Packet, now: int) -> bool:
        flow = flow_key(packet)
        number = number_of(packet)
        last = counted.get(flow)
        if last is not None and is_same_handshake(number - last[1], now - last[0]):
            if last[2]:
                counted.put(flow, (now, last[1], True))
            return last[2]
        crossed = rate(packet, now)
        counted.put(flow, (now, number, crossed and drops))
        return crossed

    return {Kind.HANDSHAKE: completed}


def _bad_flags(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    return {Kind.BAD: rate_check(rule, limiter)}


def _out_of_state(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    return {Kind.STRAY: rate_check(rule, limiter)}


def _reset_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    rate = rate_check(rule, limiter)
    return {Kind.CLOSE: lambda packet, now: bool(packet.flags & RST) and rate(packet, now)}


def _distinct_ports(rule: Rule, tried: Distinct, _one_sided: OneSided) -> dict[Kind, Check]:
    over, key = tried.over, key_function(rule)
    return {Kind.SYN: lambda packet, now: over(key(packet), packet.destination_port, now)}


def _distinct_hosts(rule: Rule, tried: Distinct, _one_sided: OneSided) -> dict[Kind, Check]:
    over, key = tried.over, key_function(rule)
    return {Kind.SYN: lambda packet, now: over(key(packet), packet.destination, now)}


def _half_open(rule: Rule, pending: Distinct, one_sided: OneSided) -> dict[Kind, Check]:
    """A SYN opens; the first ACK that the kernel accepts takes it back, or a RST of either end."""
    handshakes = Handshakes(key_function(rule), flow_key, pending, one_sided)
    return {
        Kind.SYN: handshakes.opened,
        Kind.HANDSHAKE: handshakes.completed,
        Kind.GIVEN_UP: handshakes.given_up,
    }


def _refused_ports(rule: Rule, refused: Distinct, one_sided: OneSided) -> dict[Kind, Check]:
    """A SYN waits for its answer; a RST of the server, or silence, counts its target."""
    refusals = Refusals(key_function(rule), flow_key, rule.limit, refused, one_sided)
    return {
        Kind.SYN: refusals.opened,
        Kind.HANDSHAKE: refusals.completed,
        Kind.GIVEN_UP: refusals.given_up,
    }


def short_connections(rule: Rule, limiter: Limiter, opened: Memory[int]) -> dict[Kind, Check]:
    """A connection counts once, at the first FIN or RST of either end."""

    def opening(packet: Packet, now: int) -> bool:
        opened.put(flow_key(packet), now)
        return False

    return {Kind.SYN: opening, Kind.CLOSE: ended(rule, limiter, opened.pop)}


def ended(rule: Rule, limiter: Limiter, began_of: Callable[[int], int | None]) -> Check:
    """A connection counts at its end if it was short; `began_of` says when it began."""
    over, key = limiter.over, key_function(rule)

    def closing(packet: Packet, now: int) -> bool:
        began = began_of(flow_key(packet))
        return began is not None and now - began < rule.shorter_than and over(key(packet), now)

    return closing


def stalled(rule: Rule) -> dict[Kind, Check]:
    """The client advertises a small window, and nothing shows that it ever was larger.

    Only small windows come by here.  Between two of them the server can have sent at most what
    the first one allowed (RFC 9293, 3.8.6); if more was acknowledged, the window was open in
    between, and the clock starts anew.
    """
    scales: Memory[int] = Memory()
    stalls: Memory[tuple[int, int, int, int]] = Memory()

    def opening(packet: Packet, now: int) -> bool:
        scales.put(flow_key(packet), packet.window_scale)
        return False

    def small(packet: Packet, now: int) -> bool:
        flow = flow_key(packet)
        held = stalls.get(flow)
        # Without the SYN the scale is not known: only a window of 0 is then surely small.
        scale = (
            held[3] if held else max(0, known) if (known := scales.get(flow)) is not None else 16
        )
        window = packet.window << scale
        if window > rule.window:
            stalls.pop(flow)
            return False
        began, acknowledged, allowed, _ = held or (now, packet.acknowledgement, window, scale)
        if (packet.acknowledgement - acknowledged) & 0xFFFFFFFF > allowed + 1:
            began = now
        stalls.put(flow, (began, packet.acknowledgement, window, scale))
        return now - began >= rule.limit

    return {Kind.SYN: opening, Kind.OTHER: small}


RATE_MAKERS: dict[Measure, Callable[[Rule, Limiter], dict[Kind, Check]]] = {
    Measure.SYN_RATE: _service_rate,
    Measure.CONNECTION_RATE: _connection_rate,
    Measure.BAD_FLAGS: _bad_flags,
    Measure.OUT_OF_STATE: _out_of_state,
    Measure.RESET_RATE: _reset_rate,
    Measure.SHORT_CONNECTIONS: lambda rule, limiter: short_connections(rule, limiter, Memory()),
}
DISTINCT_MAKERS: dict[Measure, Callable[[Rule, Distinct, OneSided], dict[Kind, Check]]] = {
    Measure.HALF_OPEN: _half_open,
    Measure.DISTINCT_PORTS: _distinct_ports,
    Measure.DISTINCT_HOSTS: _distinct_hosts,
    Measure.REFUSED_PORTS: _refused_ports,
}
