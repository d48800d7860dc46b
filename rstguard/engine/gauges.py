"""How much of each rule's measure every source shows: what limits are learned from.

A gauge stands beside a rule's meter, or in its place, and is given the same packets and flows, but
has no limit: it keeps the most that each source has ever shown.  Every table is bounded.  As in
`rstguard.engine.newcomers`, who was met once waits apart from those who come again, so that a flood
of forged sources displaces nobody whose events are being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from rstguard.engine.address import is_v6
from rstguard.engine.checks import Kind
from rstguard.engine.engine import kind_of
from rstguard.engine.flow import LIVE, Flow, Tuple
from rstguard.engine.handshakes import is_same_handshake, number_of
from rstguard.engine.keys import flow_key, flow_key_function, key_function
from rstguard.engine.limiter import Distinct, Memory
from rstguard.engine.pace import small_packets
from rstguard.engine.ruleset import SECOND, SWEEP_MEASURES, Measure, Per, Rule, RuleSet
from rstguard.engine.sweep import Judgement
from rstguard.engine.verdict import PASS, PASS_AND_TRUST, Decision
from rstguard.engine.wire import KNOWN, OUTBOUND, RST, Malformed, Packet

LEARNED = frozenset(Measure) - {Measure.STALLED, Measure.REFUSED_PORTS, Measure.UNANSWERED}
"""Measures that there is a gauge for."""
LARGEST_COUNT = 4096
"""Different targets that are told apart, of one source: no rule may allow more."""
SOURCES = 1 << 17
"""Sources whose most is kept, of each rule."""

_PARTS = 8
_NOTHING = Judgement((), (), ())


class _Targets(Distinct):
    """How many different targets each key tried lately; old ones are let go at once."""

    __slots__ = ()

    def knows(self, key: int) -> bool:
        """Tell whether targets of a key are kept."""
        return key in self._young or key in self._old

    def tried(self, key: int, target: int, now: int) -> int:
        """Note that `key` tried `target`; return how many different ones count now."""
        self.over(key, target, now)
        held = self._young[key]
        return 1 if isinstance(held, tuple) else len(held)

    def _tried_more(self, tried: dict[int, int], target: int, now: int) -> bool:
        before, horizon = len(tried), now - self._within
        tried.pop(target, None)
        tried[target] = now
        while len(tried) > self._limit or tried[next(iter(tried))] <= horizon:
            del tried[next(iter(tried))]
        self._stored += len(tried) - before
        return False


class Gauge:
    """The most that each source has shown of a rule's measure.

    A rate is what came in its period (seen in eighths of it, so up to an eighth too high); `slow`
    keeps the least bytes a second of an old connection; times are nanoseconds.  When there are more
    than `sources`, the half that has shown least makes room, and is counted in `left_out`.
    """

    def __init__(self, rule: Rule, sources: int = SOURCES) -> None:
        self.rule = rule
        self.key = key_function(rule)
        self.least = rule.measure is Measure.SLOW
        self.shown: dict[int, int] = {}
        self.left_out = 0
        self._sources = sources
        self._once: Memory[tuple[int, int]] = Memory(sources // 4)
        self._windows: Memory[list[int]] = Memory(sources // 4)
        self._targets = _Targets(LARGEST_COUNT, rule.within, sources // 2)
        self._flows: Memory[int] = Memory()
        self._handshakes: Memory[tuple[int, int]] = Memory()
        self._part = max(1, rule.period // _PARTS)

    def show(self, key: int, amount: int) -> None:
        """Note that a source has shown so much."""
        known = self.shown.get(key)
        if known is None:
            if len(self.shown) >= self._sources:
                self._make_room()
            self.shown[key] = amount
        elif amount < known if self.least else amount > known:
            self.shown[key] = amount

    def _make_room(self) -> None:
        """Half of the sources go: a sort of them all would take ten times as long."""
        shown, wanted = self.shown, self._sources // 2
        self.left_out += wanted
        counts = Counter(shown.values())
        for amount in sorted(counts, reverse=self.least):
            if counts[amount] >= wanted:
                break
            wanted -= counts.pop(amount)
        going = [key for key, shown_by in shown.items() if shown_by not in counts]
        going += islice((key for key, shown_by in shown.items() if shown_by == amount), wanted)
        for key in going:
            del shown[key]

    def event(self, packet: Packet, now: int) -> None:
        """Count one event of a packet's source in the rule's period."""
        key, part = self.key(packet), now // self._part
        known = key in self.shown  # of a flood's sources hardly any is
        window = self._windows.get(key) if known else None
        if window is None:
            first = self._once.pop(key) if known else None
            if first is None:
                self._once.put(key, (0, part))
                self.show(key, 1)
                return
            window = [first[1], 1] + [0] * _PARTS
        ahead = min(part - window[0], _PARTS + 1)
        if ahead:
            window[1:] = [0] * ahead + window[1 : _PARTS + 2 - ahead]
            window[0] = part
        window[1] += 1
        self._windows.put(key, window)
        self.show(key, sum(window) - window[0])

    def target(self, packet: Packet, target: int, now: int) -> None:
        """Count the different targets of a packet's source."""
        key, targets = self.key(packet), self._targets
        known = key in self.shown
        if not known or not targets.knows(key):
            first = self._once.pop(key) if known else None
            if first is None:
                self._once.put(key, (target, now))
                self.show(key, 1)
                return
            targets.tried(key, *first)
        self.show(key, targets.tried(key, target, now))

    def port(self, packet: Packet, now: int) -> None:
        """A SYN: its port is a target."""
        self.target(packet, packet.destination_port, now)

    def host(self, packet: Packet, now: int) -> None:
        """A SYN: its destination is a target."""
        self.target(packet, packet.destination, now)

    def opened(self, packet: Packet, now: int) -> None:
        """A SYN: a handshake is pending."""
        self.target(packet, flow_key(packet), now)

    def completed(self, packet: Packet, now: int) -> None:
        """A first ACK: the handshake is no longer pending."""
        key, flow = self.key(packet), flow_key(packet)
        first = self._once.get(key)
        if first is not None and first[0] == flow:
            self._once.pop(key)
        self._targets.forget(key, flow)

    def handshake(self, packet: Packet, now: int) -> None:
        """A first ACK: the first data may follow it before its verdict."""
        flow = flow_key(packet)
        number, last = number_of(packet), self._handshakes.get(flow)
        if last is None or not is_same_handshake(number - last[0], now - last[1]):
            self._handshakes.put(flow, (number, now))
            self.event(packet, now)

    def reset(self, packet: Packet, now: int) -> None:
        """A closing segment: a RST counts."""
        if packet.flags & RST:
            self.event(packet, now)

    def begins(self, packet: Packet, now: int) -> None:
        """A SYN: a connection begins."""
        self._flows.put(flow_key(packet), now)

    def ends(self, packet: Packet, now: int) -> None:
        """A closing segment: the connection counts if it was short."""
        began = self._flows.pop(flow_key(packet))
        if began is not None and now - began < self.rule.shorter_than:
            self.event(packet, now)


