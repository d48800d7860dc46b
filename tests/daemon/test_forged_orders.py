"""Forged RSTs with forged SYNs around them, which have the tracker forget what a RST has closed."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

from rstguard.engine.wire import ACK, RST, SYN
from rstguard.lab.waiting import wait_until
from tests.support.beside import beside
from tests.support.forged import Since, segment_of, send_at_once
from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, source
from tests.support.traffic import Link, Open, Service

pytestmark = pytest.mark.netns

COUNT = 5
ORDERS = [
    (RST, SYN),
    (RST | ACK, SYN),
    (SYN, RST, SYN),
    (RST, SYN, RST),
    (RST, SYN | ACK, SYN),
]
NAMES: dict[str, list[tuple[str, str]]] = {
    "server": [(one, other) for one in ("client", "server") for other in ("client", "server")],
    "gateway": [("client", "client")],
}
"""By where the service is: in whose names RST and SYN can come through the rules."""
_ports = itertools.count(8630)


def service(serve: Open, place: str, v6: bool) -> Service:
    made = serve(next(_ports), v6, place)
    if place == "gateway":
        made.address = OUTSIDE6 if v6 else OUTSIDE4
    return made


def at_once(lab: ThreeHosts, link: Link, order: tuple[int, ...], names: tuple[str, str]) -> None:
    """Forge segments, the RSTs in one name and the SYNs in the other, with no time in between."""
    whose = [names[bool(flags & SYN)] for flags in order]
    made = [(name, segment_of(link, f, name)) for name, f in zip(whose, order, strict=True)]
    send_at_once(lab, *made)


@BOTH_FAMILIES
@pytest.mark.parametrize("place", NAMES)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(f"{f:02x}" for f in order))
def test_syns_around_a_forged_reset_end_nothing(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool, place: str, order: tuple[int, ...]
) -> None:
    web = service(serve, place, v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(COUNT * len(NAMES[place]))]
    for link, names in zip(links, itertools.cycle(NAMES[place]), strict=False):
        link.talk()
        at_once(lab, link, order, names)
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    for link in links:
        link.talk()
    assert since.counts("unconfirmed_resets") == since.counts("honest_resets") == 0


@BOTH_FAMILIES
def test_they_end_no_busy_connection(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    web = service(serve, "server", v6)
    links = [web.connect(source(v6)) for _ in range(COUNT)]
    for link in links:
        link.talk()
    since = Since(holding)

    def talk() -> None:
        for link in links:
            link.talk()

    # With pauses in which numbers that were read stay the right ones.
    with beside(talk, 0.05):
        for _ in range(10):
            for link in links:
                at_once(lab, link, (RST, SYN), ("client", "client"))
    wait_until(lambda: since.counts("forged_resets") > 0)
    for link in links:
        link.talk()
    assert since.counts("unconfirmed_resets") == since.counts("honest_resets") == 0


@BOTH_FAMILIES
def test_a_syn_behind_a_lost_reset_has_it_asked_for(
    lab: ThreeHosts, serve: Open, holding: Guard, v6: bool
) -> None:
    """More RSTs come than may wait, and are dropped; the SYN comes when no other waits."""
    web = service(serve, "server", v6)
    since = Since(holding)
    links = [web.connect(source(v6)) for _ in range(COUNT)]
    for link in links:
        link.talk()
    asker = holding.status()["asker"]["pid"]
    for link in links:
        at_once(lab, link, (RST,) * 20, ("client", "client"))
    os.kill(asker, signal.SIGSTOP)
    try:
        for link in links:
            at_once(lab, link, (RST,) * 20 + (SYN,), ("client", "client"))
    finally:
        os.kill(asker, signal.SIGCONT)
    wait_until(lambda: since.counts("forged_resets") >= len(links))
    wait_until(lambda: since.counts("waiting_resets") == 0)
    for link in links:
        link.talk()
    assert since.counts("unconfirmed_resets") == since.counts("honest_resets") == 0
