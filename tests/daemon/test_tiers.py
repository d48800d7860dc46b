"""A rule that the kernel can count for: the same policy does the same in both tiers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import TcpState
from rstguard.engine.segment import emit
from rstguard.engine.wire import SYN, Packet
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import states
from rstguard.lab.waiting import wait_until
from tests.support.budget import over_budget, state_of
from tests.support.forged import entry_state
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, network_of, source
from tests.support.traffic import Link, Open, Service, answer, connect, refused, retransmissions

pytestmark = pytest.mark.netns

PORT, OTHER = 8001, 8002
FIRST, LAST = 9001, 9060
BUDGET = 100
TRUSTED = {False: "10.255.9.1", True: "fd73:0:ff::1"}

RATE = "measure: syn_rate, over: 1/m, burst: 3, then: drop"
FAST = "measure: syn_rate, over: 5/s, burst: 2, then: drop"
WIDE = "measure: syn_rate, per: {ipv4: 24, ipv6: 48}, over: 1/m, burst: 3, then: drop"
REFUSED = "measure: syn_rate, over: 1/m, burst: 3, then: reset"
SLOW = "measure: syn_rate, over: 1/m, burst: 10, then: drop"


def policy(offload: str, *rules: str, name: str = "limit", mode: str = "enforce") -> str:
    """Return a policy whose first rule is the one that both tiers can count for."""
    first, *more = rules
    listed = ", ".join(f"{{{rule}}}" for rule in (f"name: {name}, {first}", *more))
    return f"""
version: 1
mode: {mode}
offload: {offload}
protect: {{interfaces: [out], ports: [{PORT}, "{FIRST}-{LAST}"]}}
trusted: [{TRUSTED[False]}, "{TRUSTED[True]}"]
syn_budget: {{rate: {BUDGET}/s}}
rules: [{listed}]
"""


class Tier:
    """A guard that is told where to count."""

    def __init__(self, guard: Guard, offload: str) -> None:
        self.guard, self.offload = guard, offload
        self.in_kernel = offload == "auto"

    def apply(self, *rules: str, name: str = "limit") -> None:
        """Put a policy in force and see that its first rule is counted for in this tier."""
        self.guard.apply(policy(self.offload, *rules, name=name))
        shown = self.guard.json("policy", "show", "--compiled")["rules"][0]
        assert shown["tier"] == ("kernel" if self.in_kernel else "queue")

    @property
    def seen(self) -> int:
        """How many packets have come to the engine, by the kernel's count."""
        with self.guard.lab.inside("gateway"):
            return sum(queue.last_id for queue in states().values())

    def objections(self, name: str) -> int:
        """Return how often a rule was crossed."""
        return int(self.guard.status()["counts"].get(f"rule.{name}", 0))


@pytest.fixture(scope="module", params=["auto", "never"])
def tier(
    lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Tier]:
    directory = tmp_path_factory.mktemp(request.param)
    with Guard(lab, policy(request.param, RATE), directory, workers=1) as guard:
        yield Tier(guard, request.param)
    for tables in ("ipt_hashlimit", "ip6t_hashlimit"):
        assert not lab.run("gateway", "ls", f"/proc/net/{tables}").strip()


def hold(service: Service, address: str, count: int) -> list[Link]:
    links = [service.connect(address) for _ in range(count)]
    for link in links:
        link.talk()
    return links


@BOTH_FAMILIES
def test_syns_within_the_burst_pass_and_one_more_is_dropped(
    lab: ThreeHosts, tier: Tier, serve: Open, v6: bool
) -> None:
    service, other = serve(PORT, v6), serve(OTHER, v6)
    name = f"burst-{'v6' if v6 else 'v4'}"
    tier.apply(RATE, name=name)
    seen, address = tier.seen, source(v6)
    hold(other, address, 5)  # not protected
    hold(service, address, 3)
    assert answer(lab, address, service.address, PORT) == "silence"
    wait_until(lambda: tier.objections(name) > 0)
    hold(service, source(v6), 3)
    hold(service, TRUSTED[v6], 5)
    # The engine is asked about each SYN, or only about the one that was too many.
    assert tier.seen == seen + (1 if tier.in_kernel else 7)
    assert tier.objections(name) == 1


@BOTH_FAMILIES
def test_how_near_a_source_is_to_the_limit_is_told(tier: Tier, serve: Open, v6: bool) -> None:
    tier.apply(SLOW)
    near, nearer = source(v6), source(v6)
    service = serve(PORT, v6)
    hold(service, near, 3)
    hold(service, nearer, 6)

    def told() -> dict[str, int]:
        rows = {row["source"]: row["used_percent"] for row in tier.guard.ask("nearest")}
        # A token comes back in a minute.
        return {one: round(rows.get(network_of(one), 0), -1) for one in (near, nearer)}

    wait_until(lambda: told() == {near: 30, nearer: 60}, 3)
    explained = tier.guard.json("policy", "explain", nearer)["rules"][0]
    assert round(explained["used_percent"], -1) == 60


