"""Each measure of the worker, with the real tools and clients that it is there to catch.

Beside every offender an honest client does the like of it, within the limits, and is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import CLIENT4, CLIENT6, ThreeHosts
from tests.support.sources import BOTH_FAMILIES, server_address, source
from tests.support.traffic import Link, Open, answer, bind, is_dead, refused, segments

pytestmark = pytest.mark.netns

HALF_OPEN, HOSTS, FLAGS, STRAY, ABORT, SHORT, STALLED, FLOOD = range(8001, 8009)
FIRST_PORT, LAST_PORT = 8100, 8140
CLOSED, SILENT, OPEN = range(8201, 8206), range(8211, 8216), 8221
POLICY = f"""
version: 1
name: measures
protect: {{interfaces: [out]}}
shun: drop
syn_budget: off
shun_for: 60s
rules:
  - {{name: half-open, measure: half_open, ports: [{HALF_OPEN}], over: 5, then: ban, for: 60s}}
  - {{name: ports, measure: distinct_ports, ports: ["{FIRST_PORT}-{LAST_PORT}"], over: 15,
     within: 10s, then: ban, for: 60s}}
  - {{name: hosts, measure: distinct_hosts, ports: [{HOSTS}], over: 5, within: 10s,
     then: ban, for: 60s}}
  - {{name: refused, measure: refused_ports, ports: ["8200-8299"], over: 3, within: 1m,
     then: ban, for: 60s}}
  - {{name: flags, measure: bad_flags, ports: [{FLAGS}], over: 1/m, burst: 3, then: ban, for: 60s}}
  - {{name: stray, measure: out_of_state, ports: [{STRAY}], over: 1/m, burst: 3,
     then: ban, for: 60s}}
  - {{name: abort, measure: reset_rate, ports: [{ABORT}], over: 1/m, burst: 3, then: ban, for: 60s}}
  - {{name: short, measure: short_connections, ports: [{SHORT}], shorter_than: 500ms,
     over: 1/m, burst: 3, then: ban, for: 60s}}
  - {{name: stalled, measure: stalled, ports: [{STALLED}], window: 256, over: 1s, then: reset}}
  - {{name: flood, measure: syn_rate, ports: [{FLOOD}], over: 100/s, burst: 100,
     then: ban, for: 60s}}
"""
LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close() sends a RST."""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    for command in ("iptables", "ip6tables"):  # a host that answers nothing it knows nothing of
        lab.run("client", command, "-w", "-A", "OUTPUT", "-s", *_spoofed(command), "-j", "DROP")
    for way, net in (("-4", "10.74.0.0/16"), ("-6", "fd74::/32")):
        lab.run("server", "ip", way, "route", "add", "local", net, "dev", "lo")
        via = server_address(way == "-6")
        lab.run("gateway", "ip", way, "route", "add", net, "via", via)
    with Guard(lab, POLICY, tmp_path_factory.mktemp("measures")) as guard:
        yield guard


def _spoofed(command: str) -> tuple[str, ...]:
    """The last of the client's networks, by which no test connects."""
    network = "fd73:0:ff::/48" if command == "ip6tables" else "10.255.255.0/24"
    return (network, "-p", "tcp", "--tcp-flags", "RST", "RST")


def await_block(guard: Guard, address: str, kind: str, rule: str) -> None:
    wait_until(lambda: guard.block_of(address) is not None)
    block = guard.block_of(address)
    assert (block["kind"], block["rule"]) == (kind, rule)


def hping(lab: ThreeHosts, *options: str) -> None:
    """Run hping3 to its end; it fails if nothing came back, which is what we want of a guard."""
    with lab.inside("client"):
        subprocess.run(["hping3", "-q", *options], capture_output=True, check=False, timeout=20)


@BOTH_FAMILIES
def test_half_open(lab: ThreeHosts, guard: Guard, serve: Open, mute: None, v6: bool) -> None:
    service = serve(HALF_OPEN, v6)
    attacker, busy = source(v6), source(v6)
    for _ in range(20):
        service.connect(busy).talk()
    segments(lab, attacker, service.address, HALF_OPEN, "S", 4)
    service.connect(attacker).talk()
    assert guard.block_of(attacker) is None
    segments(lab, attacker, service.address, HALF_OPEN, "S", 6, first_port=30000)
    await_block(guard, attacker, "shun", "half-open")
    assert guard.block_of(busy) is None


