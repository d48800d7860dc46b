"""The packet measures: for each rule of a policy, what it counts on which packets.

A compiled rule becomes a `Meter`: for every kind of packet it needs, a function
`(packet, now) -> bool` that counts the packet and tells whether the rule is crossed by it.  The
tables live in these functions' closures, so a meter that is kept over a policy change keeps its
counts.

A rule that bans counts twice: all packets, and apart from them those of connections that cannot
have been forged (`Meter.proofs`).  With one count somebody could fill a visitor's bucket by forged
SYNs, and the visitor's own next packet would get him banned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial

from rstguard.engine.address import V6
from rstguard.engine.handshakes import is_same_handshake, number_of
from rstguard.engine.keys import flow_key, key_function, key_of
from rstguard.engine.lenient import LenientLimiter
from rstguard.engine.limiter import Distinct, Limiter, Memory
from rstguard.engine.onesided import Handshakes, OneSided
from rstguard.engine.ruleset import NEVER_BANS, Measure, Per, Rule
from rstguard.engine.verdict import Action, Reason
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


@dataclass(frozen=True, slots=True)
class Meter:
    """A rule with its tables: what to do with which kind of packet.

    `exhaust(packet, until, now)` takes from the packet's source what it may have saved up by then,
    so that a source that was shut out does not come back with a fresh burst.
    """

    rule: Rule
    checks: dict[Kind, Check]
    proofs: dict[Kind, Check] = field(default_factory=dict)
    """What is counted of proven connections alone, before `checks`: only this can ban."""
    exhaust: Callable[[Packet, int, int], None] | None = None
    used: Callable[[int, int], float] | None = None
    """How much of the rule's limit a source (a tagged address) has used at a time, 1 being all."""
    nearest: Callable[[int, int], Iterator[list[tuple[int, float]]]] | None = None
    """Yields keys that have used the most of it, so many at most, with how much; see `Limiter`."""


REASONS = {measure: Reason[measure.name] for measure in Measure}
"""The reason that goes with each measure: they bear the same names."""

PROOFS = 4
"""Handshakes that prove an address together, though each by itself may be a lucky forgery
(`rstguard.kernel.proof`): the chance of it is 1 in 66,077 each, after which no more are counted."""


def crossed_by_one(rule: Rule) -> bool:
    """Tell whether the first SYN of a source that nothing is known of can cross a rule.

    What the kernel counts is judged at once: its packet says whether it is one too many.  A rested
    token bucket has at least one token, so no rate can; a count of 0 can.  What counts per
    service knows no newcomers.
    """
    return (
        rule.in_kernel
        or rule.per is Per.SERVICE
        or (rule.measure in _DISTINCT_MAKERS and rule.limit < 1)
    )


def make_meter(rule: Rule, percents: Mapping[int, int], one_sided: OneSided) -> Meter | None:
    """Return the meter of a rule that looks at packets, or None for a sweep measure.

    `percents` is how productive sources are (`rstguard.engine.lenient`), now and as it changes;
    `one_sided` knows services whose handshakes cannot be seen to end.
    """
    if rule.in_kernel:
        # The kernel counts returned cookies apart, and nothing else of them comes as one too many.
        bans = rule.action is Action.BAN
        proofs: dict[Kind, Check] = {Kind.SYN: lambda packet, _now: bool(packet.state & OVER)}
        return Meter(rule, {Kind.SYN: _beside_the_kernel(rule)}, proofs if bans else {})
    if rule.measure in _RATE_MAKERS:
        limiter = _limiter(rule, percents)
        key = key_function(rule)

        def exhaust(packet: Packet, until: int, now: int) -> None:
            limiter.exhaust(key(packet), until, now)

        # What anybody can forge, and the SYNs of returned cookies: each has the whole limit.
        apart = rule.measure is Measure.SYN_RATE and rule.per is not Per.SERVICE
        counts = (limiter, _limiter(rule, percents)) if apart else (limiter,)

        def used(source: int, now: int) -> float:
            return max(count.level(key_of(rule, source), now) for count in counts)

        def nearest(most: int, now: int) -> Iterator[list[tuple[int, float]]]:
            for count in counts:
                yield from count.nearest(most, now)

        checks, proofs = _rate_checks(rule, counts, percents)
        return Meter(rule, checks, proofs, exhaust, used, nearest)
    if rule.measure in _DISTINCT_MAKERS:
        return _distinct(rule, one_sided)
    return Meter(rule, _stalled(rule)) if rule.measure is Measure.STALLED else None


