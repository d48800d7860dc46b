"""Connections whose entry of the table had been another's.  Pure.

The tracker makes no new entry for a SYN if the last that the old one saw came from the server, as a
RST does (`rstguard.kernel.ingress`): labels, counters and age of the connection before stay.  The
rules tell by two labels: REUSED stays, ANEW is taken away at the next sweep, together with what
had been proved of another, so that it tells the next time as well.
"""

from __future__ import annotations

from collections.abc import Iterable

from rstguard.engine.flow import Flow, Name, name_of
from rstguard.engine.ruleset import ANEW, CONFIRMED, LIKELY, REUSED


class Reused:
    """Tells what is a connection's own, from sweep to sweep; `labels` is the first label.

    What it remembers are the connections whose entries were used again, as many as the table has.
    """

    def __init__(self, labels: int) -> None:
        self._reused, self._anew = 1 << labels + REUSED, 1 << labels + ANEW
        self.stale = self._anew | 1 << labels + LIKELY | 1 << labels + CONFIRMED
        """The labels that are to be cleared of what `began` returned."""
        self.either = self._reused | self._anew
        """The labels without both of which nothing is told of a connection here."""
        self._before: dict[Name, tuple[int, int]] = {}

    def began(self, flows: Iterable[Flow]) -> list[Flow]:
        """Return those that have begun on another's entry since they were last looked at."""
        return [flow for flow in flows if flow[13] & self._anew]

    def own(self, flows: list[Flow]) -> list[Flow]:
        """Return connections with no bytes, labels or age but their own.

        Bytes count from the first look; the age is 0 then, and -1, which is to say unknown, later.
        The packets stay: they tell whether it spoke, and there were some.
        """
        last, self._before = self._before, {}
        reused = self.either
        return [self._own(flow, last) if flow[13] & reused else flow for flow in flows]

    def _own(self, flow: Flow, last: dict[Name, tuple[int, int]]) -> Flow:
        client, server = flow.client_bytes, flow.server_bytes
        labels, age = flow.labels, -1
        before = last.get(name_of(flow))
        if labels & self._anew:
            before, labels, age = None, labels & ~self.stale, 0
        if before is None:
            before = client, server
        self._before[name_of(flow)] = before
        return flow._replace(
            client_bytes=max(client - before[0], 0),
            server_bytes=max(server - before[1], 0),
            labels=labels,
            age=age,
        )
