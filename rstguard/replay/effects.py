"""What is ordered takes effect in a replay, and what is lost by it is counted."""

from __future__ import annotations

from rstguard.engine.address import Prefix, prefix_of
from rstguard.engine.capping import BanCap
from rstguard.engine.flow import LIVE
from rstguard.engine.limiter import Memory
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SECOND, Rule, RuleSet
from rstguard.engine.verdict import Action, Ban, Condemn, Decision, Shun, Verdict
from rstguard.engine.wire import Packet
from rstguard.replay.connections import MOST, Connection, name_of
from rstguard.replay.hits import Hit, Hits
from rstguard.replay.way import Blocks, Way

_KINDS = {Verdict.DROP: "drop", Verdict.RESET: "refuse", Verdict.ACCEPT: "observe"}

_SPOKEN = 3
"""Packets of each end of a connection on which it has said something."""

_MOST_GOOD = 1 << 18
"""Addresses that are remembered as productive."""


class Effects:
    """Who is blocked, which connections are held, and what became of them.

    `held` are the guarded, proven and live connections, by source and by their own number.
    """

    def __init__(self, ruleset: RuleSet, way: Way) -> None:
        self.ruleset = ruleset
        self.hits = Hits()
        self.bans, self.shuns = Blocks(), Blocks()
        self.held: dict[int, dict[int, Connection]] = {}
        self._over: dict[int, Connection] = {}
        """Those that are over and that the kernel's table still shows, the longest over first."""
        self._shows_over = ruleset.lenient or ruleset.looks_for_pressure
        self._way = way
        self._actions = {rule.name: rule.action for rule in ruleset.rules}
        self._productive: Memory[int] = Memory()
        self._good: set[int] = set()
        self._cap = BanCap(60 * SECOND)
        self.capped: dict[str, int] = {}
        """The rules that banned in more networks in a minute than the policy allows, and when."""
        self._widths = {
            (rule.ipv4_length, rule.ipv6_length)
            for rule in ruleset.rules
            if rule.action is Action.BAN
        } | {(ruleset.source_ipv4, ruleset.source_ipv6)}

    def carry_out(
        self, decision: Decision, packet: Packet, connection: Connection | None, now: int
    ) -> Hit | None:
        """Note what was decided, and let it take effect if the policy enforces.

        Returns what the packet does not arrive for, or None if it does.
        """
        known = False
        hit: Hit | None = None
        for effect in decision.effects:
            if isinstance(effect, Condemn):
                known = True
            else:
                hit = self.block(effect, now)
        source = packet.source if connection is None else connection.source
        if hit is None:
            hit = self._hit(decision, known, source, connection, now)
        if hit is None or not self.ruleset.enforce or decision.verdict is Verdict.ACCEPT:
            return None
        ends = known and connection is not None and connection.hit is None
        self.hits.lost(hit, packets=1, connections=int(ends))
        if ends and connection is not None:
            connection.hit = hit
            self.let_go(connection)
        return hit

    def _hit(
        self, decision: Decision, known: bool, source: int, connection: Connection | None, now: int
    ) -> Hit | None:
        rule, reason = decision.rule, decision.reason
        if known and connection is not None:
            return self.hits.add("reset", name_of(connection.key), rule, reason, now)
        if self._actions.get(rule) is Action.BAN:  # it was ordered a moment ago
            return self.bans.find(source, now) or self.shuns.find(source, now)
        return self.hits.add(_KINDS[decision.verdict], self.source_of(source), rule, reason, now)

    def source_of(self, address: int) -> Prefix:
        """Return the source that an address belongs to."""
        return prefix_of(address, self.ruleset.source_ipv4, self.ruleset.source_ipv6)

    def block(self, effect: Ban | Shun, now: int) -> Hit:
        """Ban or shun a source."""
        bans = isinstance(effect, Ban)
        kind = "ban" if bans else "shun"
        hit = self.hits.add(kind, effect.source, effect.rule, effect.reason, now)
        hit.seconds = effect.duration // SECOND
        if bans:
            self._count_ban(effect, now)
        if hit.times == 1:
            hit.productive = self._productive.get(effect.source) or 0
        if self.ruleset.enforce:
            blocks = self.bans if bans else self.shuns
            blocks.add(effect.source, now + effect.duration, now, hit)
            if isinstance(effect, Ban) and not effect.keep_existing:
                self._end_all(effect.source, hit)
        return hit

    def _count_ban(self, ban: Ban | Shun, now: int) -> None:
        """Note when the guard itself would let a rule ban nobody for a while."""
        if self._cap.over(ban.rule, ban.source, self.ruleset.bans_per_minute, now):
            self.capped.setdefault(ban.rule, now)

    def _end_all(self, source: Prefix, hit: Hit) -> None:
        """A source that is banned is gone with all its connections."""
        key = self._way.source_key(source.network)
        if source == self.source_of(source.network):
            sources = [key] if key in self.held else []
        else:
            sources = [
                number
                for number, held in self.held.items()
                if any(source.covers(one.source) for one in held.values())
            ]
        for number in sources:
            for connection in list(self.held[number].values()):
                if source.covers(connection.source):
                    connection.hit = hit
                    self.hits.lost(hit, connections=1)
                    self.let_go(connection)

    @property
    def productive(self) -> set[int]:
        """Addresses that brought a connection to a good end, or hold one where both ends speak."""
        speaking = (
            one.source
            for held in self.held.values()
            for one in held.values()
            if one.client_packets >= _SPOKEN and one.server_packets >= _SPOKEN
        )
        return self._good.union(speaking)

    def hold(self, connection: Connection) -> None:
        """A connection has proved its client's address."""
        if connection.guarded:
            key = self._way.source_key(connection.source)
            self.held.setdefault(key, {})[connection.ident] = connection

    def let_go(self, connection: Connection) -> None:
        """A connection is over, or as good as that."""
        connection.swift = False
        key = self._way.source_key(connection.source)
        held = self.held.get(key)
        if held is None or held.pop(connection.ident, None) is None:
            return
        if not held:
            del self.held[key]
        if self._shows_over and connection.hit is None and connection.state not in LIVE:
            self._over[connection.ident] = connection
            if len(self._over) > MOST:
                del self._over[next(iter(self._over))]
        if connection.productive and connection.hit is None:
            if len(self._good) < _MOST_GOOD:
                self._good.add(connection.source)
            for width in self._widths:
                source = prefix_of(connection.source, *width)
                self._productive.put(source, (self._productive.get(source) or 0) + 1)

    @property
    def shows_any(self) -> bool:
        """Whether `shown` may have any."""
        return bool(self.held or self._over)

    def shown(self, now: int) -> list[Connection]:
        """Return what the kernel's table shows of guarded connections at `now`.

        Those that are over are among them where it matters how productive a source is, or how a
        service does; what has expired is let go.
        """
        every = [one for held in self.held.values() for one in held.values()]
        for connection in every:
            if connection.expired(now):
                self.let_go(connection)
        self._over = {ident: one for ident, one in self._over.items() if not one.expired(now)}
        return [one for one in every if not one.expired(now)] + list(self._over.values())

    def end(self, connection: Connection, rule: Rule, now: int) -> None:
        """A sweep rule objects to a connection."""
        name, reason = name_of(connection.key), REASONS[rule.measure]
        hit = self.hits.add("reset", name, rule.name, reason, now)
        if self.ruleset.enforce:
            connection.hit = hit
            self.hits.lost(hit, connections=1)
            self.let_go(connection)

    def observe(self, source: int, rule: Rule, now: int) -> None:
        """A sweep rule that only observes was hit."""
        reason = REASONS[rule.measure]
        self.hits.add("observe", self.source_of(source), rule.name, reason, now)
