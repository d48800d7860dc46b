"""The replay: a capture goes the way of live traffic, in its own time.

A packet is diverted to the engine if the kernel's rules would divert it (`rstguard.replay.way`),
with what the connection tracker would know (`rstguard.replay.connections`).  What the engine orders
takes effect: packets of a blocked source, or of a connection that was reset, are counted as "would
not have arrived" and are not judged.  What a server still sends in the capture cannot be undone.

Differences from the live guard, besides those of the tracker: nothing is ever shed; a SYN budget is
left out (every SYN reaches the engine, none is answered with a cookie); half-open connections of a
blocked source end at once, not within a second; `protect.interfaces` is ignored; a client whose SYN
was dropped does not try again; the addresses that a live guard protects by itself are not known;
and a policy that bans too many a minute is not turned into an observing one (the report says so).
"""

from __future__ import annotations

from struct import Struct
from typing import Protocol

from rstguard.engine.engine import Engine
from rstguard.engine.flow import LIVE, Flow, TcpState
from rstguard.engine.large import spared
from rstguard.engine.ruleset import SECOND, Measure, RuleSet
from rstguard.engine.sweep import Judgement, Sweep
from rstguard.engine.verdict import Decision
from rstguard.engine.wire import (
    ACK,
    BAD_FLAGS,
    FIN,
    KNOWN,
    OUTBOUND,
    OVER,
    PROVEN,
    RST,
    STRAY,
    SYN,
    Malformed,
    Packet,
    parse,
)
from rstguard.replay.capture import Batch
from rstguard.replay.connections import MOST, Connection, Table, key_of, turned
from rstguard.replay.effects import Effects
from rstguard.replay.hits import Hit
from rstguard.replay.way import Way, without_kernel

BASE = 86_400 * SECOND
"""The replay's time at the first packet: like a machine that has been up for a day."""

_MOST_SWEEPS = 1000
"""Sweeps in one pause of the capture: a long pause is swept at wider intervals."""
_LATE = SECOND // 100
"""Captures of several processors are out of order by less than this (nanoseconds)."""
_HANDSHAKE_FLAGS = FIN | SYN | RST | ACK
_IPV4 = Struct(">2xH2xHxB2x12s8xBBH").unpack_from
_IPV6 = Struct(">4xH2x36s8xBBH").unpack_from


class Judge(Protocol):
    """What judges packets: the engine, or what learns limits."""

    def decide(self, packet: Packet | Malformed, now: int) -> Decision:
        """Return what is to be done about a packet."""


class Sweeping(Protocol):
    """What judges the connection table."""

    def judge(self, flows: list[Flow], now: int) -> Judgement:
        """Judge the guarded connections as they are at `now`."""


class Counts:
    """What a replay has seen so far."""

    __slots__ = (
        "answers",
        "in_scope",
        "judged",
        "older",
        "other",
        "packets",
        "sweeps",
        "unordered",
    )

    def __init__(self) -> None:
        self.packets = self.other = self.judged = self.sweeps = 0
        self.in_scope = self.answers = self.older = self.unordered = 0


