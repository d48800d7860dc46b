"""Real connections over a real gateway die at both ends; nothing else does."""

from __future__ import annotations

import contextlib
import errno
import resource
import select as polling
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rstguard.engine.flow import Flow
from rstguard.engine.verdict import Ends, Reason
from rstguard.kernel import chains
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.lab.waiting import wait_until
from rstguard.sweeper.condemner import Condemner, Outcome, Result, Target, select
from tests.support.network import OUTSIDE4, OUTSIDE6, SERVER4, SERVER6, ThreeHosts

pytestmark = pytest.mark.netns

CLOSED = 7
"""TCP_CLOSE, as the first byte of TCP_INFO."""
NAT_PORT, INSIDE_PORT = 7000, 7001
MARKS = Marks()


def condemned_chain() -> str:
    """Return the rules that kill, and the jumps to them."""
    rules = [
        "*raw",
        f"-A OUTPUT -m mark --mark {MARKS.probe} -j CT --notrack",
        "COMMIT",
        "*filter",
        ":dead - [0:0]",
        *(f"-A dead {rule}" for rule in chains.condemned(MARKS)),
    ]
    rules += [
        f"-A {hook} -p tcp -m connmark ! --mark {MARKS.uncondemned} -j dead"
        for hook in ("INPUT", "FORWARD", "OUTPUT")
    ]
    return "\n".join([*rules, "COMMIT", ""])


@pytest.fixture(scope="module")
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rgb") as lab:
        for tool, target in (("iptables", SERVER4), ("ip6tables", f"[{SERVER6}]")):
            lab.run("gateway", f"{tool}-restore", "--noflush", stdin=condemned_chain())
            nat = ("gateway", tool, "-w", "-t", "nat", "-A")
            to = ("-j", "DNAT", "--to-destination", f"{target}:{INSIDE_PORT}")
            lab.run(*nat, "PREROUTING", "-p", "tcp", "--dport", str(NAT_PORT), *to)
            back = ("-p", "tcp", "--dport", str(INSIDE_PORT), "-o", "in", "-j", "MASQUERADE")
            lab.run(*nat, "POSTROUTING", *back)
        yield lab


class Connection:
    """Both ends of one connection, and the listener it came through."""

    def __init__(self, lab: ThreeHosts, address: str, port: int) -> None:
        local = address in (OUTSIDE4, OUTSIDE6)
        inside = INSIDE_PORT if port == NAT_PORT else port
        place = "gateway" if local and port != NAT_PORT else "server"
        self.listener = lab.listen(place, inside, v6=":" in address)
        self.client = lab.connect("client", address, port)
        self.server = self.listener.accept()[0]

    def close(self) -> None:
        for one in (self.client, self.server, self.listener):
            one.close()


@pytest.fixture
def connections(lab: ThreeHosts) -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack
    lab.run("gateway", "conntrack", "-F")


def connect(
    lab: ThreeHosts, stack: contextlib.ExitStack, address: str = SERVER4, port: int = 8000
) -> Connection:
    connection = Connection(lab, address, port)
    stack.callback(connection.close)
    return connection


def flows_of(lab: ThreeHosts, *connections: Connection) -> list[Flow]:
    wanted = {connection.client.getsockname()[1] for connection in connections}
    with lab.inside("gateway"), Conntrack() as table:
        return [flow for flow in table.dump() if flow.original.source_port in wanted]


def kill(
    lab: ThreeHosts,
    flows: list[Flow],
    ends: Ends = Ends.BOTH,
    deadline: float = 5.0,
    to_the_end: bool = False,
) -> list[Result]:
    """Do what the sweeper does, until every case has its result, or nothing is left to do."""
    results: list[Result] = []
    with lab.inside("gateway"), Conntrack() as table, Injector(MARKS) as injector:
        condemner = Condemner(table, injector, MARKS, deadline=int(deadline * 1e9))
        targets = [Target(flow, ends, "test", Reason.KILLED) for flow in flows]
        condemner.start(targets, time.monotonic_ns())
        while condemner.next_step_at is not None and (to_the_end or len(results) < len(flows)):
            pause = max(0, condemner.next_step_at - time.monotonic_ns())
            polling.select([], [], [], pause / 1e9)
            results += condemner.step(time.monotonic_ns()).results
        assert injector.failed == {}
    return results


def is_dead(one: socket.socket) -> bool:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == CLOSED


def fate(one: socket.socket) -> str:
    """Wait until a socket is dead and return the error it died of."""
    wait_until(lambda: is_dead(one))
    return errno.errorcode.get(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "none")


