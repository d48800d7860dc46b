"""A `connections` rule holds at any moment, not only when a sweep has looked."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.segment import emit
from rstguard.engine.wire import SYN, Packet
from rstguard.kernel import KernelError
from rstguard.kernel.admission import TOLD_GROUP
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.nflog import PacketLog
from rstguard.lab.waiting import wait_until
from tests.support.budget import over_budget, state_of
from tests.support.comers import Comers, Held, hosting
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, source
from tests.support.traffic import Open, is_dead

pytestmark = pytest.mark.netns

EACH, WIDE, FULL, BANS, COOKIES = range(8001, 8006)
LIMIT = 100
PREFIX = "per: {ipv4: 24, ipv6: 48}"
POLICY = f"""
version: 1
name: admission
sweep_every: 2s
protect: {{interfaces: [out]}}
rules:
  - {{name: each, measure: connections, ports: [{EACH}], over: {LIMIT}, then: reset}}
  - {{name: wide, measure: connections, ports: [{WIDE}], {PREFIX}, over: {LIMIT}, then: reset}}
  - {{name: full, measure: connections, ports: [{FULL}], per: service, over: {LIMIT}, then: reset}}
  - {{name: few, measure: connections, ports: [{COOKIES}], over: 5, then: reset}}
  - {{name: bans, measure: connections, ports: [{BANS}], over: {LIMIT}, then: ban, for: 10s}}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("admission")) as guard:
        wait_until(lambda: guard.status()["counts"].get("sweeps", 0) > 0)
        yield guard


@contextmanager
def counted(lab: ThreeHosts, port: int, v6: bool = False) -> Iterator[Held]:
    """Serve on a port, and count all the while what the server holds."""
    with hosting(lab, port, v6):
        held = Held(lab, v6)
        try:
            with held.watched():
                yield held
        finally:
            held.close()


def many(v6: bool, number: int) -> list[str]:
    """Return the addresses of one source, or of one prefix."""
    return neighbours(v6, number) if number > 1 else [source(v6)]


@BOTH_FAMILIES
@pytest.mark.parametrize(("port", "sources"), [(EACH, 1), (WIDE, 250), (FULL, 250)])
def test_a_burst_lets_no_more_in_than_the_limit(
    lab: ThreeHosts, guard: Guard, port: int, sources: int, v6: bool
) -> None:
    rule = {EACH: "each", WIDE: "wide", FULL: "full"}[port]
    before = guard.status()["counts"].get(f"rule.{rule}", 0)
    comers = Comers(lab, many(v6, sources), port)
    with counted(lab, port, v6) as count:
        comers.burst(1000)
        beyond = comers.held
        wait_until(lambda: sum(map(is_dead, beyond)) >= 1000 - LIMIT, 10)
        wait_until(lambda: count.now() == LIMIT)
        assert count.most <= LIMIT
        told = f"rule.{rule}"
        wait_until(lambda: guard.status()["counts"].get(told) == before + 1000 - LIMIT)
        assert guard.events("reset", rule) > 0
        comers.close()
        wait_until(lambda: count.now() == 0)


