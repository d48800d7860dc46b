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

from rstguard.engine.checks import (
    DISTINCT_MAKERS,
    RATE_MAKERS,
    Check,
    Kind,
    beside_the_kernel,
    ended,
    short_connections,
    stalled,
    syn_rate,
)
from rstguard.engine.grades import PROOFS
from rstguard.engine.keys import flow_key, key_function, key_of
from rstguard.engine.lenient import LenientLimiter
from rstguard.engine.limiter import Distinct, Limiter, Memory
from rstguard.engine.onesided import OneSided
from rstguard.engine.ruleset import NEVER_BANS, Measure, Rule
from rstguard.engine.verdict import Action, Reason
from rstguard.engine.wire import KNOWN, OVER, Packet


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


def crossed_by_one(rule: Rule) -> bool:
    """Tell whether the first SYN of a source that nothing is known of can cross a rule.

    What the kernel counts is judged at once: its packet says whether it is one too many.  A rested
    token bucket has at least one token, so no rate can; a count of 0 can.  What counts per
    target knows no newcomers.
    """
    return rule.in_kernel or rule.of_target or (rule.measure in DISTINCT_MAKERS and rule.limit < 1)


def make_meter(rule: Rule, percents: Mapping[int, int], one_sided: OneSided) -> Meter | None:
    """Return the meter of a rule that looks at packets, or None for a sweep measure.

    `percents` is how productive sources are (`rstguard.engine.lenient`), now and as it changes;
    `one_sided` knows services whose handshakes cannot be seen to end.
    """
    meter = _meter(rule, percents, one_sided)
    return meter and replace(
        meter, checks=_concerned(rule, meter.checks), proofs=_concerned(rule, meter.proofs)
    )


def _concerned(rule: Rule, checks: dict[Kind, Check]) -> dict[Kind, Check]:
    """Have packets that a rule does not concern neither counted nor objected to."""
    if not rule.is_partial:
        return checks

    def only(check: Check) -> Check:
        return lambda packet, now: rule.concerns(packet[0], packet[1]) and check(packet, now)

    return {kind: only(check) for kind, check in checks.items()}


def _meter(rule: Rule, percents: Mapping[int, int], one_sided: OneSided) -> Meter | None:
    if rule.in_kernel:
        # The kernel counts returned cookies apart, and nothing else of them comes as one too many.
        bans = rule.action is Action.BAN
        proofs: dict[Kind, Check] = {Kind.SYN: lambda packet, _now: bool(packet.state & OVER)}
        return Meter(rule, {Kind.SYN: beside_the_kernel(rule)}, proofs if bans else {})
    if rule.measure in RATE_MAKERS:
        limiter = _limiter(rule, percents)
        key = key_function(rule)

        def exhaust(packet: Packet, until: int, now: int) -> None:
            limiter.exhaust(key(packet), until, now)

        # What anybody can forge, and the SYNs of returned cookies: each has the whole limit.
        apart = rule.measure is Measure.SYN_RATE and not rule.of_target
        counts = (limiter, _limiter(rule, percents)) if apart else (limiter,)

        def used(source: int, now: int) -> float:
            return max(count.level(key_of(rule, source), now) for count in counts)

        def nearest(most: int, now: int) -> Iterator[list[tuple[int, float]]]:
            for count in counts:
                yield from count.nearest(most, now)

        checks, proofs = _rate_checks(rule, counts, percents)
        return Meter(rule, checks, proofs, exhaust, used, nearest)
    if rule.measure in DISTINCT_MAKERS:
        return _distinct(rule, one_sided)
    return Meter(rule, stalled(rule)) if rule.measure is Measure.STALLED else None


def _distinct(rule: Rule, one_sided: OneSided) -> Meter:
    """What clients that returned a SYN cookie try counts apart, as in `syn_rate`."""
    usual, returned = (Distinct(rule.limit, rule.within) for _ in range(2))
    make = DISTINCT_MAKERS[rule.measure]
    checks, apart = make(rule, usual, one_sided), make(rule, returned, one_sided)
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
        checks = short_connections(rule, counts[0], opened)
    elif len(counts) > 1:
        checks = syn_rate(rule, *counts)
    else:
        checks = RATE_MAKERS[rule.measure](rule, counts[0])
    if rule.action is not Action.BAN or rule.measure in NEVER_BANS:
        return checks, {}
    # A returned cookie is no lucky forgery.
    least = 1 if rule.measure is Measure.SYN_RATE else PROOFS - 1
    proven = _limiter(replace(rule, burst=max(rule.burst, least)), percents)
    if short:
        return checks, {Kind.CLOSE: ended(rule, proven, opened.get)}
    proofs = RATE_MAKERS[rule.measure](rule, proven)
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
