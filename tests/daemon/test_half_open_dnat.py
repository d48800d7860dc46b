"""Open handshakes of services behind DNAT: the server's backlog stays free, and rules are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rstguard.lab.waiting import wait_until
from tests.daemon.test_dnat import Forwarding, half_open, learned, redirected, served, serves
from tests.daemon.test_half_open import DARK4, DARK6, MOST, SMALL
from tests.support.budget import engaged, over_budget, state_of
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, ROUTER4, ROUTER6, source
from tests.support.traffic import Open

pytestmark = pytest.mark.netns

INNER, OUTER, FORBIDDEN, REDIRECTED = 8011, 8100, 8101, 8102


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    ways = [(DARK4, ROUTER4), (DARK6, ROUTER6)]
    for network, router in ways:
        lab.ip("gateway", f"route replace {network} via {router}")
    with Guard(lab, SMALL, tmp_path_factory.mktemp("behind")) as guard:
        yield guard
    for network, _ in ways:
        lab.ip("gateway", f"route del {network}")


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize(
    ("v6", "masked"),
    [(False, False), (True, False), (False, True)],
    ids=["IPv4", "IPv6", "masqueraded"],
)
def test_a_forged_flood_fills_no_backlog(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, masked: bool
) -> None:
    service, visitor = served(serve, OUTER, INNER, v6=v6), source(v6)
    service.masked = masked
    with Forwarding(lab, OUTER, INNER, v6, masked=masked):
        learned(guard, service, INNER)
        service.connect(visitor).talk()
        with over_budget(lab, guard, service) as flood:
            sent = flood.sent
            service.connect(visitor, timeout=0.5).talk()
            before = guard.status()["syn_budget"]["cookies"]["accepted"]
            for _ in range(2):  # a newcomer waits for his second SYN
                link = service.connect(source(v6))
                link.talk()
                link.talk()
            wait_until(lambda: flood.sent - sent > 5_000)
            assert half_open(lab, INNER) <= 2 * MOST + 20
        accepted = guard.status()["syn_budget"]["cookies"]["accepted"]
        wait_until(lambda: accepted - before == 2 or not engaged(guard, service))
        service.connect(visitor).talk()
        wait_until(lambda: half_open(lab, INNER) < MOST, 15)  # by itself it would take a minute


@BOTH_FAMILIES
def test_what_others_rules_forbid_stays_forbidden(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, kept_out = served(serve, FORBIDDEN, INNER, v6=v6), source(v6)
    tool = "ip6tables" if v6 else "iptables"
    rule = ("FORWARD", "-s", kept_out, "-p", "tcp", "--syn", "--dport", str(INNER), "-j", "DROP")
    with Forwarding(lab, FORBIDDEN, INNER, v6):
        learned(guard, service, INNER)
        lab.run("gateway", tool, "-w", "-A", *rule)
        try:
            with over_budget(lab, guard, service):
                assert serves(service, source(v6))
                with pytest.raises(OSError, match="timed out"):
                    service.connect(kept_out, timeout=3.5).talk()
        finally:
            lab.run("gateway", tool, "-w", "-D", *rule)
        assert not service.waiting()


def test_a_port_that_is_redirected_to_the_gateway_itself_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    with redirected(lab, serve, REDIRECTED, INNER) as service:
        wait_until(lambda: serves(service, source(False)) and state_of(guard, service) is not None)
        with over_budget(lab, guard, service):
            for _ in range(3):
                service.connect(source(False)).talk()
            listed = lab.run("gateway", "ss", "-tnH", "state", "syn-recv", f"( sport = :{INNER} )")
            assert len(listed.splitlines()) <= 2 * MOST + 20
