"""Which services are in distress, by signs that nobody can forge, and how patient each still is.

Three signs, all from the kernel's connection table, and of completed handshakes alone:

- *It holds more than it bore.*  What a service bore is the most connections that it served at
  once: on which it has sent data, of which it has taken in 256 kB, or which it has kept for a day
  (ten minutes, if they are older than the guard).  Connections that ask and are not answered teach
  nothing, so that an attack does not become what is normal.  What it bore is forgotten by half a
  day after day, and never less than `LEAST_BORNE`.  A service is pressed from twice that on; where
  an administrator states a capacity, from half of that on.
- *Clients that have returned a SYN cookie wait for its SYN-ACK.*
- *It closes connections before it has sent a byte*, by a FIN of its own.

The last two must concern half of all connections of the last seconds.  A client with many real
addresses can bring them about at some services, so they alone shorten patience by no more than
half, and never concern connections that were served.

Times are in nanoseconds; nothing here knows a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from rstguard.engine.ruleset import SECOND

LEAST_BORNE: Final = 64
"""What any server bears: so many connections teach nothing, and twice as many press nobody."""
BORNE_AFTER: Final = 86400 * SECOND
"""A connection so old is borne by its server, whatever came of it.  Who holds as many as press
nobody, to be taken for what is normal, doubles that once in this time, as it is halved."""
OLDER_BORNE_AFTER: Final = 600 * SECOND
"""The same of connections older than the guard, which bear no labels: no server waits for longer
for the rest of a request."""
RECENT: Final = 5 * SECOND
"""The age up to which connections tell how a service takes in new ones."""
UNANSWERED_AFTER: Final = SECOND
"""How long a proven SYN may wait for its answer: a first one that was lost is repeated by then."""
FEWEST_FAILING: Final = 8
"""Fewer connections that a service failed to serve in that time say nothing."""
FAST: Final = SECOND // 4
"""How often the table is read while some service is pressed, or soon will be."""
MOST_SERVICES: Final = 4096
"""Services of which it is kept what they bore: those that bore the most."""
SHORTEST: Final = SECOND // 4
"""Patience is never shorter: less than a look apart nothing can be told."""

_HALVED_AFTER: Final = 86400 * SECOND
_CALM_AFTER: Final = 10 * SECOND
_START, _CALM, _LATE, _END = 50, 40, 80, 95  # percent of a capacity
_MIDDLE: Final = (_START + _END) / 200
"""The load at which patience is half of what it is at first."""


class Load(NamedTuple):
    """What the table tells of one service: its live connections, and the recent ones."""

    live: int
    """But those that strangers can have made in anybody's name (`Grades.is_doubtful`)."""
    borne: int
    """Of these those that it has served, or kept for long."""
    begun: int
    """All of the last `RECENT`, open or over."""
    failing: int
    """Of these those that it left unanswered, or closed before a byte."""


class Room(NamedTuple):
    """How full a pressed service is, in connections.

    From `start` on patience shrinks, from `late` on for connections that were served as well, and
    at `end` nothing is left of it.  `late` is None where nobody has stated a capacity.  `coming` is
    how many more are expected by the next look, if more come than go; where no capacity is stated
    none, as there the end is no more than a guess, and nobody is turned away beyond it.
    """

    live: int
    start: int
    late: int | None
    end: int
    coming: int = 0

    def patience(self, whole: int, live: int, *, served: bool) -> int | None:
        """Return how long a connection may go without progress, or None: as long as it likes.

        `whole` is the time at the start mark; with `live` connections it has shrunk in proportion
        to what is left up to the end mark, as pf's adaptive timeouts do.  What is left for those
        never served is what the next look will find: who comes before it is not to find it full.
        """
        start = self.late if served else self.start
        if start is None or live <= start:
            return None
        expected = live if served else live + self.coming
        left = max(self.end - expected, 0) * whole // max(self.end - start, 1)
        return max(left, SHORTEST)


