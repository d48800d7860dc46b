"""A service in distress loses what makes no progress at it, and nobody loses anything in calm."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, Service, is_dead

pytestmark = [pytest.mark.netns, BOTH_FAMILIES]

PORT, UNKNOWN, PLAIN = 8001, 8002, 8003
CAPACITY = 60
START, LATE, END = (CAPACITY * percent // 100 for percent in (50, 80, 95))
POLICY = f"""
version: 1
name: pressure
sweep_every: 500ms
protect: {{interfaces: [out]}}
pressure: {{capacity: {{{PORT}: {CAPACITY}, {PLAIN}: {CAPACITY}}}}}
rules:
  - {{name: unanswered, measure: unanswered, over: 20s, then: reset}}
  - {{name: idle, measure: idle, ports: [{PORT}, {UNKNOWN}], over: 1s, when: pressed, then: reset}}
  - {{name: slow, measure: slow, ports: [{PORT}], after: 1s, under: 500 B/s, over_last: 10s,
     when: pressed, then: reset}}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("pressure")) as guard:
        yield guard


def asking(service: Service, count: int, address: str = "") -> list[Link]:
    """Return new connections that have sent half a request, of one source or of one each."""
    links = [service.connect(address or source(service.v6)) for _ in range(count)]
    for link in links:
        link.client.sendall(b"GET / HT")
    return links


def served(service: Service, count: int) -> list[Link]:
    """Return new connections that were answered."""
    links = [service.connect(source(service.v6)) for _ in range(count)]
    for link in links:
        link.talk()
    return links


def sweeps(guard: Guard) -> int:
    return int(guard.status()["counts"].get("sweeps", 0))


def alive(links: list[Link]) -> int:
    return sum(not is_dead(link.client) for link in links)


def settled(guard: Guard, links: list[Link]) -> int:
    """Return how many are alive once eight sweeps in a row have ended none of them: two seconds."""
    since, before = sweeps(guard), alive(links)

    def is_settled() -> bool:
        nonlocal since, before
        done, now = sweeps(guard), alive(links)
        if now != before:
            since, before = done, now
        return done >= since + 8

    wait_until(is_settled, 20)
    return before


def calm_down(guard: Guard, service: Service) -> None:
    """Wait until nothing of a service is pressed any more."""
    service.close()
    wait_until(lambda: guard.status()["pressure"] == [], 30)


def test_in_calm_nobody_is_touched(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(PORT, v6)
    links = asking(service, START - 6) + served(service, 6)
    done, since = sweeps(guard), time.monotonic()
    wait_until(lambda: sweeps(guard) >= done + 6)
    assert time.monotonic() - since > 2  # more than any rule allows under pressure
    assert alive(links) == START
    assert guard.status()["pressure"] == []


def test_who_makes_no_progress_goes_and_the_others_stay(
    guard: Guard, serve: Open, v6: bool
) -> None:
    service = serve(PORT, v6)
    polls = served(service, 10)
    for link in polls:
        link.client.sendall(b"and next?")
    bots = asking(service, CAPACITY)
    assert settled(guard, polls) == 10
    assert settled(guard, bots) == START - 10
    assert not any(is_dead(link.client) for link in bots[-5:])  # the youngest
    for link in served(service, 10):  # honest ones come and are served all the while
        link.close()
    bots[0].wait_reset()
    shown = guard.status()["pressure"]
    name = f"[{service.address}]:{PORT}" if v6 else f"{service.address}:{PORT}"
    assert [(row["service"], row["start"]) for row in shown] == [(name, START)]
    assert f"PRESSED {name}" in guard.cli("top", "--once").stdout
    assert f"{name}, " in guard.cli("status").stdout
    assert guard.events("reset", "unanswered") + guard.events("reset", "idle") >= CAPACITY - START
    calm_down(guard, service)
    assert guard.events("calm", "calm") >= 1
    assert guard.events("pressed", "pressed") >= 1


def test_who_holds_many_goes_before_others(guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(PLAIN, v6)
    single = asking(service, 15)
    hoard = asking(service, CAPACITY, source(v6))
    assert settled(guard, hoard) <= END - 15
    assert alive(single) == 15
    calm_down(guard, service)


def test_what_was_served_stays_unless_a_capacity_is_stated(
    guard: Guard, serve: Open, v6: bool
) -> None:
    unknown = serve(UNKNOWN, v6)
    quiet = served(unknown, 100)
    bots = asking(unknown, 120)
    wait_until(lambda: guard.status()["pressure"] != [], 20)
    assert settled(guard, quiet) == 100
    assert settled(guard, bots) == 100  # twice what it bore
    calm_down(guard, unknown)
    stated = serve(PORT, v6)
    quiet = served(stated, CAPACITY - 2)
    assert settled(guard, quiet) == LATE
    calm_down(guard, stated)
