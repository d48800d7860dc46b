"""A calm gateway in simulated time: all kinds of clients, and the guard's own engine and sweep.

The segments go through `rstguard.replay.play.Replay`, as those of a capture: each is diverted to
the engine if the kernel's rules would, the connection table is swept as often as the policy says,
and what is ordered takes effect.  Whatever a rule does to anybody is a finding.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from rstguard.engine.address import V6, parse_address, parse_prefix
from rstguard.engine.engine import Engine
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.keys import key_of
from rstguard.engine.limits import Lenience, limit_of
from rstguard.engine.listed import Listed
from rstguard.engine.ruleset import RATE_MEASURES, SECOND, Measure, Rule, RuleSet
from rstguard.engine.sweep import Judgement, Sweep
from rstguard.engine.table import Table
from rstguard.replay.capture import Batch
from rstguard.replay.connections import TIMEOUTS
from rstguard.replay.hits import Hit
from rstguard.replay.play import BASE, Replay
from rstguard.replay.way import without_kernel
from tests.calm.conversation import Segment, Wire, conversation, drawn
from tests.calm.kinds import HOUR, KINDS, RESTARTED, RESTARTS, Kind, activity

_START: Final = 1_700_000_000 * SECOND
_AT_ONCE: Final = 4096
"""Segments that are given to the replay in one piece."""
_SETTLES: Final = 300.0
"""Seconds over which clients come at the beginning."""
_AWAY: Final = (300.0, 1800.0)
"""Seconds for which a client stays away that has no reason to come at this hour."""
_CLIENTS4: Final = parse_prefix("198.18.0.0/15")
"""Addresses of clients: those for measurements (RFC 2544), which no sample trusts."""
_CLIENTS6: Final = parse_prefix("3fff::/20")
"""The same of IPv6 (RFC 9637)."""
_SERVERS: Final = ("203.0.113.10", "2001:db8:1::10")
"""Where a policy does not say what it protects."""
_PORTS: Final = (32768, 61000)
"""A client's own ports, as Linux draws them."""
_RESTS: Final = 120.0
"""Seconds after its connection in which a port is not used again: TIME_WAIT, and slow closes."""


@dataclass(slots=True)
class Finding:
    """What one rule did to one kind of client, or to an address that several share.

    `when` is the time of day of the first time; `value` and `limit` say what was measured then.
    """

    who: str
    rule: str
    action: str
    when: str
    address: str
    value: str
    limit: str
    times: int = 0

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.when} {self.who} ({self.address}): rule {self.rule} does {self.action}, "
            f"{self.value} against {self.limit}; {self.times} times in all"
        )


class _Watched(Sweep):
    """The sweep, which remembers what it has condemned."""

    def __init__(self, ruleset: RuleSet) -> None:
        super().__init__(ruleset)
        self.condemned: dict[Tuple, Flow] = {}
        self.most = 0
        """Connections in one sweep, at most."""

    def judge(self, flows: Iterable[Flow] | Table, now: int) -> Judgement:
        """Judge the connections, as `Sweep` does."""
        table = flows if isinstance(flows, Table) else Listed(flows)
        judgement = super().judge(table, now)
        self.condemned = {one.flow.original: one.flow for one in judgement.condemned}
        self.most = max(self.most, len(table))
        return judgement


