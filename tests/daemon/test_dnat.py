"""SYN cookies for services behind DNAT, whoever translates, and that nothing else is touched."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.beside import beside
from tests.support.budget import Flood, engaged, over_budget, state_of
from tests.support.forged import forger
from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, server_address, source
from tests.support.traffic import Open, Service, connect, refused

pytestmark = pytest.mark.netns

RATE = 200
INNER, OTHER = 8001, 8002
"""Ports of the server."""
LIMITED, ELSEWHERE = 8079, 9090
OUTER, NEWCOMER, SHARED, SPLIT, BESIDE, LEFT, REDIRECTED, *_others = range(8080, 8100)
"""Ports of the gateway's, each test's own: what it learned, the guard remembers for a while."""
OUTERS = iter(_others)
POLICY = f"""\
version: 1
name: dnat
sweep_every: 500ms
protect: {{interfaces: [out], ports: ["8079-8099"]}}
syn_budget: {{rate: {RATE}/s, ports: ["8080-8099"]}}
rules:
  - {{name: limited, measure: syn_rate, ports: [{LIMITED}], over: 50/s, burst: 50, then: ban,
     for: 10m}}
  - {{name: joined, measure: connection_rate, over: 1/s, burst: 5, then: observe}}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("dnat")) as guard:
        yield guard


def outside(v6: bool) -> str:
    return OUTSIDE6 if v6 else OUTSIDE4


def target(v6: bool, port: int) -> str:
    return f"[{server_address(v6)}]:{port}" if v6 else f"{server_address(v6)}:{port}"


def serves(service: Service, address: str) -> bool:
    """Connect and talk; in a flood without cookies a first ACK may be lost."""
    try:
        service.connect(address).talk()
    except OSError:
        return False
    return True


@dataclass
class Forwarding:
    """Port forwarding on the gateway, as another program would set it up; a context manager."""

    lab: ThreeHosts
    port: int
    inner: int
    v6: bool = False
    by: str = "iptables"
    masked: bool = False

    @property
    def _rule(self) -> tuple[str, ...]:
        match = ("-i", "out", "-p", "tcp", "-d", outside(self.v6), "--dport", str(self.port))
        return ("PREROUTING", *match, "-j", "DNAT", "--to-destination", target(self.v6, self.inner))

    @property
    def _table(self) -> str:
        return f"forward{self.port}"

    def _nat(self, how: str, *rule: str) -> None:
        tool = "ip6tables" if self.v6 else "iptables"
        self.lab.run("gateway", tool, "-w", "-t", "nat", how, *rule)

    def __enter__(self) -> Forwarding:
        if self.by == "iptables":
            self._nat("-A", *self._rule)
        else:
            family, priority = "ip6" if self.v6 else "ip", "-100"
            match = f"iifname out {family} daddr {outside(self.v6)} tcp dport {self.port}"
            text = f"""table {family} {self._table} {{
                chain translate {{
                    type nat hook prerouting priority {priority};
                    {match} dnat to {target(self.v6, self.inner)};
                }}
            }}"""
            self.lab.run("gateway", "nft", "-f", "-", stdin=text)
        if self.masked:
            self._nat("-A", "POSTROUTING", "-o", "in", "-j", "MASQUERADE")
        return self

    def __exit__(self, *_: object) -> None:
        if self.by == "iptables":
            self._nat("-D", *self._rule)
        else:
            family = "ip6" if self.v6 else "ip"
            self.lab.run("gateway", "nft", "delete", "table", family, self._table)
        if self.masked:
            self._nat("-D", "POSTROUTING", "-o", "in", "-j", "MASQUERADE")


@contextlib.contextmanager
def redirected(lab: ThreeHosts, serve: Open, port: int, inner: int) -> Iterator[Service]:
    """Have a port of the gateway's lead to another one of its own; yield it as clients see it."""
    service = serve(inner, place="gateway")
    service.address, service.port = OUTSIDE4, port
    match = ("PREROUTING", "-i", "out", "-p", "tcp", "--dport", str(port))
    rule = (*match, "-j", "REDIRECT", "--to-ports", str(inner))
    lab.run("gateway", "iptables", "-w", "-t", "nat", "-A", *rule)
    try:
        yield service
    finally:
        lab.run("gateway", "iptables", "-w", "-t", "nat", "-D", *rule)


def served(serve: Open, port: int, inner: int = INNER, v6: bool = False) -> Service:
    """Open a server's port, as clients address it."""
    service = serve(inner, v6)
    service.address, service.port = outside(v6), port
    return service


def learned(guard: Guard, service: Service, where: int = INNER) -> None:
    """Have the guard see where the service is."""

    def known() -> bool:
        service.connect(source(service.v6)).talk()
        state = state_of(guard, service)
        return state is not None and state["offers"]["to"] == [target(service.v6, where)]  # type: ignore[index]

    wait_until(known)


def half_open(lab: ThreeHosts, port: int) -> int:
    """Return how many half-open connections the server holds at a port."""
    listed = lab.run("server", "ss", "-tanH", "state", "syn-recv", f"( sport = :{port} )")
    return len(listed.splitlines())


