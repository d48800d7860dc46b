"""Clients that have it hard while SYNs are forged: in their names, or their network is bad.

Under the samples' policies, unchanged but for interface and addresses.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from rstguard.engine.address import parse_address
from rstguard.engine.segment import emit
from rstguard.engine.wire import SYN, Packet
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.lab.guard import GuardProcess
from rstguard.lab.network import Network
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.bench.forged import PORT, SAMPLES, answering, banned, guarded, request
from tests.bench.gateway import HERE, ROOT, SERVER, Site
from tests.support.beside import beside
from tests.support.network import SERVER4
from tests.support.traffic import bind
from tests.support.ways import HOME4, SlowNetwork

_T = TypeVar("_T")
_SECONDS = 30
_EVERY, _AT_ONCE = 0.01, 20
"""2,000 SYNs a second."""
_NEIGHBOURS = 250
_A_SECOND = 50
"""Requests of all neighbours together."""
_LOSSY = 0.05
_FAR_MS = 750
_NEWCOMERS = 200
_PATIENCE = 60.0
_USUAL = 0.01
_KNOWN = 50
_KINDS_A_SECOND, _FLOOD = 200, 50_000
_IPPROTO_MPTCP, _FASTOPEN_CONNECT = 262, 30
"""linux/in.h, linux/tcp.h."""
_ANSWER = 20_000
"""Bytes: some round trips, as a window begins with ten segments."""


def neighbours() -> Iterator[Figure]:
    """Clients of a /24, in all of whose names 2,000 SYNs a second are forged."""
    network = [f"198.51.100.{last}" for last in range(1, _NEIGHBOURS + 1)]
    for sample in SAMPLES:
        with Site() as site, answering(site), guarded(site, sample) as guard:
            with _flood(site, "client", network, SERVER):
                failed = _visited(site, network)
            turns = _SECONDS * _A_SECOND
            name = f"{sample}: {_NEIGHBOURS} clients of a /24 in whose names SYNs are forged"
            note = f"{_A_SECOND} requests a second for {_SECONDS} s, in turn, the first amid it"
            yield at_least(99, f"{name}: served", [100 - 100 * failed.total() / turns], "%", note)
            yield at_most(0, f"{name}: of them below 99 %", [len(failed)], "", note)
            yield at_most(0, f"{name}: bans", [banned(guard)], "")


def _visited(site: Site, network: list[str]) -> Counter[str]:
    """Have each make requests in turn; return how many failed of whom."""
    failed: Counter[str] = Counter()

    def one(source: str) -> None:
        try:
            request(site, source).close()
        except OSError:
            failed[source] += 1

    turns = itertools.islice(itertools.cycle(network), _SECONDS * _A_SECOND)
    _spread(one, list(turns), _A_SECOND)
    return failed


def _spread(work: Callable[[_T], object], arguments: Sequence[_T], a_second: float) -> None:
    """Call something beside this thread for each argument, so many times a second."""
    began, threads = time.monotonic(), []
    for number, argument in enumerate(arguments):
        time.sleep(max(0.0, began + number / a_second - time.monotonic()))
        threads.append(threading.Thread(target=work, args=(argument,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


@contextmanager
def _flood(network: Network, place: str, sources: list[str], target: str) -> Iterator[None]:
    """SYNs in the names of sources, all the while; nobody stands behind them."""
    draw = random.Random(1)
    with network.inside(place), closing(Injector(Marks())) as injector:

        def forge() -> None:
            packets = []
            for _ in range(_AT_ONCE):
                ends = parse_address(draw.choice(sources)), parse_address(target)
                ports = draw.randrange(1024, 65536), PORT
                packets.append(emit(Packet(*ends, *ports, draw.getrandbits(32), 0, SYN, 1000, 0)))
            injector.send(packets)

        with beside(forge, _EVERY):
            yield


def lossy() -> Iterator[Figure]:
    """Newcomers whose packets are lost, 5 of 100, and take 1.5 s to come back, amid a flood."""
    dark = [f"198.18.{third}.{last}" for third in range(256) for last in range(1, 255)]
    comers = [_Client(f"10.72.8.{last}") for last in range(1, 1 + _NEWCOMERS)]
    for stamps in (True, False):
        with _network(_FAR_MS, _LOSSY, stamps) as network:
            name = f"{_conditions(_FAR_MS, _LOSSY, stamps)}: newcomers served"
            note = f"{_NEWCOMERS} requests for {_ANSWER:,} bytes, five a second"
            calm = _served(network, comers, 5)
            yield seen(f"{name}, no guard and no flood", [calm], "%", note)
            with _guarded(network) as guard, _flood(network, "home", dark, SERVER4):
                wait_until(lambda: _engaged(guard), 30)
                served = _served(network, comers, 5)
                given = guard.status()["syn_budget"]["cookies"]["accepted"]
            yield at_least(calm - 1, f"{name}, web-edge, forged flood", [served], "%", note)
            yield seen(f"{name}: by cookies", [given], "")


def kinds() -> Iterator[Figure]:
    """Clients of all kinds, near and far, from the first second of 50,000 forged SYNs a second."""
    for delay in (3, 150):
        for stamps in (True, False):
            with _network(delay, _USUAL, stamps) as network, _guarded(network):
                clients = _all_kinds()
                _served(network, clients[: 2 * _KNOWN : 2], 20)
                sender = _flat_out(network)
                served = _served(network, clients, _KINDS_A_SECOND)
                said, _ = sender.communicate()
            name = _conditions(delay, _USUAL, stamps)
            note = f"{len(clients):,} requests, {_KINDS_A_SECOND} a second, half from newcomers, "
            note += "a third with TCP Fast Open, a third MPTCP, all with ECN; "
            note += f"{int(said.split()[0]) / _SECONDS:,.0f} SYNs/s"
            yield at_least(99, f"{name}: all kinds served, web-edge, flood", [served], "%", note)


@dataclass(frozen=True, slots=True)
class _Client:
    """Who asks; `kind` is what he begins with: plain TCP, Fast Open or MPTCP."""

    address: str
    kind: int = 0


def _all_kinds() -> list[_Client]:
    """Newcomers and who comes again and again, in turn."""
    number = _KINDS_A_SECOND * (_SECONDS - 2)
    again = itertools.cycle(f"10.72.8.{last}" for last in range(1, 1 + _KNOWN))
    anew = (f"10.72.{16 + n // 250}.{1 + n % 250}" for n in itertools.count())
    turns = itertools.chain.from_iterable(zip(again, anew, strict=False))
    kinds = random.Random(1)
    return [_Client(one, kinds.randrange(3)) for one in itertools.islice(turns, number)]


def _conditions(delay: int, loss: float, stamps: bool) -> str:
    kind = "with time stamps" if stamps else "without"
    return f"{100 * loss:g} % loss, {2 * delay:,} ms, {kind}"


@contextmanager
def _network(delay: int, loss: float, stamps: bool) -> Iterator[SlowNetwork]:
    """A wire that takes so many ms one way and loses so much each way, in front of a web server."""
    with SlowNetwork(delay, "rgv") as network:
        network.set("client", {"net/ipv4/tcp_timestamps": "01"[stamps], "net/ipv4/tcp_ecn": "1"})
        network.set("server", {"net/ipv4/tcp_syncookies": "0", "net/ipv4/tcp_fastopen": "3"})
        network.ip("client", "route add local 10.72.16.0/20 dev lo")
        network.ip("home", "route add 10.72.16.0/20 via 10.72.1.2")
        network.ip("gateway", f"route add 10.72.16.0/20 via {HOME4}")
        for way in ("-s", "-d"):
            rule = (way, "10.72.0.0/16", "-m", "statistic", "--mode", "random")
            lose = ("--probability", str(loss), "-j", "DROP")
            network.run("home", "iptables", "-w", "-A", "FORWARD", *rule, *lose)
        with _serving(network):
            yield network


@contextmanager
def _guarded(network: SlowNetwork) -> Iterator[GuardProcess]:
    """Run web-edge until it knows what the server offers; the clients are none of its own."""
    text = (ROOT / "policies/web-edge.yaml").read_text()
    named = {"interfaces": "out", "destinations": SERVER4, "trusted": "192.0.2.0/24"}
    for key, value in named.items():
        text, count = re.subn(rf"{key}: \[[^]]*\]", f"{key}: [{value}]", text)
        assert count == 1
    with GuardProcess(network, text, network.directory / "runtime") as guard:
        wait_until(guard.filtering)
        _asked(network, _Client("10.72.8.250"))
        wait_until(lambda: bool(guard.status()["shun"]["services"]), 20)
        yield guard


def _engaged(guard: GuardProcess) -> bool:
    rows = guard.status()["syn_budget"]["services"]
    return any(row["engaged_s"] is not None for row in rows)


def _flat_out(network: SlowNetwork) -> subprocess.Popen[str]:
    """Send SYNs right in front of the gateway; there is no way back to their sources."""
    program = network.directory / "flood"
    subprocess.run(["cc", "-O2", "-o", program, HERE / "flood.c"], check=True)
    mac = network.run("gateway", "cat", "/sys/class/net/out/address").strip()
    words = ("far", mac, SERVER4, str(PORT), str(_SECONDS), str(_FLOOD), "1", "2")
    with network.inside("wire"):
        return subprocess.Popen([program, *words], stdout=subprocess.PIPE, text=True)


def _served(network: SlowNetwork, clients: Sequence[_Client], a_second: float) -> float:
    """Return how many percent of clients were served."""
    served = []

    def one(client: _Client) -> None:
        with suppress(OSError):
            served.append(_asked(network, client))

    _spread(one, clients, a_second)
    return 100 * sum(served) / len(clients)


def _asked(network: SlowNetwork, client: _Client) -> bool:
    """Tell whether a client has got the whole answer."""
    with network.inside("client"):
        protocol = _IPPROTO_MPTCP if client.kind == 2 else 0
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    with one:
        bind(one, client.address)
        if client.kind == 1:
            one.setsockopt(socket.IPPROTO_TCP, _FASTOPEN_CONNECT, 1)
        one.settimeout(_PATIENCE)
        one.connect((SERVER4, PORT))
        one.sendall(b"hello")
        got = 0
        while got < _ANSWER and (data := one.recv(1 << 16)):
            got += len(data)
        return got == _ANSWER


@contextmanager
def _serving(network: SlowNetwork) -> Iterator[None]:
    """Have the server answer each connection's first words, and close."""

    def serve(one: socket.socket) -> None:
        with one, suppress(OSError):
            one.settimeout(_PATIENCE)
            if one.recv(100):
                one.sendall(bytes(_ANSWER))
                one.shutdown(socket.SHUT_WR)
                one.recv(1)

    def accept() -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                threading.Thread(target=serve, args=(one,), daemon=True).start()

    with network.inside("server"):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 64)
        listener.bind(("", PORT))
        listener.listen(512)
        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
