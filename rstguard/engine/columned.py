"""What is known of live connections in columns, and what rules find among them.  Needs numpy."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.admission import Paths
from rstguard.engine.flow import Flow, Name, TcpState, name_of
from rstguard.engine.grades import LONGEST4, LONGEST6, TAKEN, Grades
from rstguard.engine.grouping import (
    Keys,
    Rows,
    among,
    covered,
    gathered,
    numbers_in,
    of_rule,
    services,
    sources,
)
from rstguard.engine.limits import Lenience, limit_of
from rstguard.engine.paths import Named
from rstguard.engine.pressure import (
    BORNE_AFTER,
    FEWEST_FAILING,
    OLDER_BORNE_AFTER,
    RECENT,
    UNANSWERED_AFTER,
    Load,
)
from rstguard.engine.remembered import Remembered
from rstguard.engine.ruleset import SECOND, Measure, Rule
from rstguard.engine.table import Held, Known, Moment
from rstguard.engine.verdict import Action

Column = NDArray[Any]

_ROUNDING = 1e-12
"""Far more than the four roundings of a comparison of products lose, 2**-53 each."""


class Live(Rows, Protocol):
    """The part of `rstguard.engine.columns.Columns` that is needed here."""

    def live(self) -> Column:
        """Return the rows of live connections."""

    def labelled(self, bits: int) -> Column:
        """Tell of each row whether it bears one of some labels."""

    def flows_at(self, rows: Column) -> list[Flow]:
        """Return some rows as objects."""


class _Counted(NamedTuple):
    keys: Keys
    codes: Column
    counts: Column


class ColumnKnown(Known):
    """What is known of each live connection.  Of the columns here `self._rows` says which row."""

    def __init__(
        self,
        table: Live,
        seen: Remembered | None,
        moment: Moment,
        grades: Grades,
        windows: Collection[int],
    ) -> None:
        """Go on with what was `seen` of connections."""
        self._table: Live | None = table
        self._rows = rows = table.live()
        self._grades, self._now = grades, moment.now
        self._counted: dict[Rule, _Counted] = {}
        self.seen = Remembered(table, rows, seen, moment, windows)

    def rest(self) -> None:
        """Let go of the table."""
        self._table = None
        self._rows = self._rows[:0]
        for rule, counted in self._counted.items():
            keys = counted.keys._replace(codes=counted.keys.codes[:0].copy())
            self._counted[rule] = counted._replace(keys=keys)

    @property
    def _there(self) -> Live:
        assert self._table is not None
        return self._table

    def _column(self, name: str) -> Column:
        column: Column = self._there[name][self._rows]
        return column

    def _of(self, rule: Rule) -> Column:
        """Return which a rule concerns, by their places here."""
        found = np.arange(len(self._rows))
        if rule.ports is not None:
            wanted = np.zeros(1 << 16, bool)
            wanted[list(rule.ports)] = True
            found = np.flatnonzero(wanted[self._column("destination_port")])
        if rule.is_partial:
            rows = self._rows[found]
            concerned = ~covered(self._there, rows, "source", rule.excepted)
            if rule.destinations:
                concerned &= covered(self._there, rows, "destination", rule.destinations)
            found = found[concerned]
        return found

    def _flows(self, places: Column) -> list[Flow]:
        return self._there.flows_at(self._rows[places]) if len(places) else []

    def present(self, names: Collection[Name]) -> set[Name]:
        """Return which of these connections are there."""
        return set(map(name_of, self._flows(self._named(names))))

    def _named(self, names: Collection[Name]) -> Column:
        """Return the places of these connections."""
        if not names:
            return self._rows[:0]
        low = np.array([name[0] & (1 << 64) - 1 for name in names], "u8")
        ports = np.array([name[2] << 16 | name[3] for name in names], "u8")
        mixed = self._column("source") ^ _ports(self._there, self._rows) << np.uint64(32)
        likely = among(mixed, low ^ ports << np.uint64(32))
        wanted = set(names)
        return likely[[name_of(flow) in wanted for flow in self._flows(likely)]]

    def beyond(self, rule: Rule, lenience: Lenience) -> list[Flow]:
        """Return the newest of each source beyond its limit."""
        at = self._of(rule)
        keys = of_rule(self._there, self._rows[at], rule)
        codes, counts = numbers_in(keys.codes)
        self._counted[rule] = _Counted(keys, codes, counts)
        over = counts > rule.limit
        codes, counts = codes[over], counts[over]
        limits = np.array([limit_of(rule, keys.key(code), lenience) for code in codes.tolist()])
        if not len(codes) or not (counts > limits).any():
            return []
        codes, limits = codes[counts > limits], limits[counts > limits]
        held = among(keys.codes, codes)
        group = np.searchsorted(codes, keys.codes[held])
        first = np.full(len(codes), len(keys.codes))
        np.minimum.at(first, group, held)
        places = at[held]
        suspect = self._suspect(rule, places)
        order = np.lexsort((self.seen.began[places], suspect, first[group]))
        group, places = group[order], places[order]
        begins = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
        number = np.arange(len(group)) - np.repeat(begins, np.diff(np.append(begins, len(group))))
        return self._flows(places[number >= limits[group]])

    def _suspect(self, rule: Rule, places: Column) -> Column:
        """Tell what `Grades.suspect` tells of a connection."""
        rows = self._rows[places]
        if rule.action is not Action.BAN:
            return self._doubtful(rows)
        likely = self._there.labelled(self._grades.likely)[rows]
        unreal: Column = ~(self._confirmed(rows) | likely)
        return unreal

    def _doubtful(self, rows: Column) -> Column:
        """Tell of rows of the table what `Grades.is_doubtful` tells of a connection."""
        found: Column = self._there.labelled(self._grades.adopted)[rows]
        return found & ~self._confirmed(rows) if found.any() else found

    def counted(self, rule: Rule) -> dict[int, int]:
        """Return how many connections each source holds."""
        if rule not in self._counted:
            return {}
        keys, codes, counts = self._counted[rule]
        return keys.numbered(codes, counts)

    def paths(self, rule: Rule, keys: Collection[int], but: Collection[Name]) -> dict[int, Paths]:
        """Return the names of the connections of some keys."""
        if not keys:
            return {}
        at = self._of(rule)
        of = of_rule(self._there, self._rows[at], rule)
        found, codes, counts = gathered(of.codes, of.codes_of(keys))
        places = at[found]
        counting = ~self._doubtful(self._rows[places]) & ~np.isin(places, self._named(but))
        named = Named(self._there, self._rows[places[counting]])
        ends = np.append(0, np.cumsum(counting))[np.append(0, np.cumsum(counts))].tolist()
        of_keys = zip(map(of.key, codes.tolist()), pairwise(ends), strict=True)
        made = {key: named.between(*place) for key, place in of_keys}
        return {key: set(one) for key, one in made.items()} if named.repeat() else dict(made)

    def _amounts(self, rule: Rule) -> Column:
        """Return how much a rule counts of each since the sweep before."""
        amounts: Column = self.seen.small if rule.measure is Measure.PACKET_RATE else self.seen.news
        return amounts

    def moved(self, rule: Rule) -> dict[int, int]:
        """Return how much each source has moved."""
        at = self._moving(rule)
        keys = of_rule(self._there, self._rows[at], rule)
        codes, place = np.unique(keys.codes, return_inverse=True)
        sums = np.zeros(len(codes), "i8")
        np.add.at(sums, place, self._amounts(rule)[at])
        return keys.numbered(codes, sums)

    def _moving(self, rule: Rule) -> Column:
        at = self._of(rule)
        moving: Column = at[self._amounts(rule)[at] != 0]
        return moving

    def movers(self, rule: Rule, sources: Collection[int]) -> list[Flow]:
        """Return the connections on which these sources have moved it."""
        at = self._moving(rule)
        keys = of_rule(self._there, self._rows[at], rule)
        return self._flows(at[among(keys.codes, keys.codes_of(sources))])

    def hasty(self, rule: Rule, most: int) -> list[Flow]:
        """Return connections that have moved more than `most`."""
        at = self._of(rule)
        return self._flows(at[self._amounts(rule)[at] > most])

    def slow(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections that have moved less than a rule asks for."""
        at = self._of(rule)
        began = self.seen.began[at]
        at = at[(began <= now - rule.after) & (self.seen.packets[at] != 0)]
        moved = np.zeros(len(at), "i8")
        for end in ("client", "server") if rule.of not in ("client", "server") else (rule.of,):
            moved += self._column(f"{end}_bytes")[at]
            if rule.over_last:
                moved -= self.seen.past[rule.over_last][1 if end == "client" else 2][at]
        # Both products may be beyond 64 bits: those near to each other are told apart exactly.
        since = self.seen.past[rule.over_last][0] if rule.over_last else self.seen.began
        ages = now - since[at]
        have, wanted = moved.astype("f8") * SECOND, ages.astype("f8") * rule.limit
        less = have < wanted
        for near in np.flatnonzero(np.abs(have - wanted) <= wanted * _ROUNDING).tolist():
            less[near] = int(moved[near]) * SECOND < rule.limit * int(ages[near])
        return self._flows(at[less])

    def silent(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections on which nothing was said for so long."""
        at = self._of(rule)
        return self._flows(at[self.seen.changed[at] <= now - rule.limit])

    def old(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections as old as a rule allows."""
        at = self._of(rule)
        return self._flows(at[self.seen.began[at] <= now - rule.limit])

    def held(
        self, rule: Rule, widths: tuple[int, int], of: Collection[int]
    ) -> dict[int, list[Flow]]:
        """Return what each of these sources holds."""
        at = self._of(rule)
        keys = sources(self._there, self._rows[at], widths)
        found = among(keys.codes, keys.codes_of(of))
        held: dict[int, list[Flow]] = {source: [] for source in of}
        flows = self._flows(at[found])
        for code, flow in zip(keys.codes[found].tolist(), flows, strict=True):
            held[keys.key(code)].append(flow)
        return held

    def loads(self, least: int) -> dict[int, Load]:
        """Return what services carry that have `least` live connections, or that fail some."""
        sure = self._sure()
        rows, began = self._rows[sure], self.seen.began[sure]
        younger = self._there.labelled(self._grades.seen_to_begin)[rows]
        since = self._now - np.where(younger, BORNE_AFTER, OLDER_BORNE_AFTER)
        borne = self._served(rows) | (began <= since)
        lives = self._sums(rows, borne, least)
        ages, states = self._there["age"], self._there["state"]
        recent = np.flatnonzero((ages >= 0) & (ages < RECENT))
        late = (states[recent] == TcpState.SYN_SENT) & (ages[recent] >= UNANSWERED_AFTER)
        refused = (states[recent] != TcpState.SYN_SENT) & self._there["server_first"][recent]
        failed = late | (refused & ~self._confirmed(recent))
        begun = self._sums(recent, failed, 0)
        failing = {service for service, (_, many) in begun.items() if many >= FEWEST_FAILING}
        if failing - lives.keys():
            lives |= {k: v for k, v in self._sums(rows, borne, 0).items() if k in failing}
        return {
            service: Load(*lives.get(service, (0, 0)), *begun.get(service, (0, 0)))
            for service in lives.keys() | failing
        }

    def _sure(self) -> Column:
        """Return the places of those of which `Grades.is_doubtful` is not true."""
        return np.flatnonzero(~self._doubtful(self._rows))

    def _sums(self, rows: Column, noted: Column, least: int) -> dict[int, tuple[int, int]]:
        """Return how many rows each service with `least` has, and how many of these are noted."""
        keys = services(self._there, rows)
        codes, place, counts = np.unique(keys.codes, return_inverse=True, return_counts=True)
        of_noted = np.bincount(place[noted], minlength=len(codes))
        many = counts >= least
        found = codes[many].tolist(), counts[many].tolist(), of_noted[many].tolist()
        return {keys.key(code): (count, noted) for code, count, noted in zip(*found, strict=True)}

    def _sent(self, rows: Column) -> Column:
        """Tell of rows of the table whether the server has sent more than headers."""
        table = self._there
        longest = np.where(table["v6"][rows], LONGEST6, LONGEST4)
        sent: Column = table["server_bytes"][rows] > table["server_packets"][rows] * longest
        return sent

    def _confirmed(self, rows: Column) -> Column:
        """Tell what `Grades.is_confirmed` tells of a connection."""
        found: Column = self._there.labelled(self._grades.confirmed)[rows] | self._sent(rows)
        return found

    def _served(self, rows: Column) -> Column:
        """Tell what `Grades.is_served` tells of a connection."""
        found: Column = self._answered(rows) | (self._there["client_bytes"][rows] >= TAKEN)
        return found

    def _answered(self, rows: Column) -> Column:
        """Tell what `Grades.is_answered` tells of a connection."""
        table, grades = self._there, self._grades
        own = table.labelled(grades.likely | grades.adopted)[rows]
        found: Column = self._sent(rows) | (table.labelled(grades.confirmed)[rows] & own)
        return found

    def of_services(self, services_: Collection[int]) -> list[Held]:
        """Return the live connections of some services."""
        sure = self._sure()
        keys = services(self._there, self._rows[sure])
        at = sure[among(keys.codes, keys.codes_of(services_))]
        seen = zip(self.seen.began[at].tolist(), self.seen.changed[at].tolist(), strict=True)
        return [Held(flow, *times) for flow, times in zip(self._flows(at), seen, strict=True)]

    def served(self, of: Collection[int], widths: tuple[int, int]) -> dict[int, int]:
        """Return how many connections of each of these sources were served."""
        rows = np.flatnonzero(self._served(np.arange(len(self._there["ident"]))))
        keys = sources(self._there, rows, widths)
        found = keys.codes[among(keys.codes, keys.codes_of(of))]
        codes, counts = numbers_in(found)
        return keys.numbered(codes, counts)

    def answered(self, widths: tuple[int, int], least: int) -> tuple[int, dict[int, int]]:
        """Return how many connections servers have answered, and how many of whom."""
        rows = self._rows[self._answered(self._rows)]
        keys = sources(self._there, rows, widths)
        codes, counts = numbers_in(keys.codes)
        many = counts >= least
        return len(rows), keys.numbered(codes[many], counts[many])


def _ports(table: Rows, rows: Column) -> Column:
    ports: Column = table["source_port"][rows].astype("u8") << np.uint64(16)
    return ports | table["destination_port"][rows]