@pytest.mark.usefixtures("loose")
@BOTH_FAMILIES
@pytest.mark.parametrize("masked", [False, True], ids=["", "masqueraded"])
@pytest.mark.parametrize("by", ["iptables", "nft"])
def test_clients_are_served_while_the_service_is_over_budget(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, masked: bool, by: str
) -> None:
    service = served(serve, OUTER, v6=v6)
    service.masked = masked
    with Forwarding(lab, OUTER, INNER, v6, by, masked):
        learned(guard, service)
        before = service.connect(source(v6))
        with over_budget(lab, guard, service) as flood:
            sent = flood.sent
            links = [service.connect(source(v6)) for _ in range(40)]
            for link in links:
                link.talk()
            before.talk()
            wait_until(lambda: flood.sent - sent > 3_000)
            # One SYN in two seconds is to show where the service is.
            assert half_open(lab, INNER) < 2 * RATE + 100
        before.talk()
        for link in links:
            link.talk()


@pytest.mark.usefixtures("loose")
def test_a_port_that_is_redirected_to_the_gateway_itself_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    with redirected(lab, serve, REDIRECTED, INNER) as service:
        service.connect(source(False)).talk()
        wait_until(lambda: state_of(guard, service) is not None)
        with over_budget(lab, guard, service):
            for _ in range(20):
                service.connect(source(False)).talk()


@contextlib.contextmanager
def flooded(lab: ThreeHosts, guard: Guard, victim: str, service: Service) -> Iterator[None]:
    """Forge some thousand SYNs a second in a visitor's name while the context lasts."""
    numbers = itertools.count()
    with forger(lab, victim, service.address, service.port) as blind:

        def act() -> None:
            first = 1024 + 50 * next(numbers) % 60_000
            blind.syns(range(first, first + 50))

        with beside(act, 0.01):
            wait_until(lambda: guard.block_of(victim) is not None)
            yield


def answerable(lab: ThreeHosts, service: Service) -> bool:
    """Tell whether shunned sources get cookies at a service: the last of the rules is in place."""
    tool = "ip6tables" if service.v6 else "iptables"
    rules = lab.run("gateway", f"{tool}-save", "-t", "filter").splitlines()
    return any(f"--dport {service.port} " in rule and "SYNPROXY" in rule for rule in rules)


@pytest.mark.usefixtures("loose")
@BOTH_FAMILIES
@pytest.mark.parametrize("by", ["iptables", "nft"])
def test_a_visitor_in_whose_name_syns_are_forged_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, by: str
) -> None:
    service, victim = served(serve, LIMITED, v6=v6), source(v6)
    bans = guard.events("ban", "limited")
    with Forwarding(lab, LIMITED, INNER, v6, by):
        service.connect(source(v6)).talk()
        wait_until(lambda: answerable(lab, service))
        with flooded(lab, guard, victim, service):
            waiting = half_open(lab, INNER)
            for _ in range(40):  # more at once are too many of his own
                service.connect(victim).talk()
            block = guard.block_of(victim)
            assert (block["kind"], block["answer"]) == ("shun", "challenge")
            assert half_open(lab, INNER) <= waiting
    assert guard.events("ban", "limited") == bans