Take = Callable[[Gauge, Packet, int], None]

_TAKES: dict[Measure, dict[Kind, Take]] = {
    Measure.SYN_RATE: {Kind.SYN: Gauge.event},
    Measure.CONNECTION_RATE: {Kind.HANDSHAKE: Gauge.handshake},
    Measure.HALF_OPEN: {
        Kind.SYN: Gauge.opened,
        Kind.HANDSHAKE: Gauge.completed,
        Kind.GIVEN_UP: Gauge.completed,
    },
    Measure.DISTINCT_PORTS: {Kind.SYN: Gauge.port},
    Measure.DISTINCT_HOSTS: {Kind.SYN: Gauge.host},
    Measure.BAD_FLAGS: {Kind.BAD: Gauge.event},
    Measure.OUT_OF_STATE: {Kind.STRAY: Gauge.event},
    Measure.RESET_RATE: {Kind.CLOSE: Gauge.reset},
    Measure.SHORT_CONNECTIONS: {Kind.SYN: Gauge.begins, Kind.CLOSE: Gauge.ends},
}


class _Last(NamedTuple):
    """What the last sweep saw of a connection: counters, and when it last spoke."""

    packets: int
    spoke: int
    bytes: int
    client_packets: int
    client_bytes: int


class _News(NamedTuple):
    """What came since: bytes, small packets of the client, and the silence before."""

    bytes: int
    small: int
    silence: int