def test_a_source_is_let_in_again_at_its_rate(lab: ThreeHosts, tier: Tier, serve: Open) -> None:
    service = serve(PORT)
    tier.apply(FAST)
    address = source(False)
    hold(service, address, 2)
    assert answer(lab, address, service.address, PORT, 0.1) == "silence"
    wait_until(lambda: answer(lab, address, service.address, PORT, 0.1) == "connected", 3)


@BOTH_FAMILIES
def test_a_prefix_is_counted_as_one(lab: ThreeHosts, tier: Tier, serve: Open, v6: bool) -> None:
    service = serve(PORT, v6)
    tier.apply(WIDE)
    *first, last = neighbours(v6, 4)
    for address in first:
        hold(service, address, 1)
    assert answer(lab, last, service.address, PORT) == "silence"
    hold(service, source(v6), 3)


@BOTH_FAMILIES
def test_a_refusal_is_told_in_the_same_words(
    lab: ThreeHosts, tier: Tier, serve: Open, v6: bool
) -> None:
    service = serve(PORT, v6)
    tier.apply(REFUSED)
    address = source(v6)
    hold(service, address, 3)
    assert refused(lab, address, service.address, PORT)
    wait_until(lambda: bool(told_of(tier.guard, address)))
    event = told_of(tier.guard, address)[0]
    said = [event[key] for key in ("kind", "rule", "reason", "enforced")]
    assert said == ["reset", "limit", "syn_rate", True]


def told_of(guard: Guard, address: str) -> list[Any]:
    """Return the events that name an address."""
    return [event for event in guard.status()["recent"] if address in event["subject"]]


@BOTH_FAMILIES
def test_counts_outlast_another_policy(lab: ThreeHosts, tier: Tier, serve: Open, v6: bool) -> None:
    service = serve(PORT, v6)
    tier.apply(RATE)
    address = source(v6)
    hold(service, address, 2)
    tier.apply(RATE, "name: more, measure: bad_flags, over: 5/s, then: drop")
    hold(service, address, 1)
    assert answer(lab, address, service.address, PORT) == "silence"


@BOTH_FAMILIES
def test_nobody_within_the_limits_has_to_ask_twice(
    lab: ThreeHosts, tier: Tier, serve: Open, v6: bool
) -> None:
    """An ACK of the SYN-ACK that is lost on the way costs a second where the server speaks first.

    One connection after the other: the tracker still has the one before, already closed.
    """
    service = serve(PORT, v6)
    tier.apply(SLOW, "name: held, measure: connections, over: 5, then: reset")
    address = source(v6)
    for _ in range(4):
        link = service.connect(address)
        assert retransmissions(link.server) == retransmissions(link.client) == 0
        closed = partial(over, lab, link)
        link.client.close()
        assert link.server.recv(1) == b""
        link.server.close()
        wait_until(closed)


def over(lab: ThreeHosts, link: Link) -> bool:
    """Tell whether the tracker calls a connection closed."""
    return entry_state(lab, link.source, link.port) == TcpState.TIME_WAIT


def test_who_returned_a_syn_cookie_is_counted(lab: ThreeHosts, tier: Tier, serve: Open) -> None:
    service = serve(PORT)
    tier.apply(RATE)
    service.connect(source(False)).talk()  # shows what cookies may offer
    wait_until(lambda: state_of(tier.guard, service) is not None)
    address = source(False)
    with over_budget(lab, tier.guard, service):
        hold(service, address, 3)
        # The kernel accepts the cookie before anybody counts.
        with pytest.raises(ConnectionResetError), connect(lab, address, SERVER4, PORT) as one_more:
            one_more.recv(1)
        hold(service, source(False), 3)


def test_observing_changes_nothing(tier: Tier, serve: Open) -> None:
    service = serve(PORT)
    tier.guard.apply(policy(tier.offload, RATE, name="watched", mode="observe"))
    links = hold(service, source(False), 6)
    wait_until(lambda: tier.objections("watched") == 3)
    for link in links:
        link.talk()


def test_what_the_kernel_cannot_remember_comes_to_the_engine(
    lab: ThreeHosts, tier: Tier, serve: Open
) -> None:
    """Many services at once, none over its budget: the kernel's table must not be full of it."""
    service = serve(PORT)
    tier.apply(SLOW)
    seen, sent = tier.seen, [*range(FIRST, LAST + 1)] * BUDGET
    with lab.inside("client"), Injector(Marks()) as injector:
        injector.send(forged(number, port) for number, port in enumerate(sent))
    counted = 0
    if tier.in_kernel:
        table = "/proc/net/ipt_hashlimit/rstguard4-1-60-10-32"
        counted = len(lab.run("gateway", "cat", table).splitlines())
        assert 0 < counted < len(sent) / 2
    # A packet socket may lose a few.
    wait_until(lambda: counted + tier.seen - seen > len(sent) * 0.9)
    hold(service, source(False), 3)


def forged(number: int, port: int) -> bytes:
    """Return a SYN to the server, from a source of its own for each number."""
    first = parse_address("198.18.0.0")
    return emit(Packet(first + number, parse_address(SERVER4), 2000, port, number, 0, SYN, 9, 0))
