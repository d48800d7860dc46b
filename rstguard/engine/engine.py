"""The decision: `decide(packet, now)`.

The order of checks, on one screen:

1. A SYN, a closing segment, a first ACK, …: the packet's kind picks the rules that look at it.
2. The first SYN of a source is put off: it is counted when the source is met again, before anything
   else of it (`rstguard.engine.newcomers`).
3. Every rule that looks at it counts it; the most severe action of those that are hit wins.
4. Only then, off the usual path, the trusted list is consulted: it overrides every rule.
5. `ban` needs proof of address and becomes a shun without it: the packets that crossed the limit
   must be of connections that nobody can have forged, and those are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from rstguard.engine.address import V6, Prefix, prefix_of
from rstguard.engine.checks import Check, Kind
from rstguard.engine.flow import Tuple
from rstguard.engine.heavy import HeavyHitters
from rstguard.engine.large import Spared
from rstguard.engine.nearest import MOST_TRUSTED, Near, told
from rstguard.engine.newcomers import Newcomers
from rstguard.engine.onesided import OneSided
from rstguard.engine.rules import REASONS, Meter, crossed_by_one, make_meter
from rstguard.engine.ruleset import RATE_MEASURES, Measure, Rule, RuleSet
from rstguard.engine.shedding import Level
from rstguard.engine.sources import Offence, Sources
from rstguard.engine.verdict import (
    PASS,
    PASS_AND_TRUST,
    Action,
    Ban,
    Condemn,
    Decision,
    Reason,
    Shun,
    Verdict,
)
from rstguard.engine.wire import (
    BAD_FLAGS,
    FIN,
    HANDSHAKE,
    KNOWN,
    OUTBOUND,
    OVER,
    PROVEN,
    RST,
    STRAY,
    SYN,
    Malformed,
    Packet,
)

# Only TCP is diverted, and with all its headers: what cannot be read is made not to be.
_NO_USUAL_SYN = OUTBOUND | KNOWN
_OF_PROVEN = KNOWN | PROVEN
_OF_NO_CONNECTION = {Kind.BAD: Measure.BAD_FLAGS, Kind.STRAY: Measure.OUT_OF_STATE}
_OF_HANDSHAKES = frozenset({Measure.CONNECTION_RATE, Measure.SHORT_CONNECTIONS})
"""What only completed handshakes cross, so that some more of them prove who does."""
_NO_UNPROVEN_SYN = _NO_USUAL_SYN | PROVEN | OVER
_UNREADABLE = Decision(Verdict.DROP, Reason.UNREADABLE)
_TRUSTED = Decision(Verdict.ACCEPT, Reason.TRUSTED)
_PROTECTED = Decision(Verdict.ACCEPT, Reason.PROTECTED)

_OVERLOADED = Decision(Verdict.DROP, Reason.OVERLOAD)
OVERLOAD = "overload"
"""Stands for the rule in what is told of a source that was shunned for holding a worker up."""

_WATCHED = 255
"""Sources that may be heavy hitters at once: each more than 1 in 256 of the SYNs."""
_WATCH_FOR = 4096
"""SYNs over which that is watched."""
_TOO_HEAVY = _WATCH_FOR // 16
"""A source that sends more of them is shunned."""

Decide = Callable[[Packet | Malformed, int], Decision]
"""Judge a packet that arrives at a time (nanoseconds)."""
Checks = tuple[tuple[Check, Rule], ...]


class Engine:
    """Judges packets by a compiled policy.  Pure: time comes in, decisions go out."""

    def __init__(
        self, ruleset: RuleSet, previous: Engine | None = None, one_sided: OneSided | None = None
    ) -> None:
        """Take up a policy; rules that `previous` has unchanged keep their counts.

        `one_sided` knows the services of which only one side is seen; without it there are none.
        """
        self.ruleset = ruleset
        inherited = previous._one_sided if previous else OneSided()
        self._one_sided: OneSided = one_sided or inherited
        kept = {meter.rule: meter for meter in previous.meters} if previous else {}
        self._percents: dict[int, int] = previous._percents if previous else {}
        self._large: Spared = previous._large if previous else Spared()
        self._large.follow(ruleset)
        meters = (
            kept.get(rule) or make_meter(rule, self._percents, self._one_sided)
            for rule in ruleset.rules
        )
        self.meters: tuple[Meter, ...] = tuple(meter for meter in meters if meter)
        self._sources: Sources = previous._sources if previous else Sources(ruleset)
        self._sources.ruleset = ruleset
        self._by_port = {kind: self._checks_by_port(kind) for kind in Kind}
        self._elsewhere = {kind: self._checks(kind, None) for kind in Kind}
        self._proofs_by_port = {kind: self._checks_by_port(kind, proofs=True) for kind in Kind}
        self._proofs_elsewhere = {kind: self._checks(kind, None, proofs=True) for kind in Kind}
        self._syn_by_port = {port: _at_once(c) for port, c in self._by_port[Kind.SYN].items()}
        self._syn_elsewhere = _at_once(self._elsewhere[Kind.SYN])
        self._of_service = {p: _of_service(c) for p, c in self._by_port[Kind.SYN].items()}
        self._of_service_elsewhere = _of_service(self._elsewhere[Kind.SYN])
        self._newcomers = self._take_over(previous)
        self._newcomers.count = self._count_syn
        self._put_off, self._meet = self._newcomers.put_off, self._newcomers.meet
        self._heavy = HeavyHitters(_WATCHED, _WATCH_FOR)
        self.shed: int = previous.shed if previous else 0
        self._exhausting = {meter.rule: meter.exhaust for meter in self.meters}
        self._dropping = {
            rule.name: Decision(Verdict.DROP, REASONS[rule.measure], rule.name)
            for rule in ruleset.rules
        }

    def decide(self, packet: Packet | Malformed, now: int) -> Decision:
        """Return what is to be done about a packet that arrives at `now` (nanoseconds)."""
        if type(packet) is not Packet:
            return _UNREADABLE
        proven, large = None, self._large
        crossed: Rule | None = None
        # By indices, see `Packet`: flags, state; here and below 0 is the source, 3 the port.
        if packet[6] & HANDSHAKE == SYN and not packet[9] & _NO_USUAL_SYN:
            checks, at_once = self._syn_by_port.get(packet[3], self._syn_elsewhere)
            if at_once is not None and self._put_off(packet, now):
                checks = at_once
            calm = PASS
        else:
            kind = kind_of(packet)
            if packet.state & OUTBOUND:
                packet = packet.turned()
            self._meet(packet, counts_as_met=kind is Kind.SYN)
            checks = self._by_port[kind].get(packet.destination_port, self._elsewhere[kind])
            if packet.state & _OF_PROVEN == _OF_PROVEN:
                proven = self._crossed_by_proof(packet, kind, now)
            if kind is Kind.SYN and packet.state & KNOWN:
                # The kernel's own SYN, for a client that has returned a SYN cookie.
                kind = Kind.HANDSHAKE
                checks += self._by_port[kind].get(packet.destination_port, self._elsewhere[kind])
            elif kind in _OF_NO_CONNECTION and packet.state & OVER:
                crossed = _blocking(checks)
            calm = PASS_AND_TRUST if kind is Kind.HANDSHAKE else PASS
        for check, rule in checks:
            if (
                check(packet, now)
                and (crossed is None or rule.action > crossed.action)
                and not (large and large.spares(rule, packet.source, now))
            ):
                crossed = rule
        if proven is not None:
            return self._object(packet, proven, calm, now, proven=True)
        return calm if crossed is None else self._object(packet, crossed, calm, now)

    def _crossed_by_proof(self, packet: Packet, kind: Kind, now: int) -> Rule | None:
        """Count a packet of a proven connection once more, apart; return a rule that may ban."""
        crossed, large = None, self._large
        # With a SYN cookie it is a SYN and a completed handshake in one.
        for each in (Kind.SYN, Kind.HANDSHAKE) if kind is Kind.SYN else (kind,):
            port = packet.destination_port
            for check, rule in self._proofs_by_port[each].get(port, self._proofs_elsewhere[each]):
                if (
                    check(packet, now)
                    and crossed is None
                    and not (large and large.spares(rule, packet.source, now, apart=True))
                ):
                    crossed = rule
        return crossed

    def at(self, level: Level) -> Decide:
        """Return `decide`, or what leaves packets unjudged at a level of overload.

        What is left undone at which level is told in `rstguard.engine.shedding`.
        """
        if level is Level.NOTHING:
            return self.decide
        ruleset, count, knows = self.ruleset, self._heavy.add, self._newcomers.knows
        shift4, shift6 = 32 - ruleset.source_ipv4, 128 - ruleset.source_ipv6
        all_pass = ruleset.fail_open and not any(rule.limits_service for rule in ruleset.rules)
        all_syns, newcomers = level >= Level.SYNS, level >= Level.NEWCOMERS
        # What the kernel has not found too many may pass, if it counts for every rule.
        judged = _judged_in_any_case(ruleset)

        def decide_under_load(packet: Packet | Malformed, now: int) -> Decision:
            if type(packet) is not Packet:
                return _UNREADABLE
            if packet[6] & HANDSHAKE == SYN and not packet[9] & _NO_UNPROVEN_SYN:
                source = packet[
                    0
                ]  # `source_key` is spelled out: this runs for every SYN of a flood
                sent = count(source >> (shift6 if source >= V6 else shift4))
                if sent > _TOO_HEAVY and not ruleset.scope.exempts(source):
                    return self._shun_heavy(packet, now)
                if all_syns or (newcomers and not knows(packet)):
                    self.shed += 1
                    return PASS if all_pass else self._leave_undone(packet, now)
            elif (
                (packet.state & STRAY or BAD_FLAGS[packet.flags])
                and not packet.state & OVER
                and kind_of(packet) not in judged
            ):
                self.shed += 1
                return PASS
            return self.decide(packet, now)

        return decide_under_load

    def _leave_undone(self, packet: Packet, now: int) -> Decision:
        """Let a SYN pass or not, unjudged but for what its service may get at all."""
        for check, rule in self._of_service.get(packet[3], self._of_service_elsewhere):
            if check(packet, now) and not self.ruleset.scope.exempts(packet.source):
                return self._dropping[rule.name]
        if self.ruleset.fail_open or self.ruleset.scope.exempts(packet.source):
            return PASS
        return _OVERLOADED

    def _shun_heavy(self, packet: Packet, now: int) -> Decision:
        """Shun a source for as long as its rest of the SYNs waits in the queue, and some more."""
        scope = self.ruleset
        source = prefix_of(packet.source, scope.source_ipv4, scope.source_ipv6)
        effects = self._sources.shun(source, OVERLOAD, Reason.OVERLOAD, now)
        return Decision(Verdict.DROP, Reason.OVERLOAD, OVERLOAD, effects=effects)

    def _object(
        self, packet: Packet, rule: Rule, calm: Decision, now: int, proven: bool = False
    ) -> Decision:
        """Turn the most severe rule that was hit into a decision.

        `proven` tells that packets of proven connections alone have crossed it.
        """
        if self.ruleset.scope.trusts(packet.source):
            return calm if calm.trust else _TRUSTED
        reason = REASONS[rule.measure]
        outbound = bool(packet.state & OUTBOUND)
        if rule.action >= Action.RESET and self.ruleset.scope.exempts(packet.source):
            # Its address may be forged, so what is too fast does not pass either.
            too_fast = rule.measure in RATE_MEASURES and kind_of(packet) is Kind.SYN
            return self._dropping[rule.name] if too_fast else calm if calm.trust else _PROTECTED
        if rule.action is Action.DROP and not outbound:
            return self._dropping[rule.name]
        if rule.action is Action.BAN:
            if rule.measure is Measure.STALLED:  # a matter of one connection, nothing to count
                proven = bool(packet.state & PROVEN)
            if not proven and rule.measure in _OF_HANDSHAKES and packet.state & PROVEN:
                # Too few yet to prove the address: a shun would keep away those that do.
                if kind_of(packet) is Kind.HANDSHAKE:
                    return self._reset(packet, rule)
                return Decision(Verdict.ACCEPT, reason, rule.name)
            effects = self._sources.block(self.blocked(packet, rule), proven, rule, now)
            self._exhaust(packet, rule, effects, now)
            # The server's own RST to a source now banned still frees the other end.
            return Decision(
                Verdict.ACCEPT if outbound else Verdict.DROP, reason, rule.name, effects=effects
            )
        if rule.action is Action.RESET and not outbound:
            return self._reset(packet, rule)
        return Decision(Verdict.ACCEPT, reason, rule.name, trust=calm.trust)

    def _exhaust(
        self, packet: Packet, rule: Rule, effects: tuple[Ban | Shun, ...], now: int
    ) -> None:
        """A shunned source that goes on comes back with its plain rate, not with a new burst."""
        exhaust = self._exhausting.get(rule)
        if exhaust is not None and effects and isinstance(effects[0], Shun):
            exhaust(packet, now + effects[0].duration, now)

    def _reset(self, packet: Packet, rule: Rule) -> Decision:
        """A SYN is refused; a segment of no connection is dropped, as there is none to reset."""
        kind, reason = kind_of(packet), REASONS[rule.measure]
        if kind in _OF_NO_CONNECTION:
            return self._dropping[rule.name]
        known = kind is not Kind.SYN
        effect = Condemn(Tuple(*packet[:4]), rule.ends, rule.name, reason)
        effects = (effect,) if known else ()
        return Decision(Verdict.RESET, reason, rule.name, ends=rule.ends, effects=effects)

    def explain(self, source: int, now: int) -> dict[str, float]:
        """Return how much of each rule's limit a source (a tagged address) has used, 1 is all.

        Rules that keep no such number, or count per target, are left out.
        """
        return {
            meter.rule.name: meter.used(source, now)
            for meter in self.meters
            if meter.used and not meter.rule.of_target
        }

    def nearest(self, most: int, now: int) -> Iterator[list[Near]]:
        """Yield who has used the most of some rule's limit, so many at a time at most.

        Each step takes a millisecond or two if the tables are full; packets may be judged between
        two.  What comes is to be put together by `rstguard.engine.nearest.merged`.
        """
        for meter in self.meters:
            if meter.nearest is None:
                continue
            for found in meter.nearest(most + MOST_TRUSTED, now):
                yield list(told(found, meter.rule, self.ruleset.scope))

    def note_productive(self, percents: Mapping[int, int]) -> None:
        """Take note of how productive sources are (`rstguard.engine.lenient.Standings`)."""
        self._percents.clear()
        self._percents.update(percents)

    def note_large(self, sources: Iterable[Prefix]) -> None:
        """Take note of which sources are large and spared (`rstguard.engine.large`)."""
        self._large.note(sources)

    def restore(self, offences: Iterable[Offence], now: int) -> None:
        """Remember offences of an earlier time, so that bans go on growing longer."""
        self._sources.restore(offences, now)

    def blocked(self, packet: Packet, rule: Rule) -> Prefix:
        """Return whom a block by `rule` is laid on: the prefix it counts, else the one source."""
        if rule.of_target:
            return prefix_of(packet.source, self.ruleset.source_ipv4, self.ruleset.source_ipv6)
        return prefix_of(packet.source, rule.ipv4_length, rule.ipv6_length)

    def _take_over(self, previous: Engine | None) -> Newcomers:
        """Keep who was met; if a source is now of another width, that is forgotten."""
        rules = [meter.rule for meter in self.meters if not meter.rule.of_target]
        lengths = (
            min((rule.ipv4_length for rule in rules), default=32),
            min((rule.ipv6_length for rule in rules), default=128),
        )
        if previous and previous._newcomers.lengths == lengths:
            return previous._newcomers
        return Newcomers(*lengths)

    def _count_syn(self, packet: Packet, now: int) -> None:
        """Count a SYN that was put off, by all rules but those that counted it at once."""
        checks, at_once = self._syn_by_port.get(packet[3], self._syn_elsewhere)
        for check, rule in checks if at_once is not None else ():
            if not crossed_by_one(rule):
                check(packet, now)

    def _checks_by_port(self, kind: Kind, proofs: bool = False) -> dict[int, Checks]:
        named = {port for meter in self.meters for port in meter.rule.ports or ()}
        return {port: self._checks(kind, port, proofs) for port in named}

    def _checks(self, kind: Kind, port: int | None, proofs: bool = False) -> Checks:
        found = ((meter.proofs if proofs else meter.checks, meter.rule) for meter in self.meters)
        return tuple(
            (checks[kind], rule)
            for checks, rule in found
            if kind in checks and (rule.ports is None or port in rule.ports)
        )


def _at_once(checks: Checks) -> tuple[Checks, Checks | None]:
    """Return the checks of a SYN, and those that a newcomer's must pass too; None: all of them."""
    at_once = tuple((check, rule) for check, rule in checks if crossed_by_one(rule))
    return checks, None if len(at_once) == len(checks) else at_once


