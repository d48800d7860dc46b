"""Whom a pressed service can do without: the order in which its connections go.

Never more go than bring the service back to its start mark.  First come those that its server has
never served (`Grades.is_served`), and of which nothing came in the last second; then those of
which bytes still come, and those whose source was served on other connections; then, where a
capacity is stated, those that were served and are silent since; at last those that have asked
again and wait, as a long poll does.  Each class has twice the patience of the one before, by what
the service would hold if all before were gone.  Within a class who holds many goes first, and the
oldest of him; while his are too young to go, nobody goes in their place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from rstguard.engine.address import V6, source_key
from rstguard.engine.flow import Flow, Name, name_of
from rstguard.engine.grades import Grades
from rstguard.engine.keys import service_key
from rstguard.engine.lenient import HEADERS4, HEADERS6, SYN_MORE
from rstguard.engine.pressure import SHORTEST, Room
from rstguard.engine.ruleset import SECOND, Rule, RuleSet
from rstguard.engine.table import Held, Known

BARREN, SPARED, SILENT, WAITING = range(4)
"""The classes, in the order in which they go."""
FEW: Final = 8
"""Connections that one visitor may hold without being taken for one who holds many."""
FEW_OF_NETWORK: Final = 64
"""The same of all visitors of one network."""
NETWORK: Final = (24, 48)
"""How wide that is: what one party may own of IPv4, and of IPv6."""
UPLOAD: Final = 1024
"""Bytes of a client from one look to the next by which a connection goes on, answered or not."""
COMES: Final = SECOND
"""Bytes of a client are still coming for so long after some of them came."""


class _Last(NamedTuple):
    """What was known of a connection at the last look."""

    ident: int
    began: int
    client_packets: int
    client_bytes: int
    server_packets: int
    server_bytes: int
    since: int
    """When it last went on, or, if it was never served, when it began."""
    waits: bool
    """Whether its client has sent data since."""
    came: int | None
    """When data of its client was last seen to come, None: never since it is looked at."""


class Ranked(NamedTuple):
    """A connection with its place in the order: the lowest goes first."""

    kind: int
    weight: int
    """Less than 0 if its source, or its network, holds many of its class: the more, the lower."""
    since: int
    name: Name
    flow: Flow


class Patience:
    """Remembers how the connections of pressed services get on; bounded by these."""

    def __init__(self, ruleset: RuleSet, grades: Grades, previous: Patience | None = None) -> None:
        self._ruleset, self._grades = ruleset, grades
        self._last: dict[Name, _Last] = previous._last if previous else {}
        self.borne: Mapping[int, int] = {}
        """How many connections are no sign of one visitor, by source (`rstguard.engine.large`)."""

    def rank(self, known: Known, services: Collection[int], now: int) -> dict[int, list[Ranked]]:
        """Return the connections of some services in the order in which they go."""
        held = known.of_services(services)
        last, self._last = self._last, {}
        for one in held:
            self._note(one, last, now)
        sources = Counter(self._source(one.flow) for one in held)
        is_served = self._grades.is_served
        unserved = Counter(self._source(one.flow) for one in held if not is_served(one.flow))
        served = known.served(sources.keys(), self._widths)
        spared: Counter[int] = Counter()
        kinds = []
        for one in sorted(held, key=lambda one: (-one.began, name_of(one.flow))):
            source = self._source(one.flow)
            bore = self.borne.get(source, 0)
            kind = self._kind(one.flow, sources[source] - bore, unserved[source] - bore, now)
            if kind == BARREN and spared[source] < served.get(source, 0):
                spared[source] += 1  # as many as were served, the youngest
                kind = SPARED
            kinds.append((one.flow, kind))
        return self._ordered(kinds)

    @property
    def _widths(self) -> tuple[int, int]:
        return self._ruleset.source_ipv4, self._ruleset.source_ipv6

    def _source(self, flow: Flow) -> int:
        return source_key(flow.original.source, *self._widths)

    def _note(self, held: Held, last: Mapping[Name, _Last], now: int) -> None:
        """Remember a connection, and how it went on since the last look."""
        flow, name = held.flow, name_of(held.flow)
        counters = flow.client_packets, flow.client_bytes, flow.server_packets, flow.server_bytes
        before = last.get(name)
        if before is None or (before.ident, before.began) != (flow.ident, held.began):
            since = held.changed if self._grades.is_served(flow) else held.began
            self._last[name] = _Last(flow.ident, held.began, *counters, since, False, None)
            return
        headers = HEADERS6 if flow.original.source >= V6 else HEADERS4
        packets = flow.client_packets - before.client_packets
        sent = flow.client_bytes - before.client_bytes - headers * packets
        said = flow.server_bytes - before.server_bytes > headers * (
            flow.server_packets - before.server_packets
        )
        went_on = self._grades.is_served(flow) and (said or sent >= UPLOAD)
        since = held.changed if went_on else before.since
        # What comes first is the request itself, a bot's half one as well.
        again = before.client_bytes > headers * before.client_packets + SYN_MORE
        came = now if sent > 0 and again else before.came
        waits = sent > 0 or (before.waits and not said)
        self._last[name] = _Last(flow.ident, held.began, *counters, since, waits, came)

    def _kind(self, flow: Flow, of_source: int, unserved: int, now: int) -> int:
        known = self._last[name_of(flow)]
        if not self._grades.is_served(flow):
            comes = known.came is not None and now - known.came < COMES
            return SPARED if comes and unserved <= FEW else BARREN
        return WAITING if known.waits and of_source <= FEW else SILENT

    def _ordered(self, kinds: Sequence[tuple[Flow, int]]) -> dict[int, list[Ranked]]:
        places = [
            (service_key(flow), kind, self._source(flow), _network(flow)) for flow, kind in kinds
        ]
        of_source = Counter((service, kind, source) for service, kind, source, _ in places)
        of_network = Counter((service, kind, network) for service, kind, _, network in places)
        near: Counter[int] = Counter()
        for source, network in {(source, network) for *_, source, network in places}:
            near[network] += self.borne.get(source, 0)
        ranked: dict[int, list[Ranked]] = {}
        for (flow, kind), (service, _, source, network) in zip(kinds, places, strict=True):
            own = of_source[service, kind, source] - self.borne.get(source, 0)
            many = max(own, 0) // (FEW + 1)
            many_near = max(of_network[service, kind, network] - near[network], 0)
            many_near //= FEW_OF_NETWORK + 1
            name = name_of(flow)
            since = self._last[name].since
            one = Ranked(kind, -max(many, many_near), since, name, flow)
            ranked.setdefault(service, []).append(one)
        for of_service in ranked.values():
            of_service.sort()
        return ranked


def shed(
    room: Room,
    ranked: Iterable[Ranked],
    unanswered: Sequence[Rule],
    hit: Mapping[Name, Rule],
    now: int,
) -> Iterator[tuple[Rule, Flow]]:
    """Yield the connections of a pressed service that go, and by which rule each.

    Args:
        room: how full it is.
        ranked: its connections, in their order.
        unanswered: the rules whose patience shrinks, the most severe first.
        hit: connections that another rule objects to, whatever progress they make.
        now: in monotonic nanoseconds.
    """
    live = room.live
    for kind, group in groupby(ranked, key=lambda one: one.kind):
        of_kind = list(group)
        least = room.late if kind >= SILENT else room.start
        if least is None:
            break
        left = live
        for one in of_kind:
            if left <= least:
                break
            rule = hit.get(one.name) or _impatient(room, one, unanswered, live, now)
            if rule is not None:
                left -= 1
                yield rule, one.flow
            elif one.weight < 0 and now - one.since < SHORTEST:
                left -= 1  # his turn comes at once: nobody who holds few goes in his place
        live -= len(of_kind)


def _impatient(
    room: Room, one: Ranked, unanswered: Sequence[Rule], live: int, now: int
) -> Rule | None:
    """Return the rule whose patience with a connection is over."""
    for rule in unanswered:
        whole = rule.limit << one.kind
        patience = room.patience(whole, live, served=one.kind >= SILENT)
        if patience is not None and now - one.since >= patience and concerns(rule, one.flow):
            return rule
    return None


def concerns(rule: Rule, flow: Flow) -> bool:
    """Tell whether a connection is one that a rule is about."""
    if rule.ports is not None and flow.original.destination_port not in rule.ports:
        return False
    return rule.concerns(flow.original.source, flow.original.destination)


def _network(flow: Flow) -> int:
    return source_key(flow.original.source, *NETWORK)