@pytest.mark.usefixtures("loose")
@BOTH_FAMILIES
def test_what_others_rules_forbid_a_source_stays_forbidden(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, attacker = served(serve, LIMITED, v6=v6), source(v6)
    tool = "ip6tables" if v6 else "iptables"
    rules = (
        ("FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"),
        ("FORWARD", "-s", attacker, "-p", "tcp", "--dport", str(INNER), "-j", "DROP"),
    )
    with Forwarding(lab, LIMITED, INNER, v6):
        service.connect(source(v6)).talk()
        wait_until(lambda: answerable(lab, service))
        for rule in rules:
            lab.run("gateway", tool, "-w", "-A", *rule)
        try:
            with flooded(lab, guard, attacker, service):
                for _ in range(3):
                    with pytest.raises(OSError, match="timed out"):
                        service.connect(attacker, timeout=1.5).talk()
            assert not service.waiting()
        finally:
            for rule in rules:
                lab.run("gateway", tool, "-w", "-D", *rule)


def test_a_shunned_newcomer_waits_for_one_more_syn(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    """Nobody forges SYNs for this service in his name: his first one shows what is allowed."""
    limited, service = served(serve, LIMITED), served(serve, NEWCOMER, OTHER)
    victim = source(False)
    with Forwarding(lab, LIMITED, INNER), Forwarding(lab, NEWCOMER, OTHER):
        for one in (limited, service):
            one.connect(source(False)).talk()
            wait_until(lambda one=one: answerable(lab, one))  # type: ignore[misc]
        with flooded(lab, guard, victim, limited):
            service.connect(victim).talk()


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("by", ["iptables", "nft"])
def test_who_changes_the_translation_is_followed_within_seconds(
    lab: ThreeHosts, guard: Guard, serve: Open, by: str
) -> None:
    outer = next(OUTERS)
    before, after = served(serve, outer), served(serve, outer, OTHER)
    with Forwarding(lab, outer, INNER, by=by):
        learned(guard, before)
        with over_budget(lab, guard, before):
            before.connect(source(False)).talk()
    with Forwarding(lab, outer, OTHER, by=by), over_budget(lab, guard, before):

        def followed() -> bool:
            rules = lab.run("gateway", "nft", "list", "table", "inet", "rstguard-dnat")
            return f"{OUTSIDE4}:{outer} is {target(False, OTHER)}" in rules

        wait_until(followed)
        before.waiting()
        for _ in range(20):
            after.connect(source(False)).talk()
        assert not before.waiting()


@pytest.mark.usefixtures("loose")
def test_a_translation_that_has_gone_is_forgotten_within_seconds(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    outer = next(OUTERS)
    service = served(serve, outer)
    with Flood(lab, service.address, outer):
        with Forwarding(lab, outer, INNER):
            learned(guard, service)
            wait_until(lambda: engaged(guard, service))
        wait_until(lambda: state_of(guard, service) is None, 20)
        wait_until(lambda: refused(lab, source(False), service.address, outer))


def test_where_clients_are_shared_out_each_server_gets_some(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    services = served(serve, SHARED), served(serve, SHARED, OTHER)
    both = [target(False, port) for port in (INNER, OTHER)]
    text = f"""table ip shared {{ chain translate {{
        type nat hook prerouting priority -100;
        iifname out tcp dport {SHARED} dnat to {server_address(False)} : numgen inc mod 2 map {{
            0 : {INNER}, 1 : {OTHER} }};
    }}; }}"""
    lab.run("gateway", "nft", "-f", "-", stdin=text)
    visitor = source(False)
    try:

        def known() -> bool:
            connect(lab, visitor, OUTSIDE4, SHARED).close()
            state = state_of(guard, services[0])
            return state is not None and state["offers"]["to"] == both  # type: ignore[index]

        wait_until(known, 20)
        with over_budget(lab, guard, services[0]):
            for service in services:
                service.waiting()
            for _ in range(30):
                connect(lab, source(False), OUTSIDE4, SHARED).close()
            got = [0, 0]

            def all_came() -> bool:
                for number, service in enumerate(services):
                    got[number] += service.waiting()
                return sum(got) == 30

            wait_until(all_came)
            assert min(got) > 0
    finally:
        lab.run("gateway", "nft", "delete", "table", "ip", "shared")


def test_where_servers_differ_by_client_none_is_taken_for_the_right_one(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    services = served(serve, SPLIT), served(serve, SPLIT, OTHER)
    special = source(False)
    text = f"""table ip split {{ chain translate {{
        type nat hook prerouting priority -100;
        iifname out ip saddr {special} tcp dport {SPLIT} dnat to {target(False, OTHER)};
        iifname out tcp dport {SPLIT} dnat to {target(False, INNER)};
    }}; }}"""
    lab.run("gateway", "nft", "-f", "-", stdin=text)
    try:

        def known() -> bool:
            services[0].connect(source(False)).talk()
            return state_of(guard, services[0]) is not None

        def split() -> bool:
            services[1].connect(special).talk()
            services[0].connect(source(False)).talk()
            return state_of(guard, services[0]) is None

        wait_until(known)

        wait_until(split, 20)
        with Flood(lab, OUTSIDE4, SPLIT) as flood:
            wait_until(lambda: flood.sent > 4 * RATE)
            wait_until(partial(serves, services[1], special), 20)
            wait_until(partial(serves, services[0], source(False)), 20)
            assert state_of(guard, services[0]) is None
            assert services[0].waiting() == services[1].waiting() == 0
    finally:
        lab.run("gateway", "nft", "delete", "table", "ip", "split")


def test_what_is_not_protected_and_the_gateways_own_connections_are_untouched(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    protected, other = served(serve, BESIDE), served(serve, ELSEWHERE, OTHER)
    with Forwarding(lab, BESIDE, INNER), Forwarding(lab, ELSEWHERE, OTHER):
        learned(guard, protected)
        cookies = guard.status()["syn_budget"]["cookies"]["sent"]
        with Flood(lab, OUTSIDE4, ELSEWHERE) as flood:
            wait_until(lambda: flood.sent > 4 * RATE)
            for _ in range(5):
                other.connect(source(False)).talk()
        assert guard.status()["syn_budget"]["cookies"]["sent"] == cookies
        with over_budget(lab, guard, protected), pytest.raises(ConnectionRefusedError):
            # No rule translates what the gateway itself sends.
            lab.connect("gateway", OUTSIDE4, BESIDE)


def test_nothing_is_left_behind(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = served(serve, LEFT)
    with Forwarding(lab, LEFT, INNER):
        learned(guard, service)
        assert "rstguard-dnat" in lab.run("gateway", "nft", "list", "tables")
        lab.run("gateway", "nft", "delete", "table", "inet", "rstguard-dnat")
        wait_until(lambda: "rstguard-dnat" in lab.run("gateway", "nft", "list", "tables"), 30)
        guard.stop()
        assert "rstguard" not in lab.run("gateway", "nft", "list", "tables")
