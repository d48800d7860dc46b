"""The connection table as a list of objects: what a sweep judges where there is no numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import NamedTuple

from rstguard.engine.address import is_v6, source_key
from rstguard.engine.admission import Paths
from rstguard.engine.flow import LIVE, Flow, Name, TcpState, Tuple, as_held, name_of
from rstguard.engine.grades import Grades
from rstguard.engine.keys import flow_key_function, service_key
from rstguard.engine.lenient import is_productive
from rstguard.engine.limits import Lenience, limit_of
from rstguard.engine.pace import small_packets
from rstguard.engine.pressure import (
    BORNE_AFTER,
    FEWEST_FAILING,
    OLDER_BORNE_AFTER,
    RECENT,
    UNANSWERED_AFTER,
    Load,
)
from rstguard.engine.reused import Reused
from rstguard.engine.ruleset import SECOND, Measure, Rule
from rstguard.engine.table import Held, Known, Moment, Table


class Seen(NamedTuple):
    """What the last sweep knew of a connection (times in monotonic nanoseconds)."""

    began: int
    changed: int
    packets: int
    bytes: int
    news: int
    """Bytes moved since the sweep before."""
    small: int
    """Small packets of the client since then (`rstguard.engine.pace`)."""
    client_packets: int
    client_bytes: int
    expires: int
    """When the kernel would forget it; every packet puts that off."""
    ident: int


class Past(NamedTuple):
    """When a connection was looked at once a window, the last two times, and its bytes then.

    The older one is one to two windows ago; or when it began, while it is not yet so old.
    """

    older: int
    older_client: int
    older_server: int
    newer: int
    newer_client: int
    newer_server: int

    def on(self, flow: Flow) -> Flow:
        """Return the connection with the bytes of the older one."""
        return flow._replace(client_bytes=self.older_client, server_bytes=self.older_server)


_Pair = tuple[Flow, Seen]
"""A connection as it is, and what is known of it by now."""


class Listed(Table):
    """Connections as objects."""

    def __init__(self, flows: Iterable[Flow]) -> None:
        self._flows = list(flows)

    def __len__(self) -> int:
        return len(self._flows)

    def flows(self) -> list[Flow]:
        """Return all of them."""
        return self._flows

    def marked(self, mark: int, mask: int) -> list[Flow]:
        """Return those whose mark, under `mask`, equals `mark`."""
        return [flow for flow in self._flows if flow.mark & mask == mark]

    def as_held(self, closing: int) -> None:
        """Show each as its server holds it."""
        self._flows = [as_held(flow, closing) for flow in self._flows]

    def begun(self, reused: Reused) -> list[Flow]:
        """Return those that have begun on another's entry."""
        return reused.began(self._flows)

    def as_own(self, reused: Reused) -> None:
        """Show each with what is its own."""
        self._flows = reused.own(self._flows)

    def tally(self, ipv4: int, ipv6: int, adopted: int = 0) -> Iterable[tuple[int, int, int]]:
        """Return how many connections each source has, and how many productive ones."""
        tally: dict[int, list[int]] = {}
        for flow in self._flows:
            if not flow.client_packets:  # it began while nothing was counted: nobody knows
                continue
            productive = is_productive(flow)
            if not productive and flow.labels & adopted:
                continue
            counted = tally.setdefault(source_key(flow.original.source, ipv4, ipv6), [0, 0])
            counted[0] += 1
            counted[1] += productive
        return [(key, total, productive) for key, (total, productive) in tally.items()]

    def known(
        self,
        before: Known | None,
        moment: Moment,
        grades: Grades,
        windows: Collection[int] = (),
    ) -> Known:
        """Return the live ones, and what is known of them."""
        seen = before if isinstance(before, ListedKnown) else None
        return ListedKnown(self._flows, seen, moment, grades, windows)


