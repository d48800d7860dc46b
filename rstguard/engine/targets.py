"""Where the connections of a service are translated to (DNAT), learned from samples of them.  Pure.

Who translates, and by which rules, is not asked: a sample tells where one connection went.  Three
cases must be told apart, of which two look alike at first:

- *moved*: the rules have changed, and from now on another server is the right one.  Known by one
  client that comes to the one after the other, or when the older one was not seen for some seconds.
- *by source*: some clients are sent to one server and others to another.  No server is right for a
  client that was not seen, so there is none.  Known by an older target that comes again.
- *shared out*: clients are sent to this server or that, whichever comes.  Each of them is right.
  Known by one client that was sent elsewhere and elsewhere again: rules that changed send it
  elsewhere once.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from rstguard.engine.ruleset import SECOND
from rstguard.engine.service import Service

REMEMBERED: Final = 60 * SECOND
"""How long (ns) a target that is seen no more counts beside others."""
SETTLED: Final = 4 * SECOND
"""How long (ns) an older target must not have been seen for the latest to be the right one."""
SHARED_FOR: Final = 600 * SECOND
"""How long (ns) targets are taken for shared out after that was last seen."""
_MOST_CLIENTS: Final = 256
_MOST_TARGETS: Final = 16
_MOVES: Final = 2


class _Sent(NamedTuple):
    """Where a client was last sent, when (ns), and how often it was sent elsewhere until then."""

    to: Service
    at: int
    moves: int


class Targets:
    """What is believed of one service: at most 16 targets, and 256 clients, the oldest go first."""

    def __init__(self) -> None:
        self._seen: dict[Service, int] = {}
        self._clients: dict[int, _Sent] = {}
        self._latest: Service | None = None
        self._again_at = -REMEMBERED - 1
        """When an older target last came again."""
        self._shared_at = -SHARED_FOR - 1
        self._moved_at = -SETTLED - 1
        """When a client was last sent elsewhere than before."""

    def seen(self, to: Service, client: int, now: int) -> None:
        """Take up that a connection of `client`, a tagged address, went to a server."""
        if to != self._latest and now - self._seen.get(to, -REMEMBERED - 1) <= REMEMBERED:
            self._again_at = now
        before = self._clients.pop(client, None)
        moves = 0
        if before is not None and now - before.at <= REMEMBERED:
            moves = before.moves + (before.to != to)
            if before.to != to:
                self._moved_at = now
        if moves >= _MOVES:
            self._shared_at = now
        if len(self._clients) >= _MOST_CLIENTS:
            del self._clients[next(iter(self._clients))]
        self._clients[client] = _Sent(to, now, moves)
        self._seen.pop(to, None)
        if len(self._seen) >= _MOST_TARGETS:
            del self._seen[next(iter(self._seen))]
        self._seen[to] = now
        self._latest = to

    def current(self, now: int) -> tuple[Service, ...]:
        """Return the servers each of which is right for any client; empty if none is known to be.

        More than one only if connections are shared out among them.
        """
        if self._latest is None:
            return ()
        recent = sorted(to for to, at in self._seen.items() if now - at <= REMEMBERED)
        if len(recent) < 2:
            return (self._latest,)
        if now - self._shared_at <= SHARED_FOR:
            return tuple(recent)
        if now - self._again_at <= REMEMBERED:
            return ()
        older = max(at for to, at in self._seen.items() if to != self._latest)
        return (self._latest,) if now - older > SETTLED or self._moved_at > older else ()

    def lapse(self, since: int) -> None:
        """Forget the targets that were not seen since `since` (ns)."""
        self._seen = {to: at for to, at in self._seen.items() if at >= since}
        if self._latest not in self._seen:
            self._latest = next(reversed(self._seen), None)
