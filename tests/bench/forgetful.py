"""Mixed traffic through a gateway whose tracker forgets again and again, with a guard and without.

Every kind of traffic (`_PLACES` x `_TRAFFIC`) goes on at once while the uplink flaps and the table
is flushed in turns, half of the time with one service over its SYN budget; INVALID dropped in
FORWARD or not.  Runs with a guard and without take turns.  What a run without a guard loses is not
asked of one with it.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.support.budget import Flood
from tests.support.forgetting import (
    FORGETTING,
    Outward,
    invalid_dropped,
    masquerading,
    strays,
    streams,
    turned,
)
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import give_sources, source
from tests.support.stream import Stream
from tests.support.traffic import Link, Service

_SECONDS = 60.0
_ROUNDS = 2
_TURNS = 8
_EVERY = 0.01
"""Seconds between what a stream sends: the traffic is not to be slowed by what sends it."""
_PROTECTED, _MASKED, _BUDGET, _OTHER, _BEHIND, _PLAIN = range(8201, 8207)
_OF_BUDGET = "protected, with a budget"
_PLACES = {
    "protected": _PROTECTED,
    "protected, masqueraded inward": _MASKED,
    _OF_BUDGET: _BUDGET,
    "not protected": _OTHER,
    "outward, masqueraded": _BEHIND,
    "outward": _PLAIN,
}
_BUSY = ("upload", "download")
_IDLE = ("idle, client goes on", "idle, server goes on")
_NEW = "new"
_BY_COOKIE = ", maybe begun by a cookie"
"""Their numbers are translated by the entry alone: without it nobody can go on."""
_POLICY = f"""\
version: 1
name: forgetful
protect: {{interfaces: [out], ports: [{_PROTECTED}, {_MASKED}, {_BUDGET}]}}
syn_budget: {{rate: 200/s, half_open: 4096, ports: [{_BUDGET}]}}
rules:
  - {{name: strays, measure: out_of_state, over: 20/s, burst: 20, then: ban, for: 10m}}
  - {{name: rate, measure: connection_rate, over: 50/s, burst: 50, then: ban, for: 10m}}
  - {{name: hoard, measure: connections, over: 100, then: reset}}
