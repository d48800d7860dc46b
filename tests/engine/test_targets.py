"""Where a service's connections go, told by samples: moved, shared out, or by source."""

from __future__ import annotations

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.offers import Offer, Offers
from rstguard.engine.ruleset import SECOND
from rstguard.engine.service import Service
from rstguard.engine.targets import REMEMBERED, SETTLED, SHARED_FOR, Targets

A, B, C = (Service(parse_address(f"10.0.0.{n}"), 80) for n in (1, 2, 3))
SERVERS = {"A": A, "B": B, "C": C}
WEB = Service(parse_address("203.0.113.1"), 80)
FULL = Offer(1460, 7, sack=True, timestamps=True)


def run(samples: str) -> Targets:
    """Take up samples like "A1 B2": a server and a client's number, one a second."""
    targets = Targets()
    for second, sample in enumerate(samples.split()):
        targets.seen(SERVERS[sample[0]], int(sample[1:]), second * SECOND)
    return targets


@pytest.mark.parametrize(
    ("samples", "right"),
    [
        ("A1", "A"),
        ("A1 A2 A1", "A"),
        ("A1 A2 B1 B2", "B"),  # moved: a client came to the one after the other
        ("A1 A2 B3", ""),  # moved, or by source
        ("A1 A2 B3 B4 B5 B6 B7", "B"),  # the older one was not seen for some seconds
        ("A1 B2 A3", ""),  # by source, or not yet known to be shared out
        ("A1 B2 A1 B2 A3", ""),
        ("A1 B1 A1", "AB"),  # one client was sent to both, and back
        ("A1 B1 C1", "ABC"),
        ("A1 B2 A2", ""),
    ],
)
def test_samples_tell_which_servers_are_right(samples: str, right: str) -> None:
    targets = run(samples)
    found = targets.current(len(samples.split()) * SECOND)
    assert found == tuple(SERVERS[name] for name in right)


def test_what_is_seen_no_more_counts_no_more() -> None:
    targets, later = run("A1 B2 A3"), 3 * SECOND + REMEMBERED
    targets.seen(A, 4, later)
    assert targets.current(later) == (A,)
    shared = run("A1 B1 A1 B2")
    later = 5 * SECOND + SHARED_FOR
    shared.seen(A, 1, later)
    shared.seen(B, 2, later + SECOND)
    assert shared.current(later + SECOND) == ()
    assert shared.current(later + SETTLED + SECOND) == (B,)


def test_one_that_does_not_answer_any_more_lapses() -> None:
    targets = run("A1 B1 A1 B1")
    targets.lapse(3 * SECOND)
    assert targets.current(3 * SECOND) == (B,)
    targets.lapse(4 * SECOND)
    assert targets.current(4 * SECOND) == ()


def test_it_is_bounded() -> None:
    targets = Targets()
    for number in range(10_000):
        targets.seen(Service(number, 80), number, number)
    assert len(targets.current(10_000)) <= 16


def test_a_service_that_leads_nowhere_for_sure_is_not_known() -> None:
    offers = Offers()
    assert offers.learn(WEB, FULL, 0, A, 1)
    assert offers.known == {WEB: FULL._replace(to=(A,))}
    assert offers.learn(WEB, FULL, SECOND, B, 2)
    assert offers.known == {}
    assert offers.learn(WEB, FULL, 6 * SECOND, B, 2)
    assert offers.known[WEB].to == (B,)
    assert offers.learn(WEB, FULL, 7 * SECOND, A, 3)
    assert offers.known == {}
    assert offers.learn(WEB, FULL, 8 * SECOND)  # nothing is translated any more
    assert offers.known == {WEB: FULL}


def test_a_lapse_is_a_change_of_what_is_known_once() -> None:
    offers = Offers()
    offers.learn(WEB, FULL, 0, A, 1)
    assert not offers.lapse([WEB], 0)
    assert offers.lapse([WEB], SECOND)
    assert offers.known == {}
    assert not offers.lapse([WEB], SECOND)
    assert offers.learn(WEB, FULL, 2 * SECOND, A, 1)