@BOTH_FAMILIES
def test_distinct_ports_by_nmap(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    scanner, honest = CLIENT6 if v6 else CLIENT4, source(v6)
    service = serve(FIRST_PORT, v6)
    service.connect(scanner).talk()
    for port in range(FIRST_PORT, FIRST_PORT + 10):
        answer(lab, honest, service.address, port)
    command = ["nmap", "-sT", "-Pn", "-n", "-T5", "--max-retries", "0"]
    command += ["-6"] * v6 + [f"-p{FIRST_PORT}-{LAST_PORT}", service.address]
    with lab.inside("client"):
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert "filtered" in found.stdout
    with_prefix = "fd71:1::/64" if v6 else scanner
    rows = [row for row in guard.ask("ban-list") if row["source"] == with_prefix]
    assert [(row["kind"], row["rule"]) for row in rows] == [("shun", "ports")]
    assert guard.block_of(honest) is None


@BOTH_FAMILIES
def test_refused_ports(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(OPEN, v6)
    scanner, honest = source(v6), source(v6)
    for port in CLOSED[:3]:
        assert refused(lab, honest, service.address, port)
    service.connect(honest).talk()
    for port in CLOSED[:4]:
        assert refused(lab, scanner, service.address, port)
    await_block(guard, scanner, "shun", "refused")
    assert answer(lab, scanner, service.address, OPEN) == "silence"
    service.connect(honest).talk()


@BOTH_FAMILIES
def test_ports_that_keep_silent(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(OPEN, v6)
    scanner, honest = source(v6), source(v6)
    tool = "ip6tables" if v6 else "iptables"
    silent = f"INPUT -p tcp --dport {SILENT[0]}:{SILENT[-1]} -j DROP".split()
    lab.run("server", tool, "-w", "-A", *silent)
    try:
        segments(lab, honest, service.address, SILENT[0], "S", 3)
        for port in SILENT:
            segments(lab, scanner, service.address, port, "S", 1)

        # Silence lasts four seconds, and is noticed when the next SYN of anybody comes.
        def found() -> bool:
            service.connect(honest).talk()
            answer(lab, scanner, service.address, OPEN)
            return guard.block_of(scanner) is not None

        wait_until(found, 20)
    finally:
        lab.run("server", tool, "-w", "-D", *silent)
    await_block(guard, scanner, "shun", "refused")
    assert guard.block_of(honest) is None


@BOTH_FAMILIES
def test_distinct_hosts(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(HOSTS, v6)
    attacker, honest = source(v6), source(v6)
    for number in range(1, 8):
        service.connect(honest).talk()
        target = f"fd74::{number}" if v6 else f"10.74.0.{number}"
        answer(lab, attacker, target, HOSTS)
    await_block(guard, attacker, "shun", "hosts")
    assert guard.block_of(honest) is None


@BOTH_FAMILIES
@pytest.mark.parametrize("flags", ["", "FPU", "SF", "SR", "F", "SFRPAU", "FR"])
def test_bad_flags(lab: ThreeHosts, guard: Guard, v6: bool, flags: str) -> None:
    attacker = source(v6)

    def found() -> bool:
        # All senders of such segments share a valve: some of one may be lost to another's.
        segments(lab, attacker, server_address(v6), FLAGS, flags, 6)
        return guard.block_of(attacker) is not None

    wait_until(found)
    await_block(guard, attacker, "shun", "flags")


def test_bad_flags_by_hping(lab: ThreeHosts, guard: Guard) -> None:
    for number, flags in enumerate(("-FPU", "-Y", "-SF"), 1):
        options = [f"-{flag}" for flag in flags[1:]]
        address = f"10.255.255.{number}"
        count = ("-c", "6", "-i", "u1000", "-a", address, "-p", str(FLAGS), server_address(False))

        def found(address: str = address, words: tuple[str, ...] = (*options, *count)) -> bool:
            hping(lab, *words)
            return guard.block_of(address) is not None

        if flags != "-Y":  # the reserved bits mean something today (RFC 3168): no offence
            wait_until(found)
            await_block(guard, address, "shun", "flags")


def test_bad_flags_within_a_connection_are_of_its_source(
    lab: ThreeHosts, guard: Guard, serve: Open
) -> None:
    service = serve(FLAGS)
    attacker = source(False)
    link = service.connect(attacker)

    def found() -> bool:
        segments(lab, attacker, service.address, FLAGS, "FPU", 6)
        return guard.block_of(attacker) is not None

    wait_until(found)
    # Anybody can send them in its name: what is there goes on.
    await_block(guard, attacker, "shun", "flags")
    link.talk()


@BOTH_FAMILIES
@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA", "R"])
def test_out_of_state(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool, flags: str) -> None:
    attacker, honest = source(v6), source(v6)
    service = serve(STRAY, v6)
    segments(lab, attacker, service.address, STRAY, flags, 6)
    for _ in range(6):
        service.connect(honest).talk()
    assert guard.block_of(attacker) is None  # a tracker may have forgotten its connections
    ports = itertools.count(21_000, 6)
    go_on = partial(segments, lab, attacker, service.address, STRAY, flags, 6)

    def blocked() -> bool:
        go_on(first_port=next(ports))
        return guard.block_of(attacker) is not None

    wait_until(blocked)
    await_block(guard, attacker, "shun", "stray")
    assert guard.block_of(honest) is None


def test_out_of_state_by_hping(lab: ThreeHosts, guard: Guard) -> None:
    address = "10.255.255.9"
    go_on = ("-A", "-c", "80", "-i", "u50000", "-a", address, "-p", str(STRAY))
    hping(lab, *go_on, server_address(False))
    await_block(guard, address, "shun", "stray")


def test_a_forged_flood_by_hping_is_shunned(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(FLOOD)
    address = "10.255.255.10"
    hping(lab, "-S", "-c", "400", "-i", "u500", "-a", address, "-p", str(FLOOD), service.address)
    await_block(guard, address, "shun", "flood")
    service.connect(source(False)).talk()


def test_addresses_of_one_64_are_one_source(
    lab: ThreeHosts, guard: Guard, serve: Open, mute: None
) -> None:
    service = serve(HALF_OPEN, True)
    address = source(True)
    for number in range(6):
        another = address.removesuffix("1") + f"{number + 2:x}"
        segments(lab, another, service.address, HALF_OPEN, "S", 1, first_port=20000 + number)
    await_block(guard, address, "shun", "half-open")
    assert answer(lab, address, service.address, HALF_OPEN) == "silence"


@pytest.mark.parametrize("way", ["destination options", "routing", "fragments"])
def test_nothing_hides_behind_ipv6_headers(
    lab: ThreeHosts, guard: Guard, serve: Open, mute: None, way: str
) -> None:
    from scapy.layers.inet import TCP
    from scapy.layers.inet6 import (
        IPv6,
        IPv6ExtHdrDestOpt,
        IPv6ExtHdrFragment,
        IPv6ExtHdrSegmentRouting,
        PadN,
        fragment6,
    )

    address, target = source(True), serve(HALF_OPEN, True).address  # it must not refuse
    unheard = (
        "INPUT",
        "-p",
        "tcp",
        "--tcp-flags",
        "SYN,ACK",
        "SYN,ACK",
        "-d",
        address,
        "-j",
        "DROP",
    )
    lab.run("client", "ip6tables", "-w", "-I", *unheard)  # or it would answer with RSTs
    with lab.inside("client"):
        raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for number in range(8):
            segment = TCP(sport=20000 + number, dport=HALF_OPEN, flags="S")
            whole = IPv6(src=address, dst=target)
            if way == "destination options":
                packets = [whole / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200))]) / segment]
            elif way == "routing":
                packets = [whole / IPv6ExtHdrSegmentRouting(addresses=[target]) / segment]
            else:
                long = whole / IPv6ExtHdrFragment(id=number) / segment / bytes(1400)
                packets = fragment6(long, 1280)
                assert len(packets) == 2
            for packet in packets:
                try:
                    raw.sendto(bytes(packet), (target, 0))
                except PermissionError:  # its own host dropped it
                    state = lab.run("client", "sh", "-c", "ip6tables-save -c; conntrack -S")
                    pytest.fail(f"packet {number} of {packet.summary()}: {state}")
    await_block(guard, address, "shun", "half-open")


def abort(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
    one.close()


@BOTH_FAMILIES
def test_reset_rate(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    service = serve(ABORT, v6)
    attacker, honest = source(v6), source(v6)
    kept = service.connect(attacker)
    for _ in range(5):
        calm = service.connect(honest)
        calm.client.close()
        calm.server.close()
        if guard.block_of(attacker) is None:
            abort(service.connect(attacker).client)
    await_block(guard, attacker, "ban", "abort")
    kept.wait_reset()
    assert guard.block_of(honest) is None


def client_first(link: Link) -> None:
    link.client.close()
    assert link.server.recv(1) == b""
    link.server.close()


def server_first(link: Link) -> None:
    link.server.close()
    assert link.client.recv(1) == b""
    link.client.close()


def client_aborts(link: Link) -> None:
    abort(link.client)


def server_aborts(link: Link) -> None:
    abort(link.server)
    wait_until(lambda: is_dead(link.client))


@BOTH_FAMILIES
@pytest.mark.parametrize("end", [client_first, server_first, client_aborts, server_aborts])
def test_short_connections(
    guard: Guard, serve: Open, v6: bool, end: Callable[[Link], None]
) -> None:
    service = serve(SHORT, v6)
    attacker = source(v6)
    longer = [service.connect(attacker) for _ in range(5)]
    for done in range(4):
        assert guard.block_of(attacker) is None, f"after {done} short connections"
        link = service.connect(attacker)
        link.talk()
        with contextlib.suppress(ConnectionResetError):  # by the ban that the last one brings
            end(link)
    await_block(guard, attacker, "ban", "short")
    for link in longer:
        link.wait_reset()


def test_long_connections_are_not_short(lab: ThreeHosts, guard: Guard, serve: Open) -> None:
    service = serve(SHORT)
    address = source(False)
    links = [service.connect(address) for _ in range(8)]
    # Half a second old by the kernel's own count of the client's socket.
    wait_until(lambda: all(age(link.client) > 600 for link in links))
    for link in links:
        link.talk()
        client_first(link)
    service.connect(address).talk()
    assert guard.block_of(address) is None


def age(one: socket.socket) -> int:
    """Return the milliseconds since a socket last received data, or was made."""
    information = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", information, 52)[0])


@BOTH_FAMILIES
def test_stalled(lab: ThreeHosts, guard: Guard, serve: Open, v6: bool) -> None:
    """Slow read: the client keeps its window closed while the server has much to say."""
    service = serve(STALLED, v6)
    stalling, slow = (narrow(lab, source(v6), service.address) for _ in range(2))
    servers = [service.accept() for _ in range(2)]
    ended = threading.Event()

    def pour(one: socket.socket) -> None:
        with one:
            try:
                while not ended.is_set():
                    one.send(bytes(4096))
            except OSError:
                return

    threads = [threading.Thread(target=pour, args=(one,)) for one in servers]
    for thread in threads:
        thread.start()
    try:
        read = 0
        slow.settimeout(5)

        def died() -> bool:
            nonlocal read
            read += len(slow.recv(64 << 10))
            ended.wait(0.05)
            return is_dead(stalling)

        wait_until(died, 15)
        for _ in range(20):
            assert not died() or not is_dead(slow)
        assert read > 0
        assert not is_dead(slow)
    finally:
        ended.set()
        stalling.close()
        slow.close()
        for thread in threads:
            thread.join(5)


def narrow(lab: ThreeHosts, address: str, target: str) -> socket.socket:
    """Return a connection of a client with as small a receive buffer as Linux lets it have."""
    v6 = ":" in target
    with lab.inside("client"):
        one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    bind(one, address)
    one.connect((target, STALLED))
    return one
