"""Handshakes that nobody completes: a server's backlog stays free, with nothing configured."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Iterator

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.segment import emit
from rstguard.engine.wire import ACK, RST, SYN, Packet, parse
from rstguard.kernel.half_open_dnat import BESIDE
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import short_id
from rstguard.kernel.syn_budget import full_set
from rstguard.lab.waiting import wait_until
from tests.support.budget import Flood, engaged, learned, name_of, state_of
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, ROUTER4, ROUTER6, give_sources, source
from tests.support.traffic import Open, Service, answer, bind, connect, server_sockets

pytestmark = pytest.mark.netns

MOST = 32
ETH_P_ALL = 3
DARK4, DARK6 = "198.18.0.0/15", "2001:db8::/32"
"""Where nobody answers; from the client's own networks a SYN-ACK is refused with a RST."""
POLICY = """\
version: 1
protect: {interfaces: [out]}
sweep_every: 500ms
rules:
  - {name: shared, measure: syn_rate, per: service, over: 100000/s, then: observe}
"""
"""Says nothing of a SYN budget."""
SMALL = POLICY + f"syn_budget: {{half_open: {MOST}}}\n"


_ports = itertools.count()


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    """A server that gives out no cookies of its own."""
    with ThreeHosts("rho") as lab:
        give_sources(lab)
        for network, router in ((DARK4, ROUTER4), (DARK6, ROUTER6)):
            lab.ip("gateway", f"route add {network} via {router}")
        for host in ("server", "gateway"):
            lab.run(host, "sysctl", "-qw", "net.ipv4.tcp_syncookies=0")
        yield lab


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, SMALL, tmp_path_factory.mktemp("half")) as guard:
        yield guard


def flooded(
    lab: ThreeHosts, service: Service, each: int = 50, every: float = 0.01, lit: bool = False
) -> Flood:
    """Return a flood at a service."""
    return Flood(lab, service.address, service.port, each, every, lit)


def half_open(lab: ThreeHosts, place: str, port: int) -> int:
    """Return how many handshakes a host waits for."""
    listed = lab.run(place, "ss", "-tnH", "state", "syn-recv", "sport", "=", f":{port}")
    return len(listed.splitlines())


@BOTH_FAMILIES
@pytest.mark.parametrize("place", ["server", "gateway"])
@pytest.mark.parametrize("flood", [(50, 0.01), (2, 0.1)], ids=["fast", "slow"])
def test_a_forged_flood_fills_no_backlog(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, place: str, flood: tuple[int, float]
) -> None:
    service = learned(guard, serve(8300 + next(_ports), v6, place), place)
    with flooded(lab, service, *flood):
        wait_until(lambda: engaged(guard, service), 15)
        for _ in range(30):
            service.connect(source(v6)).talk()
            assert half_open(lab, place, service.port) <= 2 * MOST
        assert half_open(lab, place, service.port) >= MOST / 2
    wait_until(lambda: not engaged(guard, service), 15)
    service.connect(source(v6)).talk()
    wait_until(lambda: half_open(lab, place, service.port) <= MOST, 15)  # itself in a minute