def _of_service(checks: Checks) -> Checks:
    """Return those of the checks of a SYN that limit a whole service."""
    return tuple((check, rule) for check, rule in checks if rule.limits_service)


def _judged_in_any_case(ruleset: RuleSet) -> frozenset[Kind]:
    """Return the kinds of segments of no connection that some rule limits and the kernel cannot."""
    return frozenset(
        kind
        for kind, measure in _OF_NO_CONNECTION.items()
        if ruleset.kept_by_kernel(measure) != ruleset.keeping_out(measure)
    )


def _blocking(checks: Checks) -> Rule | None:
    """Return the rule that a segment of no connection has crossed by the kernel's count.

    The kernel does not say which, so it is the one that blocks the narrowest prefix.
    """
    rules = (rule for _, rule in checks if rule.action is Action.BAN)
    return max(rules, key=lambda rule: (rule.ipv4_length, rule.ipv6_length), default=None)


def kind_of(packet: Packet) -> Kind:
    """Return the kind of any packet; rules are looked up by it."""
    flags, state = packet.flags, packet.state
    if BAD_FLAGS[flags]:
        return Kind.BAD
    if flags & HANDSHAKE == SYN:
        return Kind.SYN
    if state & STRAY:
        return Kind.STRAY
    if flags & (FIN | RST):
        return Kind.GIVEN_UP if state & OVER else Kind.CLOSE
    return Kind.HANDSHAKE if state & KNOWN else Kind.OTHER