def _distinct(rule: Rule, one_sided: OneSided) -> Meter:
    """What clients that returned a SYN cookie try counts apart, as in `_syn_rate`."""
    usual, returned = (Distinct(rule.limit, rule.within) for _ in range(2))
    make = _DISTINCT_MAKERS[rule.measure]
    if rule.measure is Measure.HALF_OPEN:
        make = partial(_half_open, one_sided=one_sided)
    checks, apart = make(rule, usual), make(rule, returned)
    forgeable, real = checks[Kind.SYN], apart[Kind.SYN]

    def check(packet: Packet, now: int) -> bool:
        return real(packet, now) if packet[9] & KNOWN else forgeable(packet, now)

    def used(source: int, now: int) -> float:
        key = key_of(rule, source)
        return max(one.count(key, now) for one in (usual, returned)) / max(rule.limit, 1)

    def nearest(most: int, now: int) -> Iterator[list[tuple[int, float]]]:
        for one in (usual, returned):
            yield from one.nearest(most, now)

    bans = rule.action is Action.BAN and rule.measure not in NEVER_BANS
    # The proof is asked first, and to count a target twice is to count it once.
    proofs = apart if bans else {}
    return Meter(rule, {**checks, Kind.SYN: check}, proofs, used=used, nearest=nearest)


def _limiter(rule: Rule, percents: Mapping[int, int]) -> Limiter:
    if rule.unless:
        return LenientLimiter(rule, percents)
    return Limiter(rule.limit, rule.period, rule.burst)


def _rate_checks(
    rule: Rule, counts: tuple[Limiter, ...], percents: Mapping[int, int]
) -> tuple[dict[Kind, Check], dict[Kind, Check]]:
    """Return the checks of a rate measure, and its proofs if it bans."""
    opened: Memory[int] = Memory()
    short = rule.measure is Measure.SHORT_CONNECTIONS
    if short:
        checks = _short_connections(rule, counts[0], opened)
    elif len(counts) > 1:
        checks = _syn_rate(rule, *counts)
    else:
        checks = _RATE_MAKERS[rule.measure](rule, counts[0])
    if rule.action is not Action.BAN or rule.measure in NEVER_BANS:
        return checks, {}
    # A returned cookie is no lucky forgery.
    least = 1 if rule.measure is Measure.SYN_RATE else PROOFS - 1
    proven = _limiter(replace(rule, burst=max(rule.burst, least)), percents)
    if short:
        return checks, {Kind.CLOSE: _ended(rule, proven, opened.get)}
    proofs = _RATE_MAKERS[rule.measure](rule, proven)
    if rule.measure is Measure.RESET_RATE:
        proofs = _once(proofs[Kind.CLOSE])
    return checks, proofs


def _once(check: Check) -> dict[Kind, Check]:
    """Count each connection once: until its ports have completed another handshake."""
    counted: Memory[bool] = Memory()

    def first(packet: Packet, now: int) -> bool:
        flow = flow_key(packet)
        if counted.get(flow):
            return False
        counted.put(flow, True)
        return check(packet, now)

    def anew(packet: Packet, now: int) -> bool:
        counted.pop(flow_key(packet))
        return False

    return {Kind.CLOSE: first, Kind.HANDSHAKE: anew}


def _rate(rule: Rule, limiter: Limiter) -> Check:
    """Every packet of the kind counts."""
    over = limiter.over
    if rule.per is Per.SERVICE:
        key = key_function(rule)
        return lambda packet, now: over(key(packet), now)
    shift4, shift6 = 32 - rule.ipv4_length, 128 - rule.ipv6_length

    def check(packet: Packet, now: int) -> bool:
        source = packet[0]  # by index, and `source_key` spelled out: this runs for every SYN
        return over(source >> (shift6 if source >= V6 else shift4), now)

    return check


def _beside_the_kernel(rule: Rule) -> Check:
    """What the kernel counts comes here only if it is too many, or with a SYN cookie.

    Any other SYN found no room in the kernel's table (`rstguard.kernel.counting`) and counts here.
    """
    rate = _rate(rule, Limiter(rule.limit, rule.period, rule.burst))

    def check(packet: Packet, now: int) -> bool:
        return bool(packet.state & OVER) or (not packet.state & KNOWN and rate(packet, now))

    return check


