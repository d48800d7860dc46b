"""How much of each rule's measure every source shows: what limits are learned from.

A gauge stands in the place of a rule's meter and is given the same packets and flows, but has no
limit: it keeps the most that each source has ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rstguard.engine.address import V6
from rstguard.engine.engine import kind_of
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.limiter import Memory
from rstguard.engine.rules import Kind, key_function
from rstguard.engine.ruleset import NEEDS, SECOND, Measure, Per, Rule, RuleSet
from rstguard.engine.sweep import Judgement
from rstguard.engine.verdict import PASS, PASS_AND_TRUST, Decision
from rstguard.engine.wire import OUTBOUND, RST, Malformed, Packet

LEARNED = frozenset(Measure) - {Measure.STALLED}
"""Measures that there is a gauge for."""
LARGEST_COUNT = 4096
"""Different targets that are told apart, of one source: no rule may allow more."""

_SOURCES = 1 << 17
_PARTS = 8
_NOTHING = Judgement((), (), ())


class Gauge:
    """The most that each source has shown of a rule's measure.

    A rate is what came in its period (seen in eighths of it, so up to an eighth too high); `slow`
    keeps the least bytes a second of an old connection; times are nanoseconds.  Sources that have
    shown one event only make room for others when there are too many.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.shown: dict[int, int] = {}
        self._windows: dict[int, list[int]] = {}
        self._targets: dict[int, dict[int, int]] = {}
        self._opened: Memory[int] = Memory()
        self._part = max(1, rule.period // _PARTS)
        self.key = key_function(rule)

    def show(self, key: int, amount: int) -> None:
        """Note that a source has shown so much."""
        known = self.shown.get(key)
        if known is None and not self._has_room():
            return
        if self.rule.measure is Measure.SLOW:
            self.shown[key] = amount if known is None else min(known, amount)
        elif known is None or amount > known:
            self.shown[key] = amount

    def _has_room(self) -> bool:
        if len(self.shown) < _SOURCES:
            return True
        for key in [key for key, amount in self.shown.items() if amount <= 1]:
            del self.shown[key]
            self._windows.pop(key, None)
            self._targets.pop(key, None)
        return len(self.shown) < _SOURCES

    def event(self, packet: Packet, now: int) -> None:
        """Count one event of a packet's source in the rule's period."""
        key, part = self.key(packet), now // self._part
        window = self._windows.get(key)
        if window is None:
            self.show(key, 1)
            if key in self.shown:
                self._windows[key] = [part, 1] + [0] * _PARTS
            return
        ahead = min(part - window[0], _PARTS + 1)
        if ahead:
            window[1:] = [0] * ahead + window[1 : _PARTS + 2 - ahead]
            window[0] = part
        window[1] += 1
        self.show(key, sum(window) - window[0])

    def target(self, packet: Packet, target: int, now: int) -> None:
        """Count the different targets of a packet's source."""
        key, within = self.key(packet), self.rule.within
        tried = self._targets.get(key)
        if tried is None:
            self.show(key, 1)
            if key in self.shown:
                self._targets[key] = {target: now}
            return
        tried.pop(target, None)
        tried[target] = now
        while now - tried[oldest := next(iter(tried))] >= within or len(tried) > LARGEST_COUNT:
            del tried[oldest]
        self.show(key, len(tried))

    def packet(self, packet: Packet, kind: Kind, now: int) -> None:
        """Take a packet of one of the kinds that the rule's meter counts."""
        measure = self.rule.measure
        if measure is Measure.DISTINCT_PORTS:
            self.target(packet, packet.destination_port, now)
        elif measure is Measure.DISTINCT_HOSTS:
            self.target(packet, packet.destination, now)
        elif measure is Measure.HALF_OPEN:
            if kind is Kind.SYN:
                self.target(packet, _flow(packet), now)
            else:
                self._targets.get(self.key(packet), {}).pop(_flow(packet), None)
        elif measure is Measure.SHORT_CONNECTIONS:
            self._short(packet, kind, now)
        elif measure is not Measure.RESET_RATE or packet.flags & RST:
            self.event(packet, now)

    def _short(self, packet: Packet, kind: Kind, now: int) -> None:
        if kind is Kind.SYN:
            self._opened.put(_flow(packet), now)
            return
        began = self._opened.pop(_flow(packet))
        if began is not None and now - began < self.rule.shorter_than:
            self.event(packet, now)


_KINDS: dict[Measure, tuple[Kind, ...]] = {
    Measure.SYN_RATE: (Kind.SYN,),
    Measure.CONNECTION_RATE: (Kind.HANDSHAKE,),
    Measure.HALF_OPEN: (Kind.SYN, Kind.HANDSHAKE),
    Measure.DISTINCT_PORTS: (Kind.SYN,),
    Measure.DISTINCT_HOSTS: (Kind.SYN,),
    Measure.BAD_FLAGS: (Kind.BAD,),
    Measure.OUT_OF_STATE: (Kind.STRAY,),
    Measure.RESET_RATE: (Kind.CLOSE,),
    Measure.SHORT_CONNECTIONS: (Kind.SYN, Kind.CLOSE),
}


class Gauges:
    """All gauges of a policy; takes the place of its engine and of its sweep in a replay."""

    def __init__(self, ruleset: RuleSet) -> None:
        self.gauges = tuple(Gauge(rule) for rule in ruleset.rules if rule.measure in LEARNED)
        self._packets = {
            kind: [g for g in self.gauges if kind in _KINDS.get(g.rule.measure, ())]
            for kind in Kind
        }
        self._flows = [g for g in self.gauges if g.rule.measure not in NEEDS]
        self._seen: dict[Tuple, tuple[int, int, int]] = {}
        self._swept, self._every = 0, ruleset.sweep_every

    def decide(self, packet: Packet | Malformed, now: int) -> Decision:
        """Measure a packet; it always passes."""
        if not isinstance(packet, Packet):
            return PASS
        kind = kind_of(packet)
        if packet.state & OUTBOUND:
            packet = packet.turned()
        for gauge in self._packets[kind]:
            ports = gauge.rule.ports
            if ports is None or packet.destination_port in ports:
                gauge.packet(packet, kind, now)
        return PASS_AND_TRUST if kind is Kind.HANDSHAKE else PASS

    def judge(self, flows: Iterable[Flow], now: int) -> Judgement:
        """Measure the connections as they are at `now`; nothing happens to them."""
        seen: dict[Tuple, tuple[int, int, int]] = {}
        news: dict[Tuple, tuple[int, int]] = {}
        flows = list(flows)
        elapsed = now - self._swept if self._swept else self._every
        for flow in flows:
            packets = flow.client_packets + flow.server_packets
            total = flow.client_bytes + flow.server_bytes
            last = self._seen.get(flow.original) or (packets, 0, now)
            silence = now - last[2] if packets != last[0] else 0
            news[flow.original] = total - last[1], silence
            seen[flow.original] = packets, total, now if packets != last[0] else last[2]
        for gauge in self._flows:
            ports = gauge.rule.ports
            wanted = [f for f in flows if ports is None or f.original.destination_port in ports]
            self._measure(gauge, wanted, news, elapsed)
        self._seen, self._swept = seen, now
        return _NOTHING

    def _measure(
        self, gauge: Gauge, flows: list[Flow], news: dict[Tuple, tuple[int, int]], elapsed: int
    ) -> None:
        key, measure = _of_flow(gauge.rule), gauge.rule.measure
        if measure is Measure.CONNECTIONS:
            established = (flow for flow in flows if flow.state == TcpState.ESTABLISHED)
            amounts = _sums((key(flow), 1) for flow in established)
        elif measure is Measure.BYTE_RATE:
            moved = _sums((key(flow), news[flow.original][0]) for flow in flows)
            amounts = {source: n * SECOND // elapsed for source, n in moved.items() if n}
        else:
            for flow in flows:
                amount = _of_connection(gauge.rule, flow, news[flow.original][1])
                if amount is not None:
                    gauge.show(key(flow), amount)
            return
        for source, amount in amounts.items():
            gauge.show(source, amount)


def _of_connection(rule: Rule, flow: Flow, silence: int) -> int | None:
    """Return what one connection shows of a measure, or None if it shows nothing."""
    if rule.measure is Measure.IDLE:
        return silence or None
    if rule.measure is Measure.AGE:
        return flow.age if flow.age > 0 else None
    if flow.state != TcpState.ESTABLISHED or flow.age < rule.after:
        return None
    counted = {"client": flow.client_bytes, "server": flow.server_bytes}
    return counted.get(rule.of, flow.client_bytes + flow.server_bytes) * SECOND // flow.age


def _sums(amounts: Iterable[tuple[int, int]]) -> dict[int, int]:
    sums: dict[int, int] = {}
    for key, amount in amounts:
        sums[key] = sums.get(key, 0) + amount
    return sums


def _of_flow(rule: Rule) -> Callable[[Flow], int]:
    """Return the function that says whom a rule counts a connection against."""
    if rule.per is Per.SERVICE:
        return lambda flow: flow.original.destination << 16 | flow.original.destination_port
    shift4, shift6 = 32 - rule.ipv4_length, 128 - rule.ipv6_length
    return lambda flow: flow.original.source >> (shift6 if flow.original.source >= V6 else shift4)


def _flow(packet: Packet) -> int:
    """Return a connection's name as one integer, as the engine does."""
    return ((packet[0] << 129 | packet[1]) << 16 | packet[2]) << 16 | packet[3]
