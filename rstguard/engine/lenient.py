"""Many clients behind one address: a productive source may go further than others.

Who stands behind a NAT cannot be counted, but what comes of its connections can: an office's carry
data both ways, nearly all of them; a flood's do not.  A source is productive by the share of its
completed connections, those still open or lately closed, in which both ends sent data.  Only the
kernel's connection table is asked, and only of connections whose client proved its address: forged
SYNs can neither earn nor spoil anybody's standing.  What the tracker had forgotten and took up
again may have carried data before: it counts once it is productive, and spoils nothing until then.
Standing widens a limit, it does not lift it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import nlargest
from operator import itemgetter
from typing import NamedTuple

from rstguard.engine.address import is_v6
from rstguard.engine.flow import Flow
from rstguard.engine.limiter import Limiter
from rstguard.engine.ruleset import ADOPTED, SECOND, Rule, RuleSet
from rstguard.engine.table import Table

LEAST = 20
"""Completed connections in the table below which nothing is said of a source."""
LASTS = 600 * SECOND
"""How long a source keeps its standing after its last connections are gone."""
MOST = 4096
"""Sources of whom standing is kept; those with the most connections."""
MOST_BUSY = 64
"""Productive sources beyond the plain limit that cannot hide one that comes near it."""
HEADERS4, HEADERS6 = 52, 72
"""Bytes of a segment without data: IP header, TCP header, time stamps (RFC 7323)."""
SYN_MORE = 8
"""What a SYN's options take beyond that, at most."""


class Standing(NamedTuple):
    """Percent of productive connections, of how many, and until when it counts (nanoseconds)."""

    percent: int
    connections: int
    until: int


class Standings:
    """Keeps what is known of sources; bounded."""

    def __init__(self) -> None:
        self._known: dict[int, Standing] = {}

    def look(self, table: Table, ruleset: RuleSet, now: int) -> None:
        """Judge sources by the completed connections of the table, closed ones among them."""
        adopted = 1 << ruleset.labels + ADOPTED
        tally = table.tally(ruleset.source_ipv4, ruleset.source_ipv6, adopted)
        for key, total, productive in tally:
            if total >= LEAST:
                self._known[key] = Standing(100 * productive // total, total, now + LASTS)
        self._known = {key: known for key, known in self._known.items() if known.until > now}
        if len(self._known) > MOST:
            kept = sorted(self._known.items(), key=lambda item: -item[1].connections)[:MOST]
            self._known = dict(kept)

    def percents(self) -> dict[int, int]:
        """Return the percentage of each source that is known, by the key that rules count it by."""
        return {key: known.percent for key, known in self._known.items()}


def is_productive(flow: Flow) -> bool:
    """Tell whether both ends of a connection have sent data, by what the kernel counted of it."""
    headers = HEADERS6 if is_v6(flow.original.source) else HEADERS4
    return (
        flow.client_bytes > flow.client_packets * headers + SYN_MORE
        and flow.server_bytes > flow.server_packets * headers + SYN_MORE
    )


class LenientLimiter(Limiter):
    """A limiter that lets a productive source take `up_to` times as much again."""

    __slots__ = ("_beyond", "_least", "_percents", "_times")

    def __init__(self, rule: Rule, percents: Mapping[int, int]) -> None:
        assert rule.unless is not None
        super().__init__(rule.limit, rule.period, rule.burst)
        self._percents = percents
        self._least = rule.unless.productive
        self._times = rule.unless.up_to - 1
        self._beyond = Limiter(rule.limit * self._times, rule.period, rule.burst * self._times)

    def over(self, key: int, now: int) -> bool:
        """Count once, and tell whether it is too much for this source."""
        if not super().over(key, now):
            return False
        return self._percents.get(key, 0) < self._least or self._beyond.over(key, now)

    def level(self, key: int, now: int) -> float:
        """Return how much `key` has used, 0 to 1, of all that it may: productive ones may more."""
        plain = super().level(key, now)
        if self._percents.get(key, 0) < self._least:
            return plain
        return (plain + self._times * self._beyond.level(key, now)) / (1 + self._times)

    def nearest(self, most: int, now: int) -> Iterator[list[tuple[int, float]]]:
        """Yield who has used the most; the productive apart, as others used less and are nearer."""
        yield from super().nearest(most + MOST_BUSY, now)
        productive = [key for key, percent in self._percents.items() if percent >= self._least]
        levels = ((key, self.level(key, now)) for key in productive)
        yield nlargest(most, levels, key=itemgetter(1))
