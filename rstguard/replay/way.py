"""The way of a packet: what the kernel's rules for a policy would divert into the queue.

The model of `rstguard.kernel.chains`: which packets are in the policy's scope, which way they go,
and with which state bits (`rstguard.engine.wire`) the engine is given them.
"""

from __future__ import annotations

from dataclasses import replace

from rstguard.engine.address import Prefix, source_key
from rstguard.engine.limiter import Memory
from rstguard.engine.ruleset import SECOND, Divert, RuleSet
from rstguard.engine.wire import Packet
from rstguard.kernel.forgotten import GRACE_SECONDS, LOST_SECONDS
from rstguard.replay.hits import Hit

_SUSPECT = 600 * SECOND
"""How long (ns) a handshake proves nothing after an ACK that fitted nothing, as in the kernel."""
_SOURCES = 1 << 18
_MOST_BLOCKS = 1 << 16
"""Blocks of one width after which those that are over are taken out."""


def without_kernel(ruleset: RuleSet) -> RuleSet:
    """Return the policy with all rules left to the engine: the kernel's count is the engine's."""
    return replace(ruleset, rules=tuple(replace(rule, in_kernel=False) for rule in ruleset.rules))


class Way:
    """What a policy's rules in the kernel look at, precomputed."""

    def __init__(self, ruleset: RuleSet) -> None:
        self.ruleset = ruleset
        self.diverts = ruleset.diverts
        self._closing_ports = ruleset.ports_needing(Divert.CLOSE)
        self.handshakes = Divert.HANDSHAKE in self.diverts
        self.given_up = Divert.GIVEN_UP in self.diverts
        self.syns = Divert.SYN in self.diverts
        self.strays = Divert.STRAY in self.diverts
        self.bad_flags = Divert.BAD_FLAGS in self.diverts
        self.smallest = -1
        """Windows up to this size are looked at."""
        if Divert.SMALL_WINDOW in self.diverts:
            self.smallest = min(max(rule.window for rule in ruleset.rules), 0xFFFF)
        self._trusted = _shifted(ruleset.scope.trusted)
        self._targets = _shifted(ruleset.scope.destinations)
        self._ports = ruleset.scope.ports
        self._suspects: Memory[int] = Memory(_SOURCES)
        self._lost: Memory[int] = Memory(_SOURCES)
        self._grace: Memory[int] = Memory(_SOURCES)

    def sees_end(self, port: int) -> bool:
        """Tell whether some rule looks at how connections to a port end."""
        return self._closing_ports is None or port in self._closing_ports

    def trusts(self, source: int) -> bool:
        """Tell whether a client is on the trusted list."""
        for shift, network in self._trusted:  # noqa: SIM110 - this runs for every SYN
            if source >> shift == network:
                return True
        return False

    def protects(self, address: int, port: int) -> bool:
        """Tell whether a target is in the policy's scope."""
        if self._ports is not None and port not in self._ports:
            return False
        for shift, network in self._targets:
            if address >> shift == network:
                return True
        return not self._targets

    def guards(self, packet: Packet) -> bool:
        """Tell whether a client's SYN begins a connection that the policy guards."""
        there = self.protects(packet.destination, packet.destination_port)
        return there and not self.trusts(packet.source)

    def counts_stray(self, source: int, now: int) -> bool:
        """Take in a segment of no connection; tell whether it is counted.

        What a source sends shortly after its first one may go on with what a tracker has forgotten
        (`rstguard.kernel.forgotten`).
        """
        last = self._lost.get(source)
        if last is None or now - last >= LOST_SECONDS * SECOND:
            self._grace.put(source, now + GRACE_SECONDS * SECOND)
        self._lost.put(source, now)
        until = self._grace.get(source)
        return until is None or now >= until

    def inbound(self, packet: Packet) -> bool | None:
        """Tell whether a segment of no known connection goes to the protected side.

        None: neither end is protected.  If both could be, the lower port is the server's.
        """
        there = self.protects(packet.destination, packet.destination_port)
        here = self.protects(packet.source, packet.source_port)
        if there and here:
            return packet.destination_port <= packet.source_port
        return there if there or here else None

    def source_key(self, address: int) -> int:
        """Return the source that an address belongs to, as one integer."""
        return source_key(address, self.ruleset.source_ipv4, self.ruleset.source_ipv6)

    def suspect(self, source: int, now: int) -> None:
        """Note that an ACK in the name of a source fitted no connection."""
        self._suspects.put(self.source_key(source), now)

    def suspects(self, source: int, now: int) -> bool:
        """Tell whether one came lately."""
        last = self._suspects.get(self.source_key(source))
        return last is not None and now - last < _SUSPECT


class Blocks:
    """Blocked sources, each until a time, with the record of why.

    Like the kernel's sets it holds networks of any length.
    """

    def __init__(self) -> None:
        self._by_shift: dict[int, dict[int, tuple[int, Hit]]] = {}

    def add(self, source: Prefix, until: int, now: int, hit: Hit) -> None:
        """Block a source until a time (ns)."""
        table = self._by_shift.setdefault(source.shift, {})
        if len(table) >= _MOST_BLOCKS:
            for network in [network for network, block in table.items() if block[0] <= now]:
                del table[network]
        table[source.network >> source.shift] = until, hit

    def find(self, address: int, now: int) -> Hit | None:
        """Return why an address is blocked at `now`, or None if it is not."""
        for shift, table in self._by_shift.items():
            block = table.get(address >> shift)
            if block is not None and now < block[0]:
                return block[1]
        return None


def _shifted(prefixes: tuple[Prefix, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((prefix.shift, prefix.network >> prefix.shift) for prefix in prefixes)