class ListedKnown(Known):
    """What is known of each live connection, by its name; bounded by the table itself."""

    def __init__(
        self,
        flows: list[Flow],
        before: ListedKnown | None,
        moment: Moment,
        grades: Grades,
        windows: Collection[int],
    ) -> None:
        """Go on with what was known `before` of connections."""
        self.seen: dict[Name, Seen] = before.seen if before else {}
        self.past: dict[int, dict[Name, Past]] = {
            window: before.past.get(window, {}) if before else {} for window in windows
        }
        self._grades, (self._now, self._swept) = grades, moment
        self._counted: dict[Rule, dict[int, int]] = {}
        self._flows = flows
        self._pairs = [(flow, self._note(flow)) for flow in flows if flow[3] in LIVE]
        self._forget_all_but_these()
        for window, past in self.past.items():
            self._look_back(window, past)

    def rest(self) -> None:
        """Let go of the connections."""
        self._pairs, self._flows = [], []

    def _note(self, flow: Flow) -> Seen:
        # Unpacked at once: this runs for every connection at every sweep.
        (
            ident, original, _, _, _, _,
            client_packets, client_bytes, server_packets, server_bytes, age, timeout, zone, _, _,
        ) = flow  # fmt: skip
        name = (*original, zone) if zone else original  # `name_of`
        now, swept = self._now, self._swept
        packets, total = client_packets + server_packets, client_bytes + server_bytes
        expires = now + timeout * SECOND
        last = self.seen.get(name)
        # A client that closes by a RST may use its ports again at once: the kernel then makes a new
        # entry, which may bear the old one's number, but not its time.
        if (
            last is None
            or last.ident != ident
            or packets < last.packets
            or (age >= 0 and now - age > swept > last.began)
        ):
            began = now - age if age >= 0 else now
            # An older connection moved most of its bytes before anybody looked.
            news = total if age >= 0 and began >= swept else 0
            small = _small(original, client_packets, client_bytes, server_bytes) if news else 0
            own = client_packets, client_bytes
            seen = Seen(began, now, packets, total, news, small, *own, expires, ident)
            self.seen[name] = seen
            for past in self.past.values():
                past.pop(name, None)
            return seen
        # A connection older than the accounting has no counters; its timer tells of packets too,
        # to the second.
        spoke = packets != last.packets or (not packets and expires - last.expires > 2 * SECOND)
        if not spoke and not last.news:
            return last
        if spoke:
            news, sent = total - last.bytes, client_bytes - last.client_bytes
            small = _small(original, client_packets - last.client_packets, sent, news - sent)
            own = client_packets, client_bytes
            seen = Seen(last.began, now, packets, total, news, small, *own, expires, ident)
        else:
            seen = last._replace(news=0, small=0)
        self.seen[name] = seen
        return seen

    def _forget_all_but_these(self) -> None:
        """Forget connections that are gone; what is known of the others stays where it is.

        If all were written down anew at each sweep, the memory of old and new sweeps would mingle,
        and a tenth sweep would take twice as long as the first.
        """
        if len(self.seen) != len(self._pairs):
            there = {name_of(flow) for flow, _ in self._pairs}
            for gone in [name for name in self.seen if name not in there]:
                del self.seen[gone]
                for past in self.past.values():
                    past.pop(gone, None)

    def _look_back(self, window: int, past: dict[Name, Past]) -> None:
        """Note what each connection had moved, once in a window; the note before stays as well."""
        now = self._now
        for flow, seen in self._pairs:
            name = name_of(flow)
            then = past.get(name) or Past(*(seen.began, 0, 0) * 2)
            if now - then.newer >= window:
                then = Past(*then[3:], now, flow.client_bytes, flow.server_bytes)
            past[name] = then

    def _of(self, rule: Rule) -> list[_Pair]:
        """Return the connections that a rule concerns, by indices as a sweep asks for each."""
        pairs = self._pairs
        if (ports := rule.ports) is not None:
            pairs = [one for one in pairs if one[0][1][3] in ports]
        if rule.is_partial:
            pairs = [one for one in pairs if rule.concerns(one[0][1][0], one[0][1][1])]
        return pairs

    def present(self, names: Collection[Name]) -> set[Name]:
        """Return which of these connections are there."""
        return {name for name in names if name in self.seen}

    def beyond(self, rule: Rule, lenience: Lenience) -> list[Flow]:
        """Return the newest of each source beyond its limit."""
        held = _grouped(self._of(rule), flow_key_function(rule))
        self._counted[rule] = {source: len(of_source) for source, of_source in held.items()}
        suspect = self._grades.suspect(rule)
        beyond: list[Flow] = []
        for source, of_source in held.items():
            limit = limit_of(rule, source, lenience)
            if len(of_source) > limit:
                of_source.sort(key=lambda one: (suspect(one[0]), one[1].began))
                beyond += [flow for flow, _ in of_source[limit:]]
        return beyond

    def counted(self, rule: Rule) -> dict[int, int]:
        """Return how many connections each source holds."""
        return self._counted.get(rule, {})

    def paths(self, rule: Rule, keys: Collection[int], but: Collection[Name]) -> dict[int, Paths]:
        """Return the names of the connections of some keys."""
        key, wanted = flow_key_function(rule), frozenset(keys)
        found: dict[int, set[Tuple]] = {}
        for flow, _ in self._of(rule) if wanted else ():
            if (of := key(flow)) in wanted:
                of_key = found.setdefault(of, set())
                if not self._grades.is_doubtful(flow) and name_of(flow) not in but:
                    of_key.add(flow.original)
        return dict(found)

    def moved(self, rule: Rule) -> dict[int, int]:
        """Return how much each source has moved."""
        key, amount = flow_key_function(rule), _amount(rule)
        moved: dict[int, int] = {}
        for flow, seen in self._of(rule):
            if news := amount(seen):
                moved[key(flow)] = moved.get(key(flow), 0) + news
        return moved

    def movers(self, rule: Rule, sources: Collection[int]) -> list[Flow]:
        """Return the connections on which these sources have moved it."""
        key, amount = flow_key_function(rule), _amount(rule)
        return [flow for flow, seen in self._of(rule) if amount(seen) and key(flow) in sources]

    def hasty(self, rule: Rule, most: int) -> list[Flow]:
        """Return connections that have moved more than `most`."""
        amount = _amount(rule)
        return [flow for flow, seen in self._of(rule) if amount(seen) > most]

    def slow(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections that have moved less than a rule asks for."""
        found = []
        old_enough = now - rule.after
        for flow, (began, _, packets, *_) in self._of(rule):
            # Without packets it is older than the accounting: nobody knows what it moved.
            if began > old_enough or not packets:
                continue
            age, moved = now - began, _counted_bytes(flow, rule.of)
            if rule.over_last:
                then = self.past[rule.over_last][name_of(flow)]
                age = now - then.older
                moved -= _counted_bytes(then.on(flow), rule.of)
            if moved * SECOND < rule.limit * age:
                found.append(flow)
        return found

    def silent(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections on which nothing was said for so long."""
        since = now - rule.limit
        return [flow for flow, seen in self._of(rule) if seen.changed <= since]

    def old(self, rule: Rule, now: int) -> list[Flow]:
        """Return connections as old as a rule allows."""
        since = now - rule.limit
        return [flow for flow, seen in self._of(rule) if seen.began <= since]

    def held(
        self, rule: Rule, widths: tuple[int, int], sources: Collection[int]
    ) -> dict[int, list[Flow]]:
        """Return what each of these sources holds."""
        held: dict[int, list[Flow]] = {source: [] for source in sources}
        for flow, _ in self._of(rule):
            of_source = held.get(source_key(flow.original.source, *widths))
            if of_source is not None:
                of_source.append(flow)
        return held

    def loads(self, least: int) -> dict[int, Load]:
        """Return what services carry that have `least` live connections, or that fail some."""
        found: dict[int, list[int]] = {}
        for flow, seen in self._pairs:
            if self._grades.is_doubtful(flow):
                continue
            younger = flow.labels & self._grades.seen_to_begin
            since = self._now - (BORNE_AFTER if younger else OLDER_BORNE_AFTER)
            load = found.setdefault(service_key(flow), [0, 0, 0, 0])
            load[0] += 1
            load[1] += seen.began <= since or self._grades.is_served(flow)
        for flow in self._flows:
            if 0 <= flow.age < RECENT:
                load = found.setdefault(service_key(flow), [0, 0, 0, 0])
                load[2] += 1
                load[3] += self._is_failed(flow)
        return {
            service: Load(*load)
            for service, load in found.items()
            if load[0] >= least or load[3] >= FEWEST_FAILING
        }

    def _is_failed(self, flow: Flow) -> bool:
        """Tell whether the server did not answer its SYN, or closed it before a byte."""
        if flow.state == TcpState.SYN_SENT:
            return flow.age >= UNANSWERED_AFTER
        return flow.server_first and not self._grades.is_confirmed(flow)

    def of_services(self, services: Collection[int]) -> list[Held]:
        """Return the live connections of some services."""
        return [
            Held(flow, seen.began, seen.changed)
            for flow, seen in self._pairs
            if service_key(flow) in services and not self._grades.is_doubtful(flow)
        ]

    def served(self, sources: Collection[int], widths: tuple[int, int]) -> dict[int, int]:
        """Return how many connections of each of these sources were served."""
        counted: dict[int, int] = {}
        for flow in self._flows:
            source = source_key(flow.original.source, *widths)
            if source in sources and self._grades.is_served(flow):
                counted[source] = counted.get(source, 0) + 1
        return counted

    def answered(self, widths: tuple[int, int], least: int) -> tuple[int, dict[int, int]]:
        """Return how many connections servers have answered, and how many of whom."""
        is_answered = self._grades.is_answered
        counts = Counter(
            source_key(flow.original.source, *widths)
            for flow, _ in self._pairs
            if is_answered(flow)
        )
        of_many = {source: count for source, count in counts.items() if count >= least}
        return counts.total(), of_many


def _small(original: Tuple, packets: int, client: int, server: int) -> int:
    return small_packets(packets, client, server, is_v6(original[0]))


def _amount(rule: Rule) -> Callable[[Seen], int]:
    """Return what tells how much a rule counts of a connection since the sweep before."""
    return attrgetter("small" if rule.measure is Measure.PACKET_RATE else "news")


def _grouped(pairs: list[_Pair], key: Callable[[Flow], int]) -> dict[int, list[_Pair]]:
    held: dict[int, list[_Pair]] = {}
    for one in pairs:
        source = key(one[0])
        if source in held:
            held[source].append(one)
        else:
            held[source] = [one]
    return held


def _counted_bytes(flow: Flow, of: str) -> int:
    if of == "client":
        return flow.client_bytes
    return flow.server_bytes if of == "server" else flow.client_bytes + flow.server_bytes