class Calm:
    """Clients of all kinds for some hours at one policy.

    Args:
        ruleset: the policy.
        begin: the hour of the day, 0 to 24.
        hours: how long, more than 0.
        every: how often the connection table is swept, in seconds; 0: as the policy says.
        seed: of all that is drawn.
        kinds: who comes.
    """

    def __init__(
        self,
        ruleset: RuleSet,
        begin: float,
        hours: float,
        every: float = 0,
        seed: int = 1,
        kinds: tuple[Kind, ...] = KINDS,
    ) -> None:
        if every:
            ruleset = replace(ruleset, sweep_every=int(every * SECOND))
        self.ruleset, self.begin, self.seconds = ruleset, begin, hours * HOUR
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.visited: Counter[str] = Counter()
        """Connections by kind."""
        judged = without_kernel(ruleset)
        self._engine, self.sweep = Engine(judged), _Watched(judged)
        self.replay = Replay(ruleset, self._engine, self.sweep)
        self.replay.hits.tell = self._tell
        self._rules = {rule.name: rule for rule in ruleset.rules}
        self._draw = random.Random(seed)
        self._servers = tuple(_server(ruleset, parse_address(text)) for text in _SERVERS)
        self._queue: list[tuple[float, int, bytes, Iterator[Segment]]] = []
        self._number = 0
        self._kind_of: dict[tuple[int, int], Kind] = {}
        """By the client's address and port."""
        self._holders: dict[int, set[str]] = {}
        self._next_port: dict[int, int] = {}
        self._used_until: dict[tuple[int, int], float] = {}
        self._move_in(kinds)

    def run(self) -> None:
        """Let all happen."""
        batch: Batch = []
        queue = self._queue
        while queue and queue[0][0] < self.seconds:
            at, number, segment, following = queue[0]
            if segment:
                batch.append((_START + int(at * SECOND), segment))
                if len(batch) >= _AT_ONCE:
                    self.replay.feed(batch)
                    batch = []
            found = next(following, None)
            if found is None:
                heapq.heappop(queue)
            else:
                heapq.heapreplace(queue, (found[0], number, found[1], following))
        self.replay.feed(batch)

    def hour(self, at: float) -> float:
        """Return the hour of the day after so many seconds."""
        return (self.begin + at / HOUR) % 24

    def _move_in(self, kinds: tuple[Kind, ...]) -> None:
        shared: dict[str, tuple[int, int]] = {}
        for kind in kinds:
            for number in range(kind.clients):
                if kind.shares:
                    address, server = shared.setdefault(kind.shares, self._address(v6=False))
                else:
                    address, server = self._address(v6=number % 3 == 2)
                self._holders.setdefault(address, set()).add(kind.shares or kind.name)
                self._follow(self._visits(kind, address, server))

    def _address(self, v6: bool) -> tuple[int, int]:
        """Return a client's address, no two in one wider network than rules count by, and
        its server's."""
        network = _CLIENTS6 if v6 else _CLIENTS4
        low = 64 if v6 else 4
        while True:
            value = network.network + (self._draw.getrandbits(network.shift - low) << low) + 1
            if all(value >> low != other >> low for other in self._holders):
                return value, self._servers[v6]

    def _follow(self, segments: Iterator[Segment]) -> None:
        first = next(segments, None)
        if first is not None:
            self._number += 1
            heapq.heappush(self._queue, (first[0], self._number, first[1], segments))

    def _visits(self, kind: Kind, address: int, server: int) -> Iterator[Segment]:
        """What one client does; its connections go their own ways."""
        draw = self._draw
        at = draw.uniform(0, max(_SETTLES, kind.pause[1]))
        while at < self.seconds:
            yield at, b""
            if kind.by_day and draw.random() > activity(self.hour(at)):
                at += drawn(draw, _AWAY)
                continue
            ends = [
                self._connect(kind, address, server, port, at + draw.uniform(0, 0.05))
                for port in kind.ports
                for _ in range(round(drawn(draw, kind.together)))
            ]
            at = max(ends) + drawn(draw, kind.pause)

    def _connect(self, kind: Kind, address: int, server: int, port: int, at: float) -> float:
        """Begin a connection, and return when it ends."""
        own = self._port(address, at)
        self._kind_of[address, own] = kind
        self.visited[kind.name] += 1
        until = at + drawn(self._draw, kind.lasts)
        restart = self._restart(at) if port in RESTARTED else until
        self._used_until[address, own] = min(until, restart) + _RESTS
        wire = Wire(address, server, own, port, self._draw)
        segments = conversation(
            kind, wire, self._draw, at, min(until, restart), cut=restart < until
        )
        self._follow(segments)
        return min(until, restart)

    def _port(self, address: int, at: float) -> int:
        """Return the next port of a client that no connection of its own bears."""
        own = self._next_port.get(address, _PORTS[0])
        while self._used_until.get((address, own), 0) > at:
            own = own + 1 if own + 1 < _PORTS[1] else _PORTS[0]
        self._next_port[address] = own + 1 if own + 1 < _PORTS[1] else _PORTS[0]
        return own

    def _restart(self, at: float) -> float:
        """Return when the web server is restarted the next time."""
        return at + HOUR * min((hour - self.hour(at)) % 24 for hour in RESTARTS)

    def _tell(self, hit: Hit, now: int) -> None:
        """A rule has done something to somebody."""
        rule = self._rules.get(hit.rule)
        who, key = self._who(hit), (self._who(hit), hit.rule, hit.kind)
        if key not in self.findings:
            measured = self._measured(hit, rule, now)
            when = self._time((now - BASE) / SECOND)
            address = str(hit.subject)
            self.findings[key] = Finding(who, hit.rule, hit.kind, when, address, *measured)
        self.findings[key].times += 1

    def _time(self, at: float) -> str:
        """Return the time of day after so many seconds: ``09:30:12``."""
        second = int(self.begin * HOUR + at) % 86400
        return f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"

    def _who(self, hit: Hit) -> str:
        """Return the kind of client whose connection it is, or whoever has the address."""
        subject = hit.subject
        if isinstance(subject, Tuple):
            kind = self._kind_of.get((subject.source, subject.source_port))
            return kind.name if kind else "?"
        names = {
            name
            for address, names in self._holders.items()
            if subject.covers(address)
            for name in names
        }
        return " and ".join(sorted(names)) or "?"

    def _measured(self, hit: Hit, rule: Rule | None, now: int) -> tuple[str, str]:
        """Return what was measured, and the rule's limit, in words."""
        if rule is None:
            return "?", "?"
        if isinstance(hit.subject, Tuple) and rule.measure in _OF_CONNECTION:
            return _of_connection(rule, self.sweep.condemned.get(hit.subject))
        source = hit.subject.source if isinstance(hit.subject, Tuple) else hit.subject.network
        shares = self._engine.explain(source, now) | self.sweep.explain(source)
        percents = self.sweep.standings.percents()
        times = limit_of(replace(rule, limit=1), key_of(rule, source), Lenience(percents, {}))
        most = times * (rule.burst if rule.measure in RATE_MEASURES else rule.limit)
        value = f"{shares[rule.name] * most:.0f}" if rule.name in shares else "more"
        return value, _limit(rule) + (f", {times} times as productive" if times > 1 else "")