class Replay:
    """Feeds captured packets to one policy's engine.

    Args:
        ruleset: the policy; it takes effect in the replay if it enforces.
        judge, sweeping: what judges instead of the policy's own engine.
        most: connections that are remembered.
    """

    def __init__(
        self,
        ruleset: RuleSet,
        judge: Judge | None = None,
        sweeping: Sweeping | None = None,
        most: int = MOST,
    ) -> None:
        self.ruleset = ruleset = without_kernel(ruleset)
        self.counts = Counts()
        self.start = 0
        """Capture time (ns since 1970) of the first packet."""
        self.now = 0
        """The replay's time: `BASE` at the first packet."""
        self._way = Way(ruleset)
        self._effects = Effects(ruleset, self._way)
        self.hits = self._effects.hits
        self._table = Table(most, self._way.guards, self._effects.let_go)
        self._judge: Judge = judge or Engine(ruleset)
        sweep = Sweep(ruleset)
        self._sweeping: Sweeping = sweeping or sweep
        self._looks = sweeping is not None or sweep.looks
        self._sweep_at = 0
        self._want_scale = any(rule.measure is Measure.STALLED for rule in ruleset.rules)

    @property
    def capped(self) -> dict[str, int]:
        """The rules that banned in more networks in a minute than the policy allows, and when."""
        return self._effects.capped

    @property
    def productive(self) -> set[int]:
        """Addresses that look productive up to now."""
        return self._effects.productive

    def source_key(self, address: int) -> int:
        """Return the source that an address belongs to, as one integer."""
        return self._way.source_key(address)

    def feed(self, batch: Batch) -> None:
        """Take packets in, in the order of the capture."""
        if not self.now and batch:
            self.start, self.now = batch[0][0], BASE
            self._sweep_at = BASE + self.ruleset.sweep_every
        shift, now, smallest = self.start - BASE, self.now, self._way.smallest
        of_client, of_server = self._table.clients.get, self._table.servers.get
        for time, data in batch:
            if time - shift < now:
                self.counts.unordered += now - time + shift > _LATE
            else:
                now = time - shift
                if now >= self._sweep_at:
                    self._sweep_until(now)
            if data[0] == 0x45 and len(data) >= 40:
                total, fragment, protocol, key, _, flags, window = _IPV4(data)
                if protocol != 6 or fragment & 0x1FFF:
                    continue
            elif data[0] >> 4 == 6 and len(data) >= 60 and data[6] == 6:
                total, key, _, flags, window = _IPV6(data)
                total += 40
            else:
                self._look(data, b"", now)
                continue
            if flags & 0x17 == 0x10:  # a plain ACK: most packets, and most of them end here
                connection = of_client(key)
                if connection is not None:
                    if connection.swift and window > smallest:
                        connection.last = now
                        connection.client_packets += 1
                        connection.client_bytes += total
                        continue
                else:
                    connection = of_server(key)
                    if connection is not None and connection.swift and connection.confirmed:
                        connection.last = now
                        connection.server_packets += 1
                        connection.server_bytes += total
                        continue
            self._look(data, key, now)
        self.now = now
        self.counts.packets += len(batch)

    def _look(self, data: bytes, key: bytes, now: int) -> None:
        """Judge a packet that may change more than counters."""
        packet = parse(data, 0, self._want_scale)
        if type(packet) is Malformed:
            self.counts.other += 1
            return
        assert type(packet) is Packet
        key = key or key_of(packet)
        if packet[6] & _HANDSHAKE_FLAGS == SYN:
            self._syn(packet, key, now, len_of(data))
            return
        connection, from_client = self._table.find(key, now)
        if connection is None:
            self._unknown(packet, key, now)
        elif connection.hit is not None:
            if from_client:
                self.hits.lost(connection.hit, packets=1)
        elif BAD_FLAGS[packet.flags] or not connection.advance(packet, from_client):
            if from_client and connection.guarded:
                self._invalid(packet, now, self._way.counts_stray(packet.source, now))
        else:
            connection.last = now
            if from_client:
                connection.client_packets += 1
                connection.client_bytes += len_of(data)
                self._client(connection, packet, now)
            else:
                connection.server_packets += 1
                connection.server_bytes += len_of(data)
                self._server(connection, packet, now)
            self._settle(connection)

    def _syn(self, packet: Packet, key: bytes, now: int, size: int) -> None:
        """A SYN: blocked, of a connection that is there, or the first of a new one."""
        way, table, source = self._way, self._table, packet.source
        hit: Hit | None = None
        guarded = way.guards(packet)
        if guarded:
            self.counts.in_scope += 1
            hit = self._effects.bans.find(source, now) or self._effects.shuns.find(source, now)
        connection = table.clients.get(key)
        if connection is not None and connection.begins_anew(now):
            table.forget(connection)
            connection = None
        if connection is not None:
            if hit is None and connection.advance(packet, from_client=True):
                connection.last = now
                connection.client_packets += 1
                connection.client_bytes += size
            begins = False
        else:
            begins = table.open(key, packet, now, size, hit)
        if hit is not None:
            # A blocked source's SYN: the connection never is, nor what the capture shows of it.
            self.hits.lost(hit, packets=1, connections=int(begins))
        elif guarded and way.syns:
            decision = self._judged(packet, 0, now)
            if decision.rule:
                hit = self._effects.carry_out(decision, packet, connection, now)
            if hit is not None and begins:
                self.hits.lost(hit, connections=1)
                table.refuse(key, hit)

    def _unknown(self, packet: Packet, key: bytes, now: int) -> None:
        """A segment of no connection that the tracker knows."""
        way = self._way
        inbound = way.inbound(packet)
        if inbound is None:
            return
        if not inbound:
            if packet.flags & (ACK | SYN | RST) == ACK:
                self._adopt(packet, key, now)
            return
        if way.trusts(packet.source):
            return
        hit = self._effects.bans.find(packet.source, now)
        if hit is not None:
            self.hits.lost(hit, packets=1)
            return
        counted = way.counts_stray(packet.source, now)
        if (
            packet.flags & SYN
            or BAD_FLAGS[packet.flags]
            or not self._table.doubtful(key, packet.source)
        ):
            self._invalid(packet, now, counted)

    def _adopt(self, packet: Packet, key: bytes, now: int) -> None:
        """The protected side speaks on a connection that is older than the capture."""
        connection = self._table.adopt(turned(key), packet, now)
        self.counts.older += 1
        connection.guarded = not self._way.trusts(connection.source)
        connection.proven = True
        connection.server_packets = 1
        connection.confirmed = packet.payload_length > 0
        self._effects.hold(connection)
        self._settle(connection)

    def _invalid(self, packet: Packet, now: int, counted: bool) -> None:
        """What the tracker calls INVALID is diverted if a rule asks for it."""
        way = self._way
        if packet.flags & _HANDSHAKE_FLAGS == ACK:
            way.suspect(packet.source, now)
        impossible = way.bad_flags and BAD_FLAGS[packet.flags]
        if impossible or (way.strays and counted):
            self._decide(packet, STRAY if way.strays else 0, None, now)

    def _server(self, connection: Connection, packet: Packet, now: int) -> None:
        self.counts.answers += 1
        if packet.payload_length and connection.proven:
            connection.confirmed = True
        if packet.flags & RST and self._way.given_up and connection.begins:
            self._decide(packet, KNOWN | PROVEN | OUTBOUND | OVER, connection, now)
            return
        proven = connection.likely or connection.confirmed or not self.ruleset.bans
        closes = packet.flags & RST and connection.guarded and connection.proven and proven
        if closes and self._way.sees_end(packet.source_port):
            self._decide(packet, KNOWN | PROVEN | OUTBOUND, connection, now)

    def _client(self, connection: Connection, packet: Packet, now: int) -> None:
        """A client's segment, in the order of the kernel's rules."""
        way, flags = self._way, packet.flags
        if not connection.guarded:
            return
        if flags & RST and way.given_up and connection.begins:
            self._decide(packet, OVER, connection, now)
            return
        closes = flags & (FIN | RST) and connection.proven
        if closes and way.sees_end(packet.destination_port):
            real = connection.likely or connection.confirmed
            self._decide(packet, KNOWN | PROVEN * real, connection, now)
            return
        plain = flags & _HANDSHAKE_FLAGS == ACK
        if plain and connection.proven and packet.window <= way.smallest:
            self._decide(packet, PROVEN * connection.confirmed, connection, now)
            return
        if connection.proven and (connection.trusted or not way.handshakes):
            return
        hit = self._effects.bans.find(packet.source, now)
        if hit is None and not connection.proven:
            hit = self._effects.shuns.find(packet.source, now)
        if hit is not None:
            connection.hit = hit
            self.hits.lost(hit, packets=1, connections=1)
        elif plain:
            self._first_ack(connection, packet, now)

    def _first_ack(self, connection: Connection, packet: Packet, now: int) -> None:
        """The client's ACK fits the SYN-ACK: its address is probably real."""
        if not connection.proven:
            connection.proven = True
            connection.likely = not self._way.suspects(packet.source, now)
            self._effects.hold(connection)
        if not self._way.handshakes:
            return
        if connection.client_packets >= self.ruleset.inspect_packets + 2:
            connection.trusted = True
            return
        state = KNOWN | PROVEN * (connection.likely or connection.confirmed)
        decision = self._decide(packet, state, connection, now)
        connection.trusted = decision.trust

    def _judged(self, packet: Packet, state: int, now: int) -> Decision:
        self.counts.judged += 1
        return self._judge.decide(packet._replace(state=state) if state else packet, now)

    def _decide(
        self, packet: Packet, state: int, connection: Connection | None, now: int
    ) -> Decision:
        """Have a diverted packet judged, and do what is decided."""
        decision = self._judged(packet, state, now)
        if decision.rule:
            self._effects.carry_out(decision, packet, connection, now)
        return decision

    def _settle(self, connection: Connection) -> None:
        """Note whether the next plain ACK can be passed over, and what has come to its end."""
        state = connection.state
        if connection.hit is not None:
            connection.swift = False
            return
        if state == TcpState.ESTABLISHED:
            settled = connection.trusted or not self._way.handshakes
            connection.swift = not connection.guarded or (connection.proven and settled)
            return
        connection.swift = False
        if state not in LIVE:
            self._effects.let_go(connection)

    def _sweep_until(self, now: int) -> None:
        """Sweep as often as the guard would have since the packet before."""
        step = max(self.ruleset.sweep_every, (now - self._sweep_at) // _MOST_SWEEPS)
        while self._sweep_at <= now:
            if self._looks and self._effects.shows_any:
                self._sweep(self._sweep_at)
            self._sweep_at += step

    def _sweep(self, now: int) -> None:
        self.counts.sweeps += 1
        shown = {one.ident: one for one in self._effects.shown(now)}
        judgement = self._sweeping.judge(
            [one.flow(now, self.ruleset.labels) for one in shown.values()], now
        )
        if isinstance(self._sweeping, Sweep) and isinstance(self._judge, Engine):
            self._judge.note_productive(self._sweeping.standings.percents())
            self._judge.note_large(spared(self._sweeping.found_large(now)))
        for flow, rule in judgement.observed:
            self._effects.observe(flow.original.source, rule, now)
        for flow, rule in judgement.condemned:
            self._effects.end(shown[flow.ident], rule, now)
        for effect in judgement.blocks:
            self._effects.block(effect, now)


def len_of(data: bytes) -> int:
    """Return the length of an IP packet, as its header tells it (bytes)."""
    if data[0] >> 4 == 6:
        return 40 + (data[4] << 8 | data[5])
    return data[2] << 8 | data[3]