def test_what_clients_close_is_free_at_once(lab: ThreeHosts, guard: Guard) -> None:
    comers = Comers(lab, many(False, 250), WIDE)
    with counted(lab, WIDE) as count:
        comers.burst(2 * LIMIT)
        wait_until(lambda: count.now() == LIMIT)
        sweeps = guard.status()["counts"]["sweeps"]

        def one_more_fills_it() -> bool:
            comers.burst(1)
            return count.now() == LIMIT

        for _ in range(5):
            comers.leave(LIMIT // 5)
            wait_until(lambda: count.now() == LIMIT - LIMIT // 5)
            wait_until(one_more_fills_it, 1)
        assert guard.status()["counts"]["sweeps"] <= sweeps + 3
        assert count.most <= LIMIT
        comers.close()


def test_a_prefix_that_always_wants_more_never_gets_it(lab: ThreeHosts, guard: Guard) -> None:
    """250 sources that come and go all the time, and a neighbour's clients beside them."""
    crowd = Comers(lab, many(False, 250), WIDE)
    others = Comers(lab, many(True, 20), WIDE)
    with hosting(lab, WIDE, True), counted(lab, WIDE) as count:
        beside = Thread(target=others.come, args=(40, 5, 0.2))
        beside.start()
        crowd.come(1250, 5, 0.3)
        beside.join()
    print(f"most {count.most}, {crowd.served} of {crowd.begun} served, {crowd.refused} refused")
    assert LIMIT * 0.9 <= count.most <= LIMIT * 1.1
    assert crowd.refused > 0
    assert crowd.served > LIMIT * 5  # places become free again and again
    assert others.served >= 0.99 * others.begun, (others.served, others.begun)


def test_forged_syns_in_its_name_do_not_starve_a_prefix(lab: ThreeHosts, guard: Guard) -> None:
    addresses = many(False, 250)
    clients = Comers(lab, addresses, WIDE)
    over, sent = Event(), [0]

    def forge() -> None:
        with lab.inside("client"), Injector(Marks()) as injector:
            while not over.wait(0.01):
                injector.send(forged(addresses, sent[0] + number) for number in range(20))
                sent[0] += 20

    thread = Thread(target=forge)
    thread.start()
    try:
        with hosting(lab, WIDE):
            clients.come(40, 4, 0.5)
    finally:
        over.set()
        thread.join()
    assert sent[0] > 2000
    assert clients.served >= 0.99 * clients.begun, (clients.served, clients.begun)


def forged(addresses: list[str], number: int) -> bytes:
    """Return a SYN in the name of one of a prefix's addresses."""
    client = parse_address(addresses[number % len(addresses)])
    port = 1024 + number // len(addresses) % 30_000
    return emit(Packet(client, parse_address(SERVER4), port, WIDE, number, 0, SYN, 9, 0))


def test_who_returned_a_syn_cookie_is_counted(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    """SYNPROXY asks the server only for those within the limit, and the others are told."""
    service, address = serve(COOKIES), source(False)
    guard.apply(f"{POLICY}syn_budget: {{rate: 100/s, ports: [{COOKIES}]}}\n")
    try:
        service.connect(source(False)).talk()  # shows what cookies may offer
        wait_until(lambda: state_of(guard, service) is not None)
        with over_budget(lab, guard, service):
            links = [service.connect(address) for _ in range(5)]
            for link in links:
                link.talk()
            for _ in range(3):
                service.refuse(address)
            service.connect(source(False)).talk()
            links[0].close()

            def one_more() -> bool:
                with suppress(OSError):
                    service.connect(address, timeout=1).talk()
                    return True
                return False

            wait_until(one_more)
    finally:
        guard.apply(POLICY)


def test_a_rule_that_bans_sees_who_crosses_it(lab: ThreeHosts, guard: Guard) -> None:
    (address,) = many(False, 1)
    comers = Comers(lab, [address], BANS)
    with counted(lab, BANS) as count:
        comers.burst(3 * LIMIT)
        wait_until(lambda: guard.block_of(address) is not None)
        assert guard.block_of(address)["rule"] == "bans"
        wait_until(lambda: count.now() == 0)
        comers.close()


def test_without_its_reader_sweeps_hold_the_limit(lab: ThreeHosts, guard: Guard) -> None:
    """Nobody is refused then by what the kernel counted before, and the status says what lacks."""
    comers = Comers(lab, many(False, 1), EACH)
    with counted(lab, EACH) as count:
        comers.burst(LIMIT)
        wait_until(lambda: count.now() == LIMIT)
        sweeper = guard.status()["sweeper"]["pid"]
        with taken(lab, guard, sweeper):
            comers.burst(LIMIT)
            wait_until(lambda: count.now() == LIMIT, 20)  # by a sweep
            problems = guard.status()["problems"]
            assert any("counted by sweeps alone" in one for one in problems), problems
        comers.close()


@contextmanager
def taken(lab: ThreeHosts, guard: Guard, sweeper: int) -> Iterator[None]:
    """Kill the sweeper, and take what it listens to before it is started again."""
    os.kill(sweeper, signal.SIGSTOP)
    with lab.inside("gateway"):
        os.kill(sweeper, signal.SIGKILL)
        log: list[PacketLog] = []

        def take() -> bool:
            try:
                log.append(PacketLog(TOLD_GROUP))
            except KernelError:
                return False
            return True

        wait_until(take)
    with log[0]:
        wait_until(lambda: guard.status()["counts"].get("cannot_count", 0) == 1, 20)
        yield
    os.kill(guard.status()["sweeper"]["pid"], signal.SIGKILL)
    wait_until(guard.filtering, 20)


def test_honest_connections_open_one_by_one(guard: Guard, serve: Open) -> None:
    service = serve(EACH)
    links = [service.connect(source(False)) for _ in range(20)]
    for link in links:
        link.talk()