def talk(connection: Connection) -> None:
    """Show that a connection works both ways."""
    connection.client.sendall(b"ping")
    assert connection.server.recv(4) == b"ping"
    connection.server.sendall(b"pong")
    assert connection.client.recv(4) == b"pong"


WAYS = [
    pytest.param(SERVER4, 8000, id="forwarded-IPv4"),
    pytest.param(SERVER6, 8000, id="forwarded-IPv6"),
    pytest.param(OUTSIDE4, 8000, id="ending-here-IPv4"),
    pytest.param(OUTSIDE6, 8000, id="ending-here-IPv6"),
    pytest.param(OUTSIDE4, NAT_PORT, id="DNAT-and-masquerade-IPv4"),
    pytest.param(OUTSIDE6, NAT_PORT, id="DNAT-and-masquerade-IPv6"),
]
every_way = pytest.mark.parametrize(("address", "port"), WAYS)


@every_way
def test_idle(lab: ThreeHosts, connections: contextlib.ExitStack, address: str, port: int) -> None:
    condemned = connect(lab, connections, address, port)
    with lab.inside("client"):
        other_client = socket.create_connection((address, port), timeout=10)
    other_server = condemned.listener.accept()[0]
    connections.callback(other_client.close)
    connections.callback(other_server.close)
    flows = flows_of(lab, condemned)
    if port == NAT_PORT:
        assert flows[0].original.destination != flows[0].reply.source
        assert flows[0].original.source != flows[0].reply.destination
    (result,) = kill(lab, flows)
    assert result.outcome is Outcome.RESET, result.text
    assert fate(condemned.client) == "ECONNRESET"
    assert fate(condemned.server) == "ECONNRESET"
    other_client.sendall(b"still")
    assert other_server.recv(5) == b"still"


@every_way
def test_half_closed_by_the_client(
    lab: ThreeHosts, connections: contextlib.ExitStack, address: str, port: int
) -> None:
    condemned = connect(lab, connections, address, port)
    talk(condemned)
    condemned.client.shutdown(socket.SHUT_WR)
    assert condemned.server.recv(1) == b""
    (result,) = kill(lab, flows_of(lab, condemned))
    assert result.outcome is Outcome.RESET, result.text
    assert fate(condemned.client) == "ECONNRESET"
    # Linux names a RST in CLOSE_WAIT so (tcp_reset).
    assert fate(condemned.server) == "EPIPE"


@every_way
def test_half_closed_by_the_server(
    lab: ThreeHosts, connections: contextlib.ExitStack, address: str, port: int
) -> None:
    condemned = connect(lab, connections, address, port)
    talk(condemned)
    condemned.server.shutdown(socket.SHUT_WR)
    assert condemned.client.recv(1) == b""
    (result,) = kill(lab, flows_of(lab, condemned))
    assert result.outcome is Outcome.RESET, result.text
    assert fate(condemned.client) == "EPIPE"
    assert fate(condemned.server) == "ECONNRESET"


@every_way
@pytest.mark.parametrize("sender", ["client", "server"])
def test_busy(
    lab: ThreeHosts, connections: contextlib.ExitStack, address: str, port: int, sender: str
) -> None:
    condemned = connect(lab, connections, address, port)
    first, second = condemned.client, condemned.server
    if sender == "server":
        first, second = second, first
    ends: dict[str, str] = {}
    moved = 0

    def send() -> None:
        try:
            while True:
                first.sendall(bytes(1 << 16))
        except OSError as error:
            ends["sender"] = errno.errorcode[error.errno or 0]

    def receive() -> None:
        nonlocal moved
        try:
            while data := second.recv(1 << 16):
                moved += len(data)
        except OSError as error:
            ends["receiver"] = errno.errorcode[error.errno or 0]

    first.settimeout(None)
    second.settimeout(None)
    threads = [threading.Thread(target=work, daemon=True) for work in (send, receive)]
    for thread in threads:
        thread.start()
    wait_until(lambda: moved > 1 << 22)
    (result,) = kill(lab, flows_of(lab, condemned))
    for thread in threads:
        thread.join(10)
    assert result.outcome is Outcome.RESET, result.text
    assert ends == {"sender": "ECONNRESET", "receiver": "ECONNRESET"}


@pytest.mark.parametrize("ends", [Ends.SOURCE, Ends.DESTINATION])
def test_only_one_end(lab: ThreeHosts, connections: contextlib.ExitStack, ends: Ends) -> None:
    condemned = connect(lab, connections)
    told, other = condemned.client, condemned.server
    if ends is Ends.DESTINATION:
        told, other = other, told
    (result,) = kill(lab, flows_of(lab, condemned), ends)
    assert result.outcome is Outcome.RESET, result.text
    assert fate(told) == "ECONNRESET"
    assert not is_dead(other)