def test_both_families_of_one_port_fill_no_more_than_one(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service4, service6 = (learned(guard, serve(8385, v6), "server") for v6 in (False, True))
    with flooded(lab, service4, 10), flooded(lab, service6, 10):
        wait_until(lambda: engaged(guard, service4) and engaged(guard, service6), 15)
        for _ in range(15):
            service4.connect(source(False)).talk()
            service6.connect(source(True)).talk()
            assert half_open(lab, "server", 8385) <= MOST


@BOTH_FAMILIES
def test_sources_that_refuse_what_they_have_not_asked_for_take_a_place_for_seconds_only(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = learned(guard, serve(8359 + v6, v6), "server")  # no port of both families
    with flooded(lab, service, 2, 0.01, lit=True):
        wait_until(lambda: engaged(guard, service), 30)
        service.connect(source(v6)).talk()
    held = f"rstguard-half{6 if v6 else 4}-{short_id(name_of(service))}"
    wait_until(lambda: "entries: 0" in lab.run("gateway", "ipset", "list", "-t", held), 6)
    wait_until(lambda: not engaged(guard, service), 10)


@BOTH_FAMILIES
def test_how_many_are_open_is_told(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = learned(guard, serve(8386 + v6, v6), "server")  # no port of both families
    service_at, count = parse_address(service.address), MOST // 2

    def send(flags: int, ahead: int) -> None:
        with lab.inside("client"), contextlib.closing(Injector(Marks())) as injector:
            for number in range(count):
                fields = (parse_address(dark(number, v6)), service_at, 2000 + number, service.port)
                segment = Packet(*fields, 5000 + ahead, 0, flags, 1000, 0)
                assert injector.send([emit(segment)]) == 1

    wait_until(lambda: open_at(guard, service) == (0, 0))
    send(SYN, 0)
    wait_until(lambda: open_at(guard, service) == (count, 0))
    told = guard.cli("status").stdout
    assert f"{name_of(service)}: within budget, {count} of {MOST} handshakes open (mss" in told
    send(RST, 1)
    wait_until(lambda: open_at(guard, service) == (0, 0), 15)


@BOTH_FAMILIES
def test_those_of_sources_proven_lately_are_told_apart(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, client = serve(8388 + v6, v6), source(v6)
    learned(guard, service, "server")
    service.connect(client).talk()
    fields = (parse_address(client), parse_address(service.address), 999, service.port)
    with lab.inside("client"), contextlib.closing(Injector(Marks())) as injector:
        injector.send([emit(Packet(*fields, 5000, 0, SYN, 1000, 0))])
    wait_until(lambda: open_at(guard, service) == (0, 1))
    assert f" of {MOST} handshakes open, 1 beside (mss" in guard.cli("status").stdout


def open_at(guard: Guard, service: Service) -> tuple[int, int] | None:
    """Return how many handshakes of a service are open, and how many beside; as status tells."""
    row = state_of(guard, service)
    held = row and row["half_open"]
    assert held is None or isinstance(held, dict)
    return (held["open"], held["beside"]) if held and not held["shared"] else None


@BOTH_FAMILIES
def test_a_rst_that_the_server_does_not_believe_frees_no_place(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """The tracker believes each of them, but not the server: it takes the exact number alone."""
    service = learned(guard, serve(8380, v6), "server")
    service_at = parse_address(service.address)
    kinds = itertools.cycle([(2, RST), (3, RST | ACK), (1000, RST), (60_000, RST)])
    with lab.inside("client"), contextlib.closing(Injector(Marks())) as injector:
        for number in range(360):  # places are kept for four seconds behind a RST
            fields = (parse_address(dark(number, v6)), service_at, 2000 + number, service.port)
            ahead, flags = next(kinds)
            syn = emit(Packet(*fields, 5000, 0, SYN, 1000, 0))
            injector.send([syn, emit(Packet(*fields, 5000 + ahead, 0, flags, 0, 0))])
            time.sleep(1 / 60)
            if number % 30 == 0:
                assert half_open(lab, "server", service.port) <= 2 * MOST
    assert half_open(lab, "server", service.port) <= 2 * MOST
    service.connect(source(v6)).talk()


@BOTH_FAMILIES
def test_acks_that_the_server_does_not_believe_free_places_for_a_second_only(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """The tracker takes them, as they are too low; each repeated SYN-ACK gets another."""
    service = learned(guard, serve(8381, v6), "server")
    service_at, numbers = parse_address(service.address), itertools.count()
    with (
        lab.inside("client"),
        contextlib.closing(Injector(Marks())) as injector,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL)) as heard,
    ):
        heard.setblocking(False)

        def begin(many: int, a_second: int = 60) -> None:
            for number in itertools.islice(numbers, many):
                fields = (parse_address(dark(number, v6)), service_at, 2000 + number, service.port)
                injector.send([emit(Packet(*fields, 5000, 0, SYN, 1000, 0))])
                time.sleep(1 / a_second)
                injector.send([too_low(answer) for answer in answers(heard, service.port)])

        def known() -> bool:
            begin(10)
            return f"rstguard-lied{6 if v6 else 4} " in lying(lab)

        wait_until(known, 15)
        begin(60)  # their SYN-ACKs are repeated by now
        before = half_open(lab, "server", service.port)
        for _ in range(12):
            begin(120, 300)
            assert half_open(lab, "server", service.port) <= before + 2 * MOST
    service.connect(source(v6)).talk()


def lying(lab: ThreeHosts) -> str:
    """Return the sets of those whose ACKs were not believed that hold anybody."""
    of = (lab.run("gateway", "ipset", "save", f"rstguard-lied{n}").splitlines() for n in (4, 6))
    return " ".join(f"{line.split()[1]} " for lines in of for line in lines if "add " in line)


@BOTH_FAMILIES
def test_where_acks_are_not_believed_the_first_data_of_the_server_ends_a_handshake(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service = learned(guard, serve(8382, v6), "server")
    called = f"rstguard-lied{6 if v6 else 4}"
    lab.run("gateway", "ipset", "add", called, source(v6), "-exist")
    try:
        for _ in range(3 * MOST):
            service.connect(source(v6)).talk()
        assert not is_full(lab, service)
        for _ in range(MOST + 1):  # who says nothing keeps his place for some seconds
            service.connect(source(v6))
        assert is_full(lab, service)
    finally:
        lab.run("gateway", "ipset", "flush", called)


def is_full(lab: ThreeHosts, service: Service) -> bool:
    """Tell whether the kernel gives out cookies for a service."""
    name = full_set(6 if service.v6 else 4)
    return f"{service.address},tcp:{service.port} " in lab.run("gateway", "ipset", "save", name)


def dark(number: int, v6: bool) -> str:
    """Return an address at which nobody answers."""
    return f"2001:db8:1::{number + 1:x}" if v6 else f"198.19.{number >> 7}.{(number & 127) + 1}"


def answers(heard: socket.socket, port: int) -> list[Packet]:
    """Return the SYN-ACKs that came from a port and were not taken in yet."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            packet = parse(heard.recv(2048))
            if isinstance(packet, Packet) and packet.flags & (SYN | ACK) == SYN | ACK:
                found.append(packet)
    return [packet for packet in found if packet.source_port == port]


def too_low(answer: Packet) -> bytes:
    """Return an ACK of what was sent before a SYN-ACK."""
    fields = (answer.destination, answer.source, answer.destination_port, answer.source_port)
    wrong = (answer.sequence - 1000) % 2**32
    return emit(Packet(*fields, 5001, wrong, ACK, 1000, 0))


@BOTH_FAMILIES
def test_soon_after_a_flood_nobody_is_given_a_cookie(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """What the server waits for in vain it is told of: itself it would wait for a minute."""
    service = learned(guard, serve(8370, v6), "server")
    with flooded(lab, service):
        wait_until(lambda: engaged(guard, service))
        for _ in range(10):
            service.connect(source(v6)).talk()

    def given() -> int:
        return int(guard.status()["syn_budget"]["cookies"]["accepted"])

    def is_calm() -> bool:
        before = given()
        service.connect(source(v6)).talk()
        time.sleep(1.2)  # the counts are read once a second
        return given() == before

    wait_until(is_calm, 20)
    assert half_open(lab, "server", service.port) <= MOST


@BOTH_FAMILIES
@pytest.mark.parametrize("lost_at", ["client", "server"])
def test_who_waits_for_an_answer_when_the_service_fills_up_is_served(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, lost_at: str
) -> None:
    """His SYN-ACK or his ACK was lost, or he is far away: his place is not freed."""
    service, slow = learned(guard, serve(8371 + (lost_at == "server"), v6), "server"), source(v6)
    tables = "ip6tables" if v6 else "iptables"
    flags = "SYN,ACK SYN,ACK" if lost_at == "client" else "SYN,ACK ACK"
    way = ("-d" if lost_at == "client" else "-s", slow)
    rule = ("INPUT", *way, "-p", "tcp", "--tcp-flags", *flags.split(), "-j", "DROP")
    lab.run(lost_at, tables, "-A", *rule)
    began = time.monotonic()
    try:
        with lab.inside("client"):
            one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        bind(one, slow)
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.connect((service.address, service.port))
        with flooded(lab, service):
            wait_until(lambda: engaged(guard, service))
            wait_until(lambda: time.monotonic() - began > 2.4)
            lab.run(lost_at, tables, "-D", *rule)
            one.settimeout(10)
            with contextlib.suppress(OSError):
                one.connect((service.address, service.port))
            one.sendall(b"here")
            server = service.accept()
            while server.getpeername()[0] != slow:
                server = service.accept()
            assert server.recv(4) == b"here"
    finally:
        lab.run(lost_at, "sh", "-c", f"{tables} -D {' '.join(rule)} 2>/dev/null || :")
    one.close()


@BOTH_FAMILIES
def test_the_ack_of_a_cookie_that_is_lost_is_sent_once_more(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    """SYNPROXY forgets whom it gave one: without it nobody would speak again."""
    service, unlucky = learned(guard, serve(8384, v6), "server"), source(v6)
    lost = ("-s", unlucky, "-p", "tcp", "--tcp-flags", "SYN,RST,ACK,FIN", "ACK")
    first = ("-m", "statistic", "--mode", "nth", "--every", "100", "--packet", "0", "-j", "DROP")
    tables = "ip6tables" if v6 else "iptables"
    with flooded(lab, service):
        wait_until(lambda: engaged(guard, service))
        lab.run("client", tables, "-A", "OUTPUT", *lost, *first)
        try:
            with connect(lab, unlucky, service.address, service.port) as one:
                one.sendall(b"here")
                server = service.accept()
                while server.getpeername()[0] != unlucky:
                    server = service.accept()
                assert server.recv(4) == b"here"
        finally:
            lab.run("client", tables, "-D", "OUTPUT", *lost, *first)


def test_who_completes_his_handshakes_is_never_given_a_cookie(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service = learned(guard, serve(8366), "server")
    # Then what other tests had it send has been counted, too.
    wait_until(
        lambda: not any(r["engaged_s"] for r in guard.status()["syn_budget"]["services"]), 20
    )
    before = guard.status()["syn_budget"]["cookies"]["sent"]
    for _ in range(5 * MOST):
        service.connect(source(False))
    assert guard.status()["syn_budget"]["cookies"]["sent"] == before
    assert not engaged(guard, service)


@BOTH_FAMILIES
def test_who_was_proven_lately_passes_beside_cookies(
    lab: ThreeHosts, guard: Guard, serve: Open, v6: bool
) -> None:
    service, known = learned(guard, serve(8361, v6), "server"), source(v6)
    service.connect(known).talk()
    with flooded(lab, service):
        wait_until(lambda: engaged(guard, service))
        accepted = guard.status()["syn_budget"]["cookies"]["accepted"]
        for _ in range(BESIDE):
            service.connect(known).talk()
        wait_until(lambda: guard.status()["syn_budget"]["cookies"]["sent"] > 0)
        assert guard.status()["syn_budget"]["cookies"]["accepted"] == accepted


def test_what_rules_of_others_forbid_stays_forbidden(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    """A cookie given in front of them would open a way around them."""
    service, kept_out = learned(guard, serve(8362), "server"), source(False)
    rule = ("FORWARD", "-s", kept_out, "-p", "tcp", "--dport", "8362", "-j", "DROP")
    lab.run("gateway", "iptables", "-A", *rule)
    try:
        with flooded(lab, service):
            wait_until(lambda: engaged(guard, service))
            assert answer(lab, kept_out, service.address, service.port) == "silence"
            service.connect(source(False)).talk()
    finally:
        lab.run("gateway", "iptables", "-D", *rule)
    assert not server_sockets(lab, kept_out)


def test_many_proven_sources_fill_no_backlog_either(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service = learned(guard, serve(8363), "server")
    proven = [source(False) for _ in range(60)]
    for one in proven:
        service.connect(one).talk()
    numbers = random.Random(1)
    with lab.inside("client"):
        injector = Injector(Marks())
    with flooded(lab, service), contextlib.closing(injector):
        wait_until(lambda: engaged(guard, service))
        for _ in range(3):
            for one in proven:
                ports = numbers.randrange(1024, 65536), service.port
                fields = (parse_address(one), parse_address(service.address), *ports)
                injector.send([emit(Packet(*fields, 1, 0, SYN, 1000, 0))])
        connect(lab, source(False), service.address, service.port).close()
        assert half_open(lab, "server", service.port) <= 2 * MOST


def test_without_a_word_of_it_there_is_a_budget(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    guard.apply(POLICY)
    try:
        service = learned(guard, serve(8364), "server")
        assert guard.status()["syn_budget"]["limit"] == "128 half-open"
        assert "SYN budget 128 half-open: " in guard.cli("status").stdout
        with flooded(lab, service):
            wait_until(lambda: engaged(guard, service))
            for _ in range(10):
                service.connect(source(False)).talk()
    finally:
        guard.apply(SMALL)


def test_switched_off_it_counts_nothing(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = learned(guard, serve(8365), "server")
    guard.apply(POLICY + "syn_budget: off\n")
    try:
        assert guard.status()["syn_budget"] is None
        assert "rstguard-half" not in lab.run("gateway", "ipset", "list", "-name")
        with contextlib.suppress(TimeoutError), flooded(lab, service):
            wait_until(lambda: half_open(lab, "server", service.port) > 4 * MOST)
    finally:
        guard.apply(SMALL)
    assert isinstance(service.connect(source(False)).client, socket.socket)