"""
_BY_CHANCE = 2
"""Of masqueraded ones some more: if an ACK from outside comes before the next segment from inside,
the gateway itself answers it with a RST, guarded or not."""
_FLOODED_FLUSHES = 4
_FLOODED_SECONDS = 20.0


class _When(NamedTuple):
    """What happens in a turn."""

    forgets: str
    flooded: bool

    def __str__(self) -> str:
        return f"{self.forgets}, {'over' if self.flooded else 'within'} its budget"


class _Came:
    """What came of a run."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        """Connections that did not go on, and new ones that failed, by the kind of traffic."""
        self.carried: Counter[tuple[str, _When]] = Counter()
        """Bytes of streams, by the kind of traffic and what happened meanwhile."""
        self.seconds: dict[_When, float] = defaultdict(float)
        """How long it went on: who waits for what is lost has a longer turn."""
        self.harmed = 0
        """Bans, shuns and resets."""

    def share(self, of: _Came, when: _When | None = None) -> float:
        """Return the bytes against those of another run, of what the other has kept."""
        keys = [key for key in of.carried if not of.lost[key[0]] and when in (None, key[1])]
        return self._rate(keys) / of._rate(keys)

    def _rate(self, keys: list[tuple[str, _When]]) -> float:
        return sum(self.carried[key] / self.seconds[key[1]] for key in keys)


class _Place:
    """A service, and the traffic to it."""

    def __init__(self, name: str, connect: Callable[[], Link]) -> None:
        self.name, self._connect = name, connect
        self.cookies = False
        """Whether a new connection may be given a cookie, if the service has a budget."""
        self.idle: list[tuple[str, Link]] = []
        self.busy: dict[str, tuple[Link, Stream]] = {}

    def connect(self) -> Link:
        """Return a new connection that works; as a download is begun by its client, too."""
        link = self._connect()
        link.talk()
        return link

    def start(self, traffic: str) -> None:
        """Begin a stream, in place of one that was lost."""
        link = self.connect()
        stream = Stream(link if traffic == "upload" else turned(link), _EVERY)
        stream.__enter__()
        self.busy[traffic] = link, stream

    def stop(self, traffic: str) -> None:
        """End a stream, whatever state it is in."""
        link, stream = self.busy.pop(traffic)
        for end in (link.client, link.server):
            with contextlib.suppress(OSError):
                end.shutdown(2)
        stream.__exit__()

    def works(self) -> bool:
        """Tell whether a new connection is served."""
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def resume(self) -> list[str]:
        """Go on with what was idle, and return what does not; what comes next is begun now."""
        lost = []
        for traffic, link in self.idle:
            try:
                (link if traffic.startswith(_IDLE[0]) else turned(link)).talk()
            except OSError:
                lost.append(f"{self.name}: {traffic}")
            link.close()
        by = _BY_COOKIE if self.cookies and self.name == _OF_BUDGET else ""
        self.idle = [(traffic + by, self.connect()) for traffic in _IDLE]
        return lost


def forgetful() -> Iterator[Figure]:
    """8 flaps and 8 flushes in a minute of mixed traffic."""
    yield from _compared(drops=False)


def forgetful_dropped() -> Iterator[Figure]:
    """The same where the gateway drops what is INVALID."""
    yield from _compared(drops=True)


def _compared(drops: bool) -> Iterator[Figure]:
    alone, guarded = [], []
    with ThreeHosts("rgm") as lab:
        give_sources(lab)
        with invalid_dropped(lab) if drops else contextlib.nullcontext():
            for number in range(_ROUNDS):
                alone.append(_run(lab, None))
                with Guard(lab, _POLICY, lab.directory / f"guard{number}") as guard:
                    guarded.append(_run(lab, guard))
    yield from _figures(alone, guarded, "INVALID dropped" if drops else "INVALID passes")


def forgetful_flooded() -> Iterator[Figure]:
    """Flushes and flaps during 60,000 stray ACKs a second."""
    kept: dict[bool, list[float]] = {False: [], True: []}
    rates = []
    with ThreeHosts("rgm") as lab:
        give_sources(lab)
        for number, guarded in itertools.product(range(_ROUNDS), (False, True)):
            with contextlib.ExitStack() as stack:
                if guarded:
                    place = lab.directory / f"guard{number}"
                    stack.enter_context(Guard(lab, _POLICY, place))
                carried, rate = _flooded(lab)
            kept[guarded].append(carried)
            rates.append(rate)
    most = f"{2 * _FLOODED_FLUSHES} flushes and flaps in {_FLOODED_SECONDS:.0f} s"
    yield seen("forgetful: stray ACKs a second", rates, "")
    alone = min(kept[False])
    yield at_least(alone, "forgetful: uploads kept in the flood, of 4", kept[True], "", most)
    yield seen("forgetful: the same without a guard", kept[False], "")


def _flooded(lab: ThreeHosts) -> tuple[float, float]:
    """Return how many of four uploads outlive a flood of strays, and its rate."""
    service = Service(lab, _PROTECTED)
    links = {str(number): service.connect(source(False)) for number in range(4)}
    for link in links.values():
        link.talk()
    with (
        contextlib.closing(service),
        tempfile.TemporaryDirectory() as place,
        streams(links) as running,
        strays(lab, Path(place), _PROTECTED, "33,drnd(3)"),
    ):
        began, before = time.monotonic(), _came_in(lab)
        for turn in range(2 * _FLOODED_FLUSHES):
            _until(began + _FLOODED_SECONDS * (turn + 0.5) / (2 * _FLOODED_FLUSHES))
            FORGETTING[("flap", "flush")[turn % 2]](lab)
        _until(began + _FLOODED_SECONDS)
        rate = (_came_in(lab) - before) / (time.monotonic() - began)
        marks = {name: one.received for name, one in running.items()}
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: all(running[n].received > had for n, had in marks.items()), 20)
        going = [n for n, one in running.items() if one.received > marks[n]]
        kept = sum(not running[name].problems for name in going)
    return kept, rate


def _came_in(lab: ThreeHosts) -> int:
    with lab.inside("gateway"):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return next(int(line.split()[2]) for line in lines if line.split()[0] == "out:")


def _figures(alone: list[_Came], guarded: list[_Came], how: str) -> Iterator[Figure]:
    more = f"{_TURNS} flaps and {_TURNS} flushes in {_SECONDS:.0f} s"
    for traffic in [f"{p}: {t}" for t in (*_BUSY, *_IDLE, _NEW) for p in _PLACES]:
        lost = [one.lost[traffic] for one in alone]
        most = max(lost) + (_BY_CHANCE if "masqueraded" in traffic else 0)
        name = f"forgetful, {how}: lost, {traffic} (alone: {max(lost)})"
        yield at_most(most, name, [one.lost[traffic] for one in guarded], "", more)
    for traffic in [f"{_OF_BUDGET}: {t}{_BY_COOKIE}" for t in _IDLE]:
        name = f"forgetful, {how}: lost, {traffic}"
        yield seen(name, [one.lost[traffic] for one in guarded], "", more)
    pairs = list(zip(guarded, alone, strict=True))
    for when in itertools.starmap(_When, itertools.product(FORGETTING, (False, True))):
        name = f"forgetful, {how}: bytes against the control, {when}"
        yield at_least(0.9, name, [mine.share(other, when) for mine, other in pairs], "")
    shares = [mine.share(other) for mine, other in pairs]
    yield at_least(0.9, f"forgetful, {how}: bytes against the control", shares, "")
    megabytes = [sum(one.carried.values()) * 1e-6 for one in alone]
    yield seen(f"forgetful, {how}: carried by the control", megabytes, "MB")
    harmed = [one.harmed for one in guarded]
    yield at_most(0, f"forgetful, {how}: banned, shunned or reset", harmed, "")


def _run(lab: ThreeHosts, guard: Guard | None) -> _Came:
    came = _Came()
    with _traffic(lab) as (places, flood):
        if guard is not None:
            wait_until(lambda: len(guard.status()["syn_budget"]["services"]) > 0)
        began = time.monotonic()
        for turn in range(2 * _TURNS):
            when = _When(("flap", "flush")[turn % 2], turn % 4 > 1)
            for place in places:
                place.cookies = turn % 4 != 1  # a service is over it for a while behind the flood
            with flood() if when.flooded else contextlib.nullcontext():
                _turn(lab, places, when, came, began + _SECONDS * turn / (2 * _TURNS))
    counts = guard.status()["counts"] if guard is not None else {}
    came.harmed = sum(sum(counts.get(kind, {}).values()) for kind in ("ban", "shun", "reset"))
    return came


def _turn(lab: ThreeHosts, places: list[_Place], when: _When, came: _Came, began: float) -> None:
    """Let the tracker forget once, and look at what goes on."""
    length = _SECONDS / (2 * _TURNS)
    streams = [(p.name, t, one) for p in places for t, (_, one) in p.busy.items()]
    before = [one.received for _, _, one in streams]
    since = time.monotonic()
    _until(began + length / 4)
    FORGETTING[when.forgets](lab)
    for place in places:
        came.lost[f"{place.name}: {_NEW}"] += not place.works()
    _until(began + length / 2)
    with ThreadPoolExecutor(len(places)) as pool:  # what is lost is waited for
        for lost in pool.map(_Place.resume, places):
            came.lost.update(lost)
    _until(began + length)
    came.seconds[when] += time.monotonic() - since
    for (name, traffic, one), had in zip(streams, before, strict=True):
        came.carried[f"{name}: {traffic}", when] += 8 * (one.received - had)
    for place in places:
        for traffic in _stuck(place):
            came.lost[f"{place.name}: {traffic}"] += 1
            place.stop(traffic)
            place.start(traffic)


def _stuck(place: _Place) -> list[str]:
    """Return which streams of a place do not go on, though they are given time."""
    before = {traffic: one.received for traffic, (_, one) in place.busy.items()}

    def is_settled(traffic: str) -> bool:
        one = place.busy[traffic][1]
        return bool(one.problems) or one.received > before[traffic]

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: all(map(is_settled, before)), 10)
    streams = {traffic: one for traffic, (_, one) in place.busy.items()}
    return [t for t, one in streams.items() if one.problems or one.received <= before[t]]


@contextlib.contextmanager
def _traffic(lab: ThreeHosts) -> Iterator[tuple[list[_Place], Callable[[], Flood]]]:
    """Yield all traffic, and what takes a service over its SYN budget."""
    with contextlib.ExitStack() as stack:
        places, address = [], source(False)
        for name, port in _PLACES.items():
            outward = port in (_BEHIND, _PLAIN)
            service = Outward(lab, port) if outward else Service(lab, port)
            stack.callback(service.close)
            service.masked |= port == _MASKED
            places.append(_Place(name, _connecting(service, address)))
        stack.enter_context(masquerading(lab, _BEHIND))
        stack.enter_context(masquerading(lab, _MASKED, "in"))
        for place, traffic in itertools.product(places, _BUSY):
            place.start(traffic)
            stack.callback(place.stop, traffic)
        for place in places:
            place.resume()
        yield places, lambda: Flood(lab, SERVER4, _BUDGET)


def _connecting(service: Service, address: str) -> Callable[[], Link]:
    if isinstance(service, Outward):
        return service.reach
    return lambda: service.connect(address)


def _until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
