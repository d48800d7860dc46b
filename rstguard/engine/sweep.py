"""The sweep: judge every connection of the kernel's table, some seconds apart.

What a packet-by-packet view cannot tell, idle and slow connections and how many a source holds,
is read from the connection table and compared with the last sweep.  The memory is rebuilt at each
sweep from the connections present, so it is bounded by the table itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nlargest
from operator import itemgetter
from typing import NamedTuple

from rstguard.engine.address import Networks, Prefix, prefix_of, source_key
from rstguard.engine.admission import Admissions
from rstguard.engine.flow import Flow, Name, name_of
from rstguard.engine.grades import Grades
from rstguard.engine.keys import key_of
from rstguard.engine.large import (
    LEAST,
    RATE_TIMES,
    REASONS_OF_NUMBERS,
    LargeSource,
    LargeSources,
    is_for_numbers,
    looks_for_large,
)
from rstguard.engine.lenient import MOST_BUSY, Standings
from rstguard.engine.limits import Lenience, limit_of
from rstguard.engine.listed import Listed
from rstguard.engine.nearest import MOST_TRUSTED, Near, largest, merged, told
from rstguard.engine.patience import Patience, shed
from rstguard.engine.pressure import FAST, Pressure, Room
from rstguard.engine.ruleset import (
    SWEEP_MEASURES,
    Measure,
    Per,
    Rule,
    RuleSet,
)
from rstguard.engine.sources import Offence, Sources
from rstguard.engine.table import Known, Moment, Table
from rstguard.engine.verdict import Action, Ban, Shun

_OF_SOURCES = frozenset({Measure.CONNECTIONS, Measure.BYTE_RATE, Measure.PACKET_RATE})
"""What counts per source, unless the rule says otherwise; other measures judge one connection."""


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
        self._known: Known | None = previous._known if previous else None
        self._swept: int = previous._swept if previous else 0
        levels = previous._levels if previous else {}
        self._levels: dict[Rule, dict[int, int]] = {r: levels.get(r, {}) for r in self._rules}
        """Of each rule that counts bytes or packets per source: those beyond its rate."""
        self._reported: set[tuple[str, Name]] = previous._reported if previous else set()
        self._sources: Sources = previous._sources if previous else Sources(ruleset)
        self._sources.ruleset = ruleset
        self._grades = Grades(ruleset.labels)
        self.standings: Standings = previous.standings if previous else Standings()
        self.admissions: Admissions = Admissions(ruleset, previous.admissions if previous else None)
        self._looks_for_large = looks_for_large(ruleset)
        keeps = previous and (ruleset.looks_for_pressure or self._looks_for_large)
        self.pressure: Pressure = previous.pressure if previous and keeps else Pressure()
        self.pressure.capacity = dict(ruleset.capacity)
        patience: Patience | None = previous._patience if previous else None
        self._patience: Patience = Patience(ruleset, self._grades, patience)
        self.large: LargeSources = previous.large if previous else LargeSources()
        self._lenience = self._lenient()

    @property
    def looks(self) -> bool:
        """Whether there is anything that a sweep would find."""
        ruleset = self.ruleset
        finds = ruleset.sweeps or ruleset.lenient or ruleset.looks_for_pressure
        return finds or self._looks_for_large

    @property
    def pressed(self) -> Mapping[int, Room]:
        """The services in distress, if the policy asks for them."""
        return self.pressure.pressed if self.ruleset.looks_for_pressure else {}

    def found_large(self, now: int) -> tuple[LargeSource, ...]:
        """Return the sources that are large at `now`, if the policy has rules for numbers."""
        return self.large.found(now) if self._looks_for_large else ()

    @property
    def every(self) -> int:
        """How often to sweep by now, in nanoseconds: more often while a service is pressed."""
        every = self.ruleset.sweep_every
        urgent = self.pressure.urgent and self.ruleset.looks_for_pressure
        return min(every, FAST) if urgent else every

    def restore(self, offences: Iterable[Offence], now: int) -> None:
        """Remember offences of an earlier time, so that bans go on growing longer."""
        self._sources.restore(offences, now)

    def explain(self, source: int) -> dict[str, float]:
        """Return how much of each limit a source (a tagged address) had used at the last sweep."""
        return {
            rule.name: next(self._shares(rule, [key_of(rule, source)]))[1]
            for rule in self._rules
            if _of_sources(rule) and not rule.of_target
        }

    def nearest(self, most: int) -> tuple[Near, ...]:
        """Return who had used the most of each rule's limit at the last sweep."""
        found: list[Near] = []
        for rule in self._rules:
            if _of_sources(rule):
                enough = most + MOST_TRUSTED
                used = self._used(rule)
                keys = {key for key, _ in largest(used, enough + MOST_BUSY)}
                if rule.unless:  # others hold fewer and are nearer to their limits
                    keys |= self.standings.percents().keys() & used.keys()
                best = nlargest(enough, self._shares(rule, keys), key=itemgetter(1))
                found += told(best, rule, self.ruleset.scope)
        return merged(found, most)

    def _used(self, rule: Rule) -> dict[int, int]:
        """Return how many connections each source held, or what it moved beyond the rule's rate."""
        if rule.measure is Measure.CONNECTIONS:
            return self._known.counted(rule) if self._known else {}
        return self._levels[rule]

    def _shares(self, rule: Rule, keys: Iterable[int]) -> Iterator[tuple[int, float]]:
        """Yield each key with the share of the rule's limit that it has used."""
        used, spared = self._used(rule), self.large.spared(rule)
        for key in keys:
            counted = rule.measure is Measure.CONNECTIONS
            most = rule.burst * (RATE_TIMES if key in spared else 1)
            limit = limit_of(rule, key, self._lenience) if counted else most
            yield key, used.get(key, 0) / max(limit, 1)

    def _lenient(self) -> Lenience:
        """Return whose limits are wider now."""
        counting = [rule for rule in self._rules if rule.measure is Measure.CONNECTIONS]
        large = {rule: limits for rule in counting if (limits := self.large.limits(rule))}
        return Lenience(self.standings.percents(), large)

    def judge(self, flows: Iterable[Flow] | Table, now: int) -> Judgement:
        """Judge the guarded connections, closed ones too, as they are at `now` (monotonic ns)."""
        table = flows if isinstance(flows, Table) else Listed(flows)
        if self.ruleset.lenient:
            self.standings.look(table, self.ruleset, now)
        self._lenience = self._lenient()
        windows = {rule.over_last for rule in self._rules if rule.over_last}
        known = table.known(self._known, Moment(now, self._swept), self._grades, windows)
        self._known = known
        objections: dict[Name, Objection] = {}
        observed = []
        there = known.present({name for _, name in self._reported})
        self._reported = {item for item in self._reported if item[1] in there}
        if self.ruleset.looks_for_pressure or self._looks_for_large:
            self.pressure.look(known.loads(self.pressure.least), now)
        pressed = self._of_pressed(known, now)
        for rule in self._rules:
            for flow in self._crossed(rule, known, now, pressed):
                if rule.action is not Action.OBSERVE and self.ruleset.scope.exempts(
                    flow.original.source
                ):
                    continue
                if self.ruleset.scope.trusts(flow.original.source):
                    continue
                if rule.action is Action.OBSERVE or not self.ruleset.enforce:
                    if (rule.name, name_of(flow)) in self._reported:
                        continue
                    self._reported.add((rule.name, name_of(flow)))
                if rule.action is Action.OBSERVE:
                    observed.append(Objection(flow, rule))
                    continue
                worst = objections.get(name := name_of(flow))
                if worst is None or rule.action > worst.rule.action:
                    objections[name] = Objection(flow, rule)
        judgement = self._sentence(list(objections.values()), observed, known, now)
        self._swept = now
        self._look_for_large(known, judgement, now)
        if self.admissions.rules:
            self._admit(known, judgement)
        known.rest()
        return judgement

    def _look_for_large(self, known: Known, judgement: Judgement, now: int) -> None:
        """Note who carries a large share, and of whom a rule for numbers ends something now."""
        if not self._looks_for_large:
            return
        widths = self._source_widths
        total, held = known.answered(widths, LEAST)
        hit = Networks(self._hit_by_numbers(known, judgement) if self.ruleset.enforce else ())
        self.large.look(held, total, hit, bool(self.pressure.pressed), self.ruleset, now)
        self._lenience = self._lenient()

    def _hit_by_numbers(self, known: Known, judgement: Judgement) -> Iterator[Prefix]:
        """Yield whom a rule for numbers ends something of, bans, or has at its limit."""
        for one in judgement.condemned:
            if is_for_numbers(one.rule):
                yield prefix_of(one.flow.original.source, *self._source_widths)
        yield from (
            block.source for block in judgement.blocks if block.reason in REASONS_OF_NUMBERS
        )
        for rule in self._rules if self.large.watched else ():
            acts = rule.action is not Action.OBSERVE and not rule.when_pressed
            if rule.measure is Measure.CONNECTIONS and acts and is_for_numbers(rule):
                counted = known.counted(rule)
                for source in self.large.watched:
                    key = key_of(rule, source.network)
                    if counted.get(key, 0) >= limit_of(rule, key, self._lenience):
                        yield source

    @property
    def _source_widths(self) -> tuple[int, int]:
        return self.ruleset.source_ipv4, self.ruleset.source_ipv6

    def _admit(self, known: Known, judgement: Judgement) -> None:
        """Tell the admissions which connections hold places: those that go on, of real sources."""
        ending = {name_of(one.flow) for one in judgement.condemned}
        self.admissions.look(known, self._lenience, ending)

    def _crossed(
        self, rule: Rule, known: Known, now: int, pressed: dict[Rule, list[Flow]]
    ) -> list[Flow]:
        if rule.when_pressed:
            return pressed.get(rule, [])
        return _CROSSED[rule.measure](self, rule, known, now)

    def _of_pressed(self, known: Known, now: int) -> dict[Rule, list[Flow]]:
        """Return the connections of pressed services that go, by the rules that say so.

        Those that only observe are asked after the others, which must not wait for them.
        """
        found: dict[Rule, list[Flow]] = {}
        rules = sorted((r for r in self._rules if r.when_pressed), key=lambda r: -r.action)
        if not rules or not self.pressure.pressed:
            return found
        self._patience.borne = self.large.borne(*self._source_widths)
        ranked = self._patience.rank(known, self.pressure.pressed.keys(), now)
        scope = self.ruleset.scope
        for acting in (True, False):
            asked = [rule for rule in rules if (rule.action is not Action.OBSERVE) == acting]
            spares = scope.exempts if acting else scope.trusts
            unanswered = [rule for rule in asked if rule.measure is Measure.UNANSWERED]
            hit = {
                name_of(flow): rule
                for rule in reversed(asked)
                for flow in _CROSSED[rule.measure](self, rule, known, now)
            }
            for service, room in self.pressure.pressed.items():
                order = [o for o in ranked.get(service, ()) if not spares(o.flow.original.source)]
                for rule, flow in shed(room, order, unanswered, hit, now):
                    found.setdefault(rule, []).append(flow)
        return found

    def _sentence(
        self, objections: list[Objection], observed: list[Objection], known: Known, now: int
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

    def _proven(self, bans: list[Objection], known: Known) -> set[tuple[Rule, int]]:
        """Return which rules may ban whom, by the key of the source."""
        found = set()
        for rule in {one.rule for one in bans}:
            key = _source_key_function(rule, self.ruleset)
            crossing: dict[int, list[Flow]] = {}
            for flow, its_rule in bans:
                if its_rule is rule:
                    crossing.setdefault(key(flow), []).append(flow)
            held = known.held(rule, _widths(rule, self.ruleset), crossing.keys())
            for source, flows in held.items():
                if self._has_crossed(rule, source, crossing[source], flows):
                    found.add((rule, source))
        return found

    def _has_crossed(
        self, rule: Rule, source: int, crossing: list[Flow], flows: list[Flow]
    ) -> bool:
        """Tell whether a source has crossed a rule by connections that nobody can have forged."""
        real, prove = self._grades.real, self._grades.prove
        if rule.measure is not Measure.CONNECTIONS or rule.of_target:
            return real(crossing) == len(crossing) and prove(crossing)
        limit = limit_of(rule, source, self._lenience)
        return real(flows) > limit and prove(flows)

    def _connections(self, rule: Rule, known: Known, now: int) -> list[Flow]:
        """The newest of a source beyond the limit.

        Half-closed ones count: the server holds them, and a client's FIN may have reached the
        tracker alone.
        """
        return known.beyond(rule, self._lenience)

    def _moves_fast(self, rule: Rule, known: Known, now: int) -> list[Flow]:
        """Every moving connection of a source whose bucket of bytes, or packets, overflows."""
        drained = rule.limit * (now - self._swept) // rule.period
        if rule.per is Per.CONNECTION:
            return known.hasty(rule, drained + rule.burst)
        moved, levels, spared = known.moved(rule), self._levels[rule], self.large.spared(rule)
        full, over = {}, set()
        for source in moved.keys() | levels.keys():
            times = RATE_TIMES if source in spared else 1
            level = levels.get(source, 0) + moved.get(source, 0) - drained * times
            if level > 0:
                full[source] = level
            if level > rule.burst * times:
                over.add(source)
        self._levels[rule] = full
        return known.movers(rule, over) if over else []


Crossed = Callable[[Sweep, Rule, Known, int], list[Flow]]

_CROSSED: dict[Measure, Crossed] = {
    Measure.CONNECTIONS: Sweep._connections,
    Measure.BYTE_RATE: Sweep._moves_fast,
    Measure.PACKET_RATE: Sweep._moves_fast,
    Measure.SLOW: lambda _, rule, known, now: known.slow(rule, now),
    Measure.IDLE: lambda _, rule, known, now: known.silent(rule, now),
    Measure.AGE: lambda _, rule, known, now: known.old(rule, now),
    Measure.UNANSWERED: lambda _, rule, known, now: [],
}


def _of_sources(rule: Rule) -> bool:
    return rule.measure in _OF_SOURCES and rule.per is not Per.CONNECTION


def _widths(rule: Rule, ruleset: RuleSet) -> tuple[int, int]:
    if rule.of_target:
        return ruleset.source_ipv4, ruleset.source_ipv6
    return rule.ipv4_length, rule.ipv6_length


def _source_key_function(rule: Rule, ruleset: RuleSet) -> Callable[[Flow], int]:
    """Return whom a rule blocks for a connection, as one integer: the same that it counts by."""
    widths = _widths(rule, ruleset)
    return lambda flow: source_key(flow.original.source, *widths)