def _syn_rate(rule: Rule, limiter: Limiter, returned: Limiter) -> dict[Kind, Check]:
    """SYNs of clients that returned a SYN cookie have a count of their own.

    Anybody can forge the others; they must not use up what the owner of the address may send.
    """
    usual, proven = limiter.over, returned.over
    shift4, shift6 = 32 - rule.ipv4_length, 128 - rule.ipv6_length

    def check(packet: Packet, now: int) -> bool:
        source = packet[0]  # as in `_rate`: this runs for every SYN
        over = proven if packet[9] & KNOWN else usual
        return over(source >> (shift6 if source >= V6 else shift4), now)

    return {Kind.SYN: check}


def _service_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    return {Kind.SYN: _rate(rule, limiter)}


def _connection_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    """A connection counts once, though its first data may follow before its ACK has a verdict.

    An ACK that was dropped comes again with the next SYN-ACK: it is not to pass for that.  What
    tells it from a new connection of the same ports is the number that the server has drawn.
    """
    rate = _rate(rule, limiter)
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
    return {Kind.BAD: _rate(rule, limiter)}


def _out_of_state(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    return {Kind.STRAY: _rate(rule, limiter)}


def _reset_rate(rule: Rule, limiter: Limiter) -> dict[Kind, Check]:
    rate = _rate(rule, limiter)
    return {Kind.CLOSE: lambda packet, now: bool(packet.flags & RST) and rate(packet, now)}


def _distinct_ports(rule: Rule, tried: Distinct) -> dict[Kind, Check]:
    over, key = tried.over, key_function(rule)
    return {Kind.SYN: lambda packet, now: over(key(packet), packet.destination_port, now)}


def _distinct_hosts(rule: Rule, tried: Distinct) -> dict[Kind, Check]:
    over, key = tried.over, key_function(rule)
    return {Kind.SYN: lambda packet, now: over(key(packet), packet.destination, now)}


def _half_open(
    rule: Rule, pending: Distinct, one_sided: OneSided | None = None
) -> dict[Kind, Check]:
    """A SYN opens; the first ACK that the kernel accepts takes it back, or a RST of either end."""
    handshakes = Handshakes(key_function(rule), flow_key, pending, one_sided or OneSided())
    return {
        Kind.SYN: handshakes.opened,
        Kind.HANDSHAKE: handshakes.completed,
        Kind.GIVEN_UP: handshakes.given_up,
    }


def _short_connections(rule: Rule, limiter: Limiter, opened: Memory[int]) -> dict[Kind, Check]:
    """A connection counts once, at the first FIN or RST of either end."""

    def opening(packet: Packet, now: int) -> bool:
        opened.put(flow_key(packet), now)
        return False

    return {Kind.SYN: opening, Kind.CLOSE: _ended(rule, limiter, opened.pop)}


def _ended(rule: Rule, limiter: Limiter, began_of: Callable[[int], int | None]) -> Check:
    over, key = limiter.over, key_function(rule)

    def closing(packet: Packet, now: int) -> bool:
        began = began_of(flow_key(packet))
        return began is not None and now - began < rule.shorter_than and over(key(packet), now)

    return closing


def _stalled(rule: Rule) -> dict[Kind, Check]:
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


_RATE_MAKERS: dict[Measure, Callable[[Rule, Limiter], dict[Kind, Check]]] = {
    Measure.SYN_RATE: _service_rate,
    Measure.CONNECTION_RATE: _connection_rate,
    Measure.BAD_FLAGS: _bad_flags,
    Measure.OUT_OF_STATE: _out_of_state,
    Measure.RESET_RATE: _reset_rate,
    Measure.SHORT_CONNECTIONS: lambda rule, limiter: _short_connections(rule, limiter, Memory()),
}
_DISTINCT_MAKERS: dict[Measure, Callable[[Rule, Distinct], dict[Kind, Check]]] = {
    Measure.HALF_OPEN: _half_open,
    Measure.DISTINCT_PORTS: _distinct_ports,
    Measure.DISTINCT_HOSTS: _distinct_hosts,
}