@dataclass(slots=True)
class _State:
    """What is remembered of a service."""

    bore: float = 0.0
    pressed: bool = False
    strained: int = 0
    """When it last showed a sign."""
    live: int = 0
    coming: int = 0
    """How many more it held by one look than by the one before, of late."""


class Pressure:
    """Keeps what is known of services, look by look."""

    def __init__(self) -> None:
        self.capacity: Mapping[int, int] = {}
        """Of a port: how many connections its server can hold."""
        self.pressed: dict[int, Room] = {}
        """The services in distress, by destination and port as rules count `per: service`."""
        self.urgent = False
        """Whether some service is pressed, or will be before long if it goes on as of late."""
        self._states: dict[int, _State] = {}
        self._looked: int | None = None

    @property
    def least(self) -> int:
        """Live connections below which nothing needs to be told of a service that fails nobody."""
        return min((LEAST_BORNE, *(one * _CALM // 100 for one in self.capacity.values())))

    def look(self, loads: Mapping[int, Load], now: int) -> None:
        """Take in what services carry.

        `loads` has every service with `least` live connections, or of which some fail.
        """
        share = self._share(now)
        self._decay(now)
        self.pressed, self.urgent = {}, False
        for service in sorted(loads.keys() | self._states.keys()):
            load = loads.get(service, _NOTHING)
            state = self._states.setdefault(service, _State())
            state.bore = max(state.bore, load.borne)
            grown, state.live = load.live - state.live, load.live
            # What was ended in between hides who came: half of what came before is still expected.
            state.coming = max(int(grown * share), state.coming // 2)
            room = self._room(service, state, load)
            if self._is_strained(state, room, load):
                state.pressed, state.strained = True, now
            elif now - state.strained >= _CALM_AFTER:
                state.pressed = False
            if state.pressed:
                self.pressed[service] = room
            self.urgent |= state.pressed or load.live + grown > room.start
        self._forget()

    def _share(self, now: int) -> float:
        """Return the part of what came since the last look that is expected by the next one.

        All of it when that was read as often as it can be, however slow that was.
        """
        if self._looked is None:
            return 0.0
        return 1.0 if self.urgent else min(FAST / max(now - self._looked, 1), 1.0)

    def _decay(self, now: int) -> None:
        elapsed = now - self._looked if self._looked is not None else 0
        self._looked = now
        kept = 0.5 ** (elapsed / _HALVED_AFTER)
        for state in self._states.values():
            state.bore *= kept

    def _room(self, service: int, state: _State, load: Load) -> Room:
        capacity = self.capacity.get(service & 0xFFFF)
        size = capacity or 200 * max(int(state.bore), LEAST_BORNE) // _START
        late = size * _LATE // 100 if capacity else None
        coming = state.coming if capacity else 0
        if _fails(load):
            # Whatever it can hold: it is what it holds now that is too much for it.
            size = min(size, int(load.live / _MIDDLE))
        return Room(load.live, size * _START // 100, late, size * _END // 100, coming)

    @staticmethod
    def _is_strained(state: _State, room: Room, load: Load) -> bool:
        calm = room.start * _CALM // _START
        return _fails(load) or load.live > (calm if state.pressed else room.start)

    def _forget(self) -> None:
        """Keep what differs from what is believed of a service that is not known."""
        kept = {
            service: state
            for service, state in self._states.items()
            if state.pressed or state.bore > LEAST_BORNE or state.live
        }
        if len(kept) > MOST_SERVICES:
            order = sorted(kept, key=lambda one: (not kept[one].pressed, -kept[one].bore, one))
            kept = {service: kept[service] for service in order[:MOST_SERVICES]}
            self.pressed = {one: room for one, room in self.pressed.items() if one in kept}
        self._states = kept


_NOTHING: Final = Load(0, 0, 0, 0)


def _fails(load: Load) -> bool:
    return load.failing >= FEWEST_FAILING and 2 * load.failing >= load.begun
