"""Clients that have it hard while SYNs are forged: in their names, or their network is bad.

Under the samples' policies, unchanged but for interface and addresses.
"""

from __future__ import annotations

import itertools
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

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
from tests.bench.gateway import ROOT, SERVER, Site
from tests.support.beside import beside
from tests.support.network import SERVER4
from tests.support.traffic import bind
from tests.support.ways import SlowNetwork

_SECONDS = 30
_EVERY, _AT_ONCE = 0.01, 20
"""2,000 SYNs a second."""
_NEIGHBOURS = 250
_A_SECOND = 50
"""Requests of all neighbours together."""
_LOSS = 0.05
_WAY_MS = 750
_NEWCOMERS = 200
_PATIENCE = 60.0
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


def _spread(work: Callable[[str], object], arguments: list[str], a_second: float) -> None:
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
    for stamps in ("1", "0"):
        with SlowNetwork(_WAY_MS, "rgv") as network, _serving(network):
            network.set("client", {"net/ipv4/tcp_timestamps": stamps})
            for way in ("-s", "-d"):
                rule = (way, "10.72.8.0/24", "-m", "statistic", "--mode", "random")
                lose = ("--probability", str(_LOSS), "-j", "DROP")
                network.run("home", "iptables", "-w", "-A", "FORWARD", *rule, *lose)
            kind = "with time stamps" if stamps == "1" else "without"
            name = f"{100 * _LOSS:g} % loss, {2 * _WAY_MS:,} ms, {kind}: newcomers served"
            note = f"{_NEWCOMERS} requests for {_ANSWER:,} bytes, five a second"
            calm = _newcomers(network)
            yield seen(f"{name}, no guard and no flood", [calm], "%", note)
            text = (ROOT / "policies/web-edge.yaml").read_text()
            named = {"interfaces": "out", "destinations": SERVER4, "trusted": "192.0.2.0/24"}
            for key, value in named.items():
                text = re.sub(rf"{key}: \[[^]]*\]", f"{key}: [{value}]", text)
            with GuardProcess(network, text, network.directory / "runtime") as guard:
                wait_until(guard.filtering)
                _asked(network, "10.72.8.250")
                wait_until(lambda: bool(guard.status()["shun"]["services"]), 10)
                dark = [f"198.18.{third}.{last}" for third in range(256) for last in range(1, 255)]
                with _flood(network, "home", dark, SERVER4):
                    wait_until(lambda: _engaged(guard), 30)
                    served = _newcomers(network)
                    given = guard.status()["syn_budget"]["cookies"]["accepted"]
            yield at_least(calm - 1, f"{name}, web-edge, forged flood", [served], "%", note)
            yield seen(f"{name}: by cookies", [given], "")


def _engaged(guard: GuardProcess) -> bool:
    rows = guard.status()["syn_budget"]["services"]
    return any(row["engaged_s"] is not None for row in rows)


def _newcomers(network: SlowNetwork) -> float:
    """Return how many percent of newcomers were served."""
    served = []

    def one(source: str) -> None:
        with suppress(OSError):
            served.append(_asked(network, source))

    _spread(one, [f"10.72.8.{last}" for last in range(1, 1 + _NEWCOMERS)], 5)
    return 100 * sum(served) / _NEWCOMERS


def _asked(network: SlowNetwork, source: str) -> bool:
    """Tell whether a client has got the whole answer."""
    with network.inside("client"):
        one = socket.socket()
    with one:
        bind(one, source)
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
        listener = socket.create_server(("", PORT), backlog=512)
    with listener:
        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