class Gauges:
    """All gauges of a policy; can take the place of its engine and of its sweep.

    Args:
        ruleset: the policy.
        previous: whose gauges go on for the rules that are the same.
        sources: that are kept of each rule.
    """

    def __init__(
        self, ruleset: RuleSet, previous: Gauges | None = None, sources: int = SOURCES
    ) -> None:
        kept = {gauge.rule: gauge for gauge in previous.gauges} if previous else {}
        rules = [replace(rule, in_kernel=False) for rule in ruleset.rules]
        self.gauges: tuple[Gauge, ...] = tuple(
            kept.get(rule) or Gauge(rule, sources) for rule in rules if is_learned(rule)
        )
        self._packets = {kind: self._takers(kind) for kind in Kind}
        self._flows = [g for g in self.gauges if g.rule.measure in SWEEP_MEASURES]
        self._seen: dict[Tuple, _Last] = previous._seen if previous else {}
        self._swept: int = previous._swept if previous else 0
        self._every = ruleset.sweep_every

    @property
    def left_out(self) -> int:
        """How often a source had to make room for others, all rules together."""
        return sum(gauge.left_out for gauge in self.gauges)

    def _takers(self, kind: Kind) -> list[tuple[Take, Gauge]]:
        return [
            (takes[kind], gauge)
            for gauge in self.gauges
            if kind in (takes := _TAKES.get(gauge.rule.measure, {}))
        ]

    def decide(self, packet: Packet | Malformed, now: int) -> Decision:
        """Measure a packet; it always passes."""
        if not isinstance(packet, Packet):
            return PASS
        kind = kind_of(packet)
        if packet.state & OUTBOUND:
            packet = packet.turned()
        self._take(packet, kind, now)
        if kind is Kind.SYN and packet.state & KNOWN:
            # The kernel's own SYN, for a client that has returned a SYN cookie.
            self._take(packet, Kind.HANDSHAKE, now)
        return PASS_AND_TRUST if kind is Kind.HANDSHAKE else PASS

    def _take(self, packet: Packet, kind: Kind, now: int) -> None:
        for take, gauge in self._packets[kind]:
            if _concerns(gauge.rule, packet):
                take(gauge, packet, now)

    def judge(self, flows: Iterable[Flow], now: int) -> Judgement:
        """Measure the connections as they are at `now`; nothing happens to them.

        A silence shows when it ends: whoever never speaks again may have been forgotten.
        """
        seen: dict[Tuple, _Last] = {}
        news: dict[Tuple, _News] = {}
        flows = [flow for flow in flows if flow.state in LIVE]
        elapsed = now - self._swept if self._swept else self._every
        for flow in flows:
            packets = flow.client_packets + flow.server_packets
            total = flow.client_bytes + flow.server_bytes
            # What is met for the first time moved its bytes since the last sweep, if it is so new.
            sent = flow.client_packets, flow.client_bytes
            before = (0, 0, 0) if 0 <= flow.age <= elapsed else (total, *sent)
            last = self._seen.get(flow.original)
            if last is None or packets < last.packets:
                last = _Last(packets, now, *before)
            silence = now - last.spoke if packets != last.packets else 0
            news[flow.original] = _news(last, flow, silence)
            spoke = last.spoke if packets == last.packets else now
            seen[flow.original] = _Last(packets, spoke, total, *sent)
        for gauge in self._flows:
            wanted = [flow for flow in flows if _concerns(gauge.rule, flow.original)]
            self._measure(gauge, wanted, news, elapsed)
        self._seen, self._swept = seen, now
        return _NOTHING

    def _measure(
        self, gauge: Gauge, flows: list[Flow], news: dict[Tuple, _News], elapsed: int
    ) -> None:
        key, measure = flow_key_function(gauge.rule), gauge.rule.measure
        if measure is Measure.CONNECTIONS:
            amounts = _sums((key(flow), 1) for flow in flows)
        elif measure in (Measure.BYTE_RATE, Measure.PACKET_RATE):
            amount_of = attrgetter("small" if measure is Measure.PACKET_RATE else "bytes")
            moved = [(key(flow), amount_of(news[flow.original])) for flow in flows]
            period = gauge.rule.period
            if gauge.rule.per is Per.CONNECTION:
                for source, amount in moved:
                    gauge.show(source, amount * period // elapsed)
                return
            amounts = {source: n * period // elapsed for source, n in _sums(moved).items() if n > 0}
        else:
            for flow in flows:
                amount = _of_connection(gauge.rule, flow, news[flow.original].silence)
                if amount is not None:
                    gauge.show(key(flow), amount)
            return
        for source, amount in amounts.items():
            gauge.show(source, amount)


def _news(last: _Last, flow: Flow, silence: int) -> _News:
    total = flow.client_bytes + flow.server_bytes - last.bytes
    sent = flow.client_bytes - last.client_bytes
    packets = flow.client_packets - last.client_packets
    v6 = is_v6(flow.original.source)
    return _News(total, small_packets(packets, sent, total - sent, v6), silence)


def is_learned(rule: Rule) -> bool:
    """Tell whether what honest sources show in calm tells a rule's limit."""
    return rule.measure in LEARNED and not rule.when_pressed


def _concerns(rule: Rule, of: Packet | Tuple) -> bool:
    if rule.ports is not None and of.destination_port not in rule.ports:
        return False
    return not rule.is_partial or rule.concerns(of.source, of.destination)


def _of_connection(rule: Rule, flow: Flow, silence: int) -> int | None:
    """Return what one connection shows of a measure, or None if it shows nothing."""
    if rule.measure is Measure.IDLE:
        return silence or None
    if rule.measure is Measure.AGE:
        return flow.age if flow.age > 0 else None
    if flow.age < rule.after or not flow.client_packets:
        return None
    counted = {"client": flow.client_bytes, "server": flow.server_bytes}
    return counted.get(rule.of, flow.client_bytes + flow.server_bytes) * SECOND // flow.age


def _sums(amounts: Iterable[tuple[int, int]]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for key, amount in amounts:
        sums[key] = sums.get(key, 0) + amount
    return sums