_OF_CONNECTION: Final = frozenset(
    {Measure.IDLE, Measure.AGE, Measure.SLOW, Measure.STALLED, Measure.UNANSWERED}
)


def _of_connection(rule: Rule, flow: Flow | None) -> tuple[str, str]:
    if flow is None:
        return "so long", _limit(rule)
    silent = TIMEOUTS[TcpState(flow.state)] // SECOND - flow.timeout
    moved = f"{flow.client_bytes} bytes of the client, {flow.server_bytes} of the server"
    return f"{flow.age // SECOND} s old, {silent} s silent, {moved}", _limit(rule)


def _limit(rule: Rule) -> str:
    if rule.measure in RATE_MEASURES:
        return f"{rule.limit} in {rule.period // SECOND} s, {rule.burst} at once"
    if rule.measure is Measure.SLOW:
        return f"{rule.limit} bytes/s"
    if rule.measure in _OF_CONNECTION:
        return f"{rule.limit // SECOND} s"
    within = f" within {rule.within // SECOND} s" if rule.within else ""
    return f"{rule.limit}{within}"


def _server(ruleset: RuleSet, usual: int) -> int:
    """Return an address that a policy protects, of the family of the usual one."""
    family = usual >= V6
    networks = [one for one in ruleset.scope.destinations if (one.network >= V6) is family]
    if not networks or any(one.covers(usual) for one in networks):
        return usual
    return networks[0].network + (10 if networks[0].shift else 0)