def test_a_client_that_has_left_the_net_is_reported(
    lab: ThreeHosts, connections: contextlib.ExitStack
) -> None:
    condemned = connect(lab, connections)
    flows = flows_of(lab, condemned)
    lab.run("client", "iptables", "-w", "-A", "INPUT", "-j", "DROP")
    try:
        (result,) = kill(lab, flows, deadline=0.7)
    finally:
        lab.run("client", "iptables", "-w", "-F")
    assert (result.outcome, result.silent) == (Outcome.SILENT, Ends.SOURCE), result.text
    assert fate(condemned.server) == "ECONNRESET"
    assert not is_dead(condemned.client)
    condemned.client.sendall(b"back")  # condemned it stays: the first word is its last
    assert fate(condemned.client) == "ECONNRESET"


def test_an_end_whose_rst_is_lost_is_told_again(
    lab: ThreeHosts, connections: contextlib.ExitStack
) -> None:
    condemned = connect(lab, connections)
    # The first RST to the client is dropped on its way; the second is let through.
    rule = ("-p", "tcp", "--tcp-flags", "RST", "RST", "-m", "quota", "--quota", "40", "-j", "DROP")
    lab.run("client", "iptables", "-w", "-A", "INPUT", *rule)
    try:
        (result,) = kill(lab, flows_of(lab, condemned), to_the_end=True)
        dropped = lab.run("client", "iptables", "-w", "-vnL", "INPUT").splitlines()[2].split()[0]
        assert dropped == "1"
    finally:
        lab.run("client", "iptables", "-w", "-F")
    assert result.outcome is Outcome.RESET, result.text
    assert fate(condemned.client) == "ECONNRESET"


def test_a_half_open_connection(lab: ThreeHosts, connections: contextlib.ExitStack) -> None:
    """A SYN-ACK that never reached the client: the server's half of a connection goes."""
    listener = lab.listen("server", 8000)
    connections.callback(listener.close)
    lab.run("client", "iptables", "-w", "-A", "INPUT", "-j", "DROP")
    try:
        with lab.inside("client"):
            client = socket.socket()
        connections.callback(client.close)
        client.setblocking(False)
        client.connect_ex((SERVER4, 8000))
        half = ("server", "ss", "-Htn", "state", "syn-recv")
        wait_until(lambda: SERVER4 in lab.run(*half))
        with lab.inside("gateway"), Conntrack() as table:
            flows = select(table.dump(), port=8000)
        (result,) = kill(lab, flows, Ends.DESTINATION)
        assert result.outcome is Outcome.RESET, result.text
        assert lab.run(*half) == ""
    finally:
        lab.run("client", "iptables", "-w", "-F")


def test_a_connection_that_was_aborted_meanwhile_is_over(
    lab: ThreeHosts, connections: contextlib.ExitStack
) -> None:
    condemned = connect(lab, connections)
    flows = flows_of(lab, condemned)
    linger = b"\1\0\0\0\0\0\0\0"
    condemned.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    condemned.client.close()
    wait_until(lambda: is_dead(condemned.server))
    (result,) = kill(lab, flows)
    assert result.outcome is Outcome.OVER, result.text


def test_two_thousand_idle_ones(lab: ThreeHosts, connections: contextlib.ExitStack) -> None:
    count = 2000
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(old[0], 3 * count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, old[1])))
    connections.callback(resource.setrlimit, resource.RLIMIT_NOFILE, old)
    listener = lab.listen("server", 8000)
    connections.callback(listener.close)
    ends = []
    with lab.inside("client"):
        for _ in range(count + 1):
            for one in (socket.create_connection((SERVER4, 8000), 10), listener.accept()[0]):
                connections.callback(one.close)
                ends.append(one)
    *hoard, spared_client, spared_server = ends
    with lab.inside("gateway"), Conntrack() as table:
        flows = select(table.dump(), port=8000)
    flows = [f for f in flows if f.original.source_port != spared_client.getsockname()[1]]
    began = time.monotonic()
    results = kill(lab, flows)
    took = time.monotonic() - began
    assert len(results) == count
    assert {result.outcome for result in results} == {Outcome.RESET}
    assert {fate(one) for one in hoard} == {"ECONNRESET"}
    spared_client.sendall(b"still")
    assert spared_server.recv(5) == b"still"
    print(f"{count} idle connections condemned, provoked and confirmed in {took * 1000:.0f} ms")
    assert took < 5
