"""The sweep: judge every connection of the kernel's table, some seconds apart.

What a packet-by-packet view cannot tell, idle and slow connections and how many a source holds,
is read from the connection table and compared with the last sweep.  The memory is rebuilt at each
sweep from the connections present, so it is bounded by the table itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import nlargest
from operator import itemgetter
from typing import NamedTuple

from rstguard.engine.address import prefix_of, source_key
from rstguard.engine.flow import LIVE, Flow, Tuple
from rstguard.engine.grades import Grades
from rstguard.engine.keys import flow_key_function, key_of
from rstguard.engine.lenient import MOST_BUSY, Standings, limit_of
from rstguard.engine.nearest import MOST_TRUSTED, Near, largest, merged, told
from rstguard.engine.ruleset import (
    ADOPTED,
    CONFIRMED,
    SECOND,
    SWEEP_MEASURES,
    Measure,
    Per,
    Rule,
    RuleSet,
)
from rstguard.engine.sources import Offence, Sources
from rstguard.engine.verdict import Action, Ban, Shun

_OF_SOURCES = frozenset({Measure.CONNECTIONS, Measure.BYTE_RATE})
"""What counts per source; the other measures judge one connection."""


class Seen(NamedTuple):
    """What the last sweep knew of a connection (times in monotonic nanoseconds)."""

    began: int
    changed: int
    packets: int
    bytes: int
    news: int
    """Bytes moved since the sweep before."""
    expires: int
    """When the kernel would forget it; every packet puts that off."""
    ident: int


Known = tuple[Flow, Seen]
"""A connection as it is, and what is known of it by now."""


class Objection(NamedTuple):
    """A rule crossed by a connection, or by its source through it."""

    flow: Flow
    rule: Rule


class Judgement(NamedTuple):
    """What a sweep decided: connections to reset, sources to block, and what is only observed."""

    condemned: tuple[Objection, ...]
    blocks: tuple[Ban | Shun, ...]
    observed: tuple[Objection, ...]


class Sweep:
    """Judges connections by the sweep rules of a policy.  Pure, like the engine."""

    def __init__(self, ruleset: RuleSet, previous: Sweep | None = None) -> None:
        """Take up a policy; what `previous` remembers of connections is kept."""
        self.ruleset = ruleset
        self._rules = tuple(rule for rule in ruleset.rules if rule.measure in SWEEP_MEASURES)
        self._seen: dict[Tuple, Seen] = previous._seen if previous else {}
        self._swept: int = previous._swept if previous else 0
        used = previous._used if previous else {}
        self._used: dict[Rule, dict[int, int]] = {rule: used.get(rule, {}) for rule in self._rules}
        """Of each rule that counts per source: connections held, or bytes beyond its rate."""
        self._reported: set[tuple[str, Tuple]] = previous._reported if previous else set()
        self._sources: Sources = previous._sources if previous else Sources(ruleset)
        self._sources.ruleset = ruleset
        self._grades = Grades(ruleset.labels)
        self._adopted = 1 << ruleset.labels + ADOPTED
        self._confirmed = 1 << ruleset.labels + CONFIRMED
        self.standings: Standings = previous.standings if previous else Standings()

    def restore(self, offences: Iterable[Offence], now: int) -> None:
        """Remember offences of an earlier time, so that bans go on growing longer."""
        self._sources.restore(offences, now)

    def explain(self, source: int) -> dict[str, float]:
        """Return how much of each limit a source (a tagged address) had used at the last sweep."""
        return {
            rule.name: next(self._shares(rule, [key_of(rule, source)]))[1]
            for rule in self._rules
            if rule.measure in _OF_SOURCES and rule.per is not Per.SERVICE
        }

    def nearest(self, most: int) -> tuple[Near, ...]:
        """Return who had used the most of each rule's limit at the last sweep."""
        found: list[Near] = []
        for rule in self._rules:
            if rule.measure in _OF_SOURCES:
                enough = most + MOST_TRUSTED
                keys = {key for key, _ in largest(self._used[rule], enough + MOST_BUSY)}
                if rule.unless:  # others hold fewer and are nearer to their limits
                    keys |= self.standings.percents().keys() & self._used[rule].keys()
                best = nlargest(enough, self._shares(rule, keys), key=itemgetter(1))
                found += told(best, rule, self.ruleset.scope)
        return merged(found, most)

    def _shares(self, rule: Rule, keys: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Yield each key with the share of the rule's limit that it has used."""
        used, percents = self._used[rule], self.standings.percents() if rule.unless else {}
        for key in keys:
            counted = rule.measure is Measure.CONNECTIONS
            limit = limit_of(rule, key, percents) if counted else rule.burst
            yield key, used.get(key, 0) / max(limit, 1)

    def judge(self, flows: Iterable[Flow], now: int) -> Judgement:
        """Judge the guarded connections, closed ones too, as they are at `now` (monotonic ns)."""
        flows = list(flows)
        if self.ruleset.lenient:
            self.standings.look(flows, self.ruleset, now)
        known = [(flow, self._note(flow, now)) for flow in flows if flow[3] in LIVE]
        self._forget_all_but(known)
        seen = self._seen
        objections: dict[Tuple, Objection] = {}
        observed = []
        self._reported = {item for item in self._reported if item[1] in seen}
        elapsed = now - self._swept
        for rule in self._rules:
            within = known if rule.ports is None else _on_ports(known, rule.ports)
            for flow in _CROSSED[rule.measure](self, rule, within, now, elapsed):
                if rule.action is not Action.OBSERVE and self.ruleset.scope.exempts(
                    flow.original.source
                ):
                    continue
                if self.ruleset.scope.trusts(flow.original.source):
                    continue
                if rule.action is Action.OBSERVE or not self.ruleset.enforce:
                    if (rule.name, flow.original) in self._reported:
                        continue
                    self._reported.add((rule.name, flow.original))
                if rule.action is Action.OBSERVE:
                    observed.append(Objection(flow, rule))
                    continue
                worst = objections.get(flow.original)
                if worst is None or rule.action > worst.rule.action:
                    objections[flow.original] = Objection(flow, rule)
        self._swept = now
        return self._sentence(list(objections.values()), observed, known, now)

    def _sentence(
        self, objections: list[Objection], observed: list[Objection], known: list[Known], now: int
    ) -> Judgement:
        """Ban who has crossed a rule that bans by connections that nobody can have forged.

        Others are shunned, and of their connections only those are ended by which they crossed it.
        """
        bans = [one for one in objections if one.rule.action is Action.BAN]
        proven = self._proven(bans, known) if bans else set()
        condemned: list[Objection] = []
        blocks: list[Ban | Shun] = []
        for objection in objections:
            flow, rule = objection
            if rule.action is not Action.BAN:
                condemned.append(objection)
                continue
            source = prefix_of(flow.original.source, *_widths(rule, self.ruleset))
            of_proven = (rule, _source_key_function(rule, self.ruleset)(flow)) in proven
            blocks += self._sources.block(source, of_proven, rule, now)
            banned = of_proven and rule.name not in self.ruleset.capped
            if not banned and not rule.keep_existing:
                condemned.append(objection)
        return Judgement(tuple(condemned), tuple(blocks), tuple(observed))

    def _proven(self, bans: list[Objection], known: list[Known]) -> set[tuple[Rule, int]]:
        """Return which rules may ban whom, by the key of the source."""
        found = set()
        for rule in {one.rule for one in bans}:
            key = _source_key_function(rule, self.ruleset)
            crossing: dict[int, list[Flow]] = {}
            for flow, its_rule in bans:
                if its_rule is rule:
                    crossing.setdefault(key(flow), []).append(flow)
            held: dict[int, list[Flow]] = {source: [] for source in crossing}
            for flow, _ in known if rule.ports is None else _on_ports(known, rule.ports):
                if (of_source := held.get(key(flow))) is not None:
                    of_source.append(flow)
            for source, flows in held.items():
                if self._has_crossed(rule, source, crossing[source], flows):
                    found.add((rule, source))
        return found

    def _has_crossed(
        self, rule: Rule, source: int, crossing: list[Flow], flows: list[Flow]
    ) -> bool:
        """Tell whether a source has crossed a rule by connections that nobody can have forged."""
        real, prove = self._grades.real, self._grades.prove
        if rule.measure is not Measure.CONNECTIONS or rule.per is Per.SERVICE:
            return real(crossing) == len(crossing) and prove(crossing)
        percents = self.standings.percents() if rule.unless else {}
        return real(flows) > limit_of(rule, source, percents) and prove(flows)

    def _note(self, flow: Flow, now: int) -> Seen:
        # Unpacked at once: this runs for every connection at every sweep.
        (
            ident, original, _, _, _, _,
            client_packets, client_bytes, server_packets, server_bytes, age, timeout, _, labels, _,
        ) = flow  # fmt: skip
        if labels & self._adopted and not labels & self._confirmed:
            age = -1
        packets, total = client_packets + server_packets, client_bytes + server_bytes
        expires = now + timeout * SECOND
        last = self._seen.get(original)
        # A client that closes by a RST may use its ports again at once: the kernel then makes a new
        # entry, which may bear the old one's number, but not its time.
        if (
            last is None
            or last.ident != ident
            or packets < last.packets
            or (age >= 0 and now - age > self._swept > last.began)
        ):
            began = now - age if age >= 0 else now
            # An older connection moved most of its bytes before anybody looked.
            news = total if age >= 0 and began >= self._swept else 0
            self._seen[original] = seen = Seen(began, now, packets, total, news, expires, ident)
            return seen
        # A connection older than the accounting has no counters; its timer tells of packets too,
        # to the second.
        spoke = packets != last.packets or (not packets and expires - last.expires > 2 * SECOND)
        if not spoke and not last.news:
            return last
        if spoke:
            seen = Seen(last.began, now, packets, total, total - last.bytes, expires, ident)
        else:
            seen = last._replace(news=0)
        self._seen[original] = seen
        return seen

    def _forget_all_but(self, known: list[Known]) -> None:
        """Forget connections that are gone; what is known of the others stays where it is.

        If all were written down anew at each sweep, the memory of old and new sweeps would mingle,
        and a tenth sweep would take twice as long as the first.
        """
        if len(self._seen) != len(known):
            there = {flow[1] for flow, _ in known}
            for gone in [original for original in self._seen if original not in there]:
                del self._seen[gone]

    def _connections(self, rule: Rule, known: list[Known], now: int, elapsed: int) -> list[Flow]:
        """The newest of a source beyond the limit.

        Half-closed ones count: the server holds them, and a client's FIN may have reached the
        tracker alone.
        """
        held: dict[int, list[Known]] = {}
        key = flow_key_function(rule)
        for one in known:
            source = key(one[0])
            if source in held:
                held[source].append(one)
            else:
                held[source] = [one]
        self._used[rule] = {source: len(of_source) for source, of_source in held.items()}
        beyond = []
        percents = self.standings.percents() if rule.unless else {}
        for source, of_source in held.items():
            limit = limit_of(rule, source, percents)
            if len(of_source) > limit:
                # What may have been forged goes first.
                if rule.action is Action.BAN:
                    real = self._grades.is_real
                    of_source.sort(key=lambda one: (not real(one[0]), one[1].began))
                else:
                    doubtful = self._grades.is_doubtful
                    of_source.sort(key=lambda one: (doubtful(one[0]), one[1].began))
                beyond += [flow for flow, _ in of_source[limit:]]
        return beyond

    def _byte_rate(self, rule: Rule, known: list[Known], now: int, elapsed: int) -> list[Flow]:
        """Every moving connection of a source whose bucket of bytes overflows."""
        key = flow_key_function(rule)
        moved: dict[int, int] = {}
        for flow, seen in known:
            if news := seen.news:
                moved[key(flow)] = moved.get(key(flow), 0) + news
        drained = rule.limit * elapsed // rule.period
        levels = self._used[rule]
        full = {}
        for source in moved.keys() | levels.keys():
            level = levels.get(source, 0) + moved.get(source, 0) - drained
            if level > 0:
                full[source] = level
        self._used[rule] = full
        over = {source for source, level in full.items() if level > rule.burst}
        return [flow for flow, seen in known if seen.news and key(flow) in over] if over else []

    def _slow(self, rule: Rule, known: list[Known], now: int, elapsed: int) -> list[Flow]:
        found = []
        old_enough = now - rule.after
        for flow, (began, _, packets, _, _, _, _) in known:
            # Without packets it is older than the accounting: nobody knows what it moved.
            if began > old_enough or not packets:
                continue
            age = now - began
            if _counted_bytes(flow, rule.of) * SECOND < rule.limit * age:
                found.append(flow)
        return found

    def _idle(self, rule: Rule, known: list[Known], now: int, elapsed: int) -> list[Flow]:
        since = now - rule.limit
        return [flow for flow, seen in known if seen[1] <= since]

    def _age(self, rule: Rule, known: list[Known], now: int, elapsed: int) -> list[Flow]:
        since = now - rule.limit
        return [flow for flow, seen in known if seen[0] <= since]


Crossed = Callable[[Sweep, Rule, list[Known], int, int], list[Flow]]

_CROSSED: dict[Measure, Crossed] = {
    Measure.CONNECTIONS: Sweep._connections,
    Measure.BYTE_RATE: Sweep._byte_rate,
    Measure.SLOW: Sweep._slow,
    Measure.IDLE: Sweep._idle,
    Measure.AGE: Sweep._age,
}


def _on_ports(known: list[Known], ports: frozenset[int]) -> list[Known]:
    return [one for one in known if one[0][1][3] in ports]


def _widths(rule: Rule, ruleset: RuleSet) -> tuple[int, int]:
    if rule.per is Per.SERVICE:
        return ruleset.source_ipv4, ruleset.source_ipv6
    return rule.ipv4_length, rule.ipv6_length


def _source_key_function(rule: Rule, ruleset: RuleSet) -> Callable[[Flow], int]:
    """Return whom a rule blocks for a connection, as one integer: the same that it counts by."""
    widths = _widths(rule, ruleset)
    return lambda flow: source_key(flow.original.source, *widths)


def _counted_bytes(flow: Flow, of: str) -> int:
    if of == "client":
        return flow.client_bytes
    return flow.server_bytes if of == "server" else flow.client_bytes + flow.server_bytes
