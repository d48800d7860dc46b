"""Connections that are older than the guard: which of them it takes under its rules.

A connection is guarded because its first SYN came in on a protected interface.  For one that began
before the guard did, the connection table no longer tells the interface; the routing table does: it
is taken in if its target is protected, its client is not trusted, and the way back to the client
leads out of a protected interface.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Collection, Sequence

from rstguard.engine.ruleset import Scope
from rstguard.kernel.marks import GUARDED, PROVEN
from rstguard.kernel.seam import Connections

log = logging.getLogger(__name__)

_MOST_ROUTES = 100_000
"""Different clients whose route is asked for, at about 10 µs each."""


Ways = Callable[[Sequence[int]], list[str]]
"""Tells the interface that the route to each address leads out of (`rstguard.kernel.routes`)."""


def adopt_existing(table: Connections, scope: Scope, ways: Ways) -> int:
    """Mark the older connections that the scope covers as guarded; return how many.

    Raises:
        KernelError: the connection table cannot be read or changed.
    """
    candidates = [
        flow
        for flow in table.dump(0, GUARDED)
        if flow.seen_reply
        and scope.protects(flow.original.destination, flow.original.destination_port)
        and not scope.trusts(flow.original.source)
    ]
    outside = _outside({flow.original.source for flow in candidates}, scope.interfaces, ways)
    adopted = [flow for flow in candidates if flow.original.source in outside]
    bits = GUARDED | PROVEN
    return sum(1 for code in table.set_mark(adopted, bits, bits) if code == 0) if adopted else 0


def _outside(clients: set[int], patterns: Collection[str], ways: Ways) -> set[int]:
    """Return the clients to whom the route leads out of an interface that fits a pattern."""
    if len(clients) > _MOST_ROUTES:
        log.warning(
            "%d clients have connections older than the guard; only %d of them are looked at",
            len(clients),
            _MOST_ROUTES,
        )
        clients = set(list(clients)[:_MOST_ROUTES])
    asked = list(clients)
    # Where no way leads back to it, a client is not on a protected interface either.
    return {
        client
        for client, name in zip(asked, ways(asked), strict=True)
        if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
