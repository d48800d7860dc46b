"""What becomes of a visitor in whose name SYNs are forged, under the samples' policies.

And of a flooder who owns his address and returns SYN cookies: he is contained all the same.
"""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from rstguard.engine.address import parse_address
from rstguard.kernel.sets import Sets
from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, at_most, seen
from tests.bench.gateway import ROOT, SERVER, Site, milliseconds_since

PORT = 443
SCANNED = "8000-8100"
"""Ports that both samples protect, and where nothing listens."""
FLOODS, SCANS = (1_000, 20_000, 100_000), (2, 20, 1_000)
SAMPLES = ("web-edge", "strict-gateway")


class _Limits(NamedTuple):
    """What a sample allows one source, and whether only what he does by cookies counts."""

    burst: int
    a_second: float
    apart: bool

    def at(self, nanoseconds: int) -> float:
        return self.burst + self.a_second * nanoseconds / 1e9


_LIMITS = {"web-edge": _Limits(200, 100, True), "strict-gateway": _Limits(60, 20, False)}
"""Of `syn-rate`, and of `handshake-rate`."""
_SECONDS = 20
_REQUESTS = 10
"""A second: a visitor in a hurry, and below every limit."""
_PATIENCE = 5.0
_HURRIES = 4
_OBSERVER = "198.51.100.250"


def forged() -> Iterator[Figure]:
    """Requests served of a visitor, and of a newcomer, while SYNs are forged in his name."""
    for sample in SAMPLES:
        # Each victim is alone in a /28, which is one source of strict-gateway.
        victims = (f"198.51.100.{16 * number + 1}" for number in range(1, 15))
        with Site() as site, answering(site), guarded(site, sample) as guard:
            for what, ports, rates in (("flood", str(PORT), FLOODS), ("scan", SCANNED, SCANS)):
                for rate in rates:
                    for who in ("visitor", "newcomer"):
                        run = _Run(site, next(victims), known=who == "visitor")
                        name = f"{sample}: forged {what} of {rate:,}/s: {who}"
                        yield from run.figures(name, guard, ports, rate)
            yield from _hurried(site, guard, sample, next(victims))


@contextmanager
def guarded(site: Site, sample: str) -> Iterator[GuardProcess]:
    """Run the sample, but for interface and addresses, until it knows what the server offers."""
    text = (ROOT / f"policies/{sample}.yaml").read_text()
    for key, value in (("interfaces", "out"), ("destinations", SERVER)):
        text, count = re.subn(rf"{key}: \[[^]]*\]", f"{key}: [{value}]", text)
        assert count == 1
    # Where something is connected already the tracker is known to have seen all there is.
    with request(site, _OBSERVER):
        guard = site.guard(text)
    try:
        request(site, _OBSERVER).close()
        wait_until(lambda: bool(guard.status()["shun"]["services"]))
        yield guard
    finally:
        guard.stop()


@contextmanager
def answering(site: Site) -> Iterator[None]:
    """Have the server send back what it is sent, until the client closes."""

    def serve(one: socket.socket) -> None:
        with one, suppress(OSError):
            while data := one.recv(100):
                one.sendall(data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                threading.Thread(target=serve, args=(one,), daemon=True).start()

    with site.listen("server", PORT) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield
        listener.shutdown(socket.SHUT_RDWR)


def request(site: Site, source: str) -> socket.socket:
    """Return a connection of a source on which the server has answered.

    Raises:
        OSError: it did not.
    """
    one = site.client_socket(source)
    try:
        one.settimeout(_PATIENCE)
        one.connect((SERVER, PORT))
        _talk(one)
    except BaseException:
        one.close()
        raise
    return one


def _talk(one: socket.socket) -> None:
    one.sendall(b"hello")
    if one.recv(5) != b"hello":
        raise OSError("the connection was closed")


@dataclass
class _Run:
    """One flood in the name of a victim, and what he sees of it; `known`: he had come before."""

    site: Site
    victim: str
    known: bool
    times: list[float] = field(default_factory=list)
    failed: int = 0

    def figures(self, name: str, guard: GuardProcess, ports: str, rate: int) -> Iterator[Figure]:
        """Yield what was measured."""
        before = banned(guard)
        old = [request(self.site, self.victim) for _ in range(5 if self.known else 0)]
        with _syns_at_server(self.site, self.victim) as arrived:
            sent, broken = self._go(ports, rate, old)
            reached = arrived() - len(self.times) - self.failed
        for one in old:
            one.close()
        note = f"{_REQUESTS} requests a second for {_SECONDS} s"
        served = 100 * len(self.times) / (len(self.times) + self.failed)
        yield at_least(99, f"{name}: served", [served], "%", note)
        times = sorted(self.times) or [0.0]
        yield seen(f"{name}: request p50", [median(times)], "ms")
        yield seen(f"{name}: request p99", [times[int(0.99 * (len(times) - 1))]], "ms")
        if self.known:
            yield at_most(0, f"{name}: old connections broken", [broken], "")
        yield at_most(0, f"{name}: bans", [banned(guard) - before], "")
        yield seen(f"{name}: SYNs forged", [sent / _SECONDS], "/s")
        yield seen(f"{name}: of them at the server", [100 * max(0, reached) / sent], "%")

    def _go(self, ports: str, rate: int, old: list[socket.socket]) -> tuple[int, int]:
        """Return how many SYNs were forged, and how many old connections broke."""
        site, words = self.site, (ports, str(_SECONDS), str(rate), self.victim, "2")
        flood = [site.compiled("flood.c"), "eth0", site.gateway_mac(), SERVER, *words]
        with site.inside("client"):
            sender = subprocess.Popen(flood, stdout=subprocess.PIPE, text=True)
        threads, began, broken = [], time.monotonic(), 0
        for number in range(_SECONDS * _REQUESTS):
            time.sleep(max(0.0, began + number / _REQUESTS - time.monotonic()))
            threads.append(threading.Thread(target=self._one))
            threads[-1].start()
            if number % _REQUESTS == 0:
                broken += sum(map(_is_broken, old))
        said, _ = sender.communicate()
        for thread in threads:
            thread.join()
        return int(said.split()[0]), broken

    def _one(self) -> None:
        began = time.monotonic_ns()
        try:
            request(self.site, self.victim).close()
            self.times.append(milliseconds_since(began))
        except OSError:
            self.failed += 1


def _is_broken(one: socket.socket) -> bool:
    try:
        _talk(one)
    except OSError:
        return True
    return False


def banned(guard: GuardProcess) -> int:
    return sum(guard.status()["counts"].get("ban", {}).values())


@contextmanager
def _syns_at_server(site: Site, source: str) -> Iterator[Callable[[], int]]:
    """Count the SYNs of a source that come to the server."""
    chain = ("PREROUTING", "-s", source, "-p", "tcp", "--syn")
    site.run("server", "iptables", "-t", "raw", "-A", *chain)

    def arrived() -> int:
        lines = site.run("server", "iptables", "-t", "raw", "-vnxL", "PREROUTING").splitlines()
        return next(int(line.split()[0]) for line in lines if f" {source} " in line)

    yield arrived
    site.run("server", "iptables", "-t", "raw", "-D", *chain)


def _hurried(site: Site, guard: GuardProcess, sample: str, source: str) -> Iterator[Figure]:
    """A flooder who returns his cookies: how soon he is banned, and what the server had of him."""
    made: list[int] = []
    over = threading.Event()

    def hurry() -> None:
        while not over.is_set():
            with site.client_socket(source) as one, suppress(OSError):
                one.settimeout(0.05)
                one.connect((SERVER, PORT))
                made.append(time.monotonic_ns())

    threads = [threading.Thread(target=hurry) for _ in range(_HURRIES)]
    with _syns_at_server(site, source) as arrived, site.inside("gateway"), Sets() as sets:
        began = time.monotonic_ns()
        for thread in threads:
            thread.start()
        address = parse_address(source)
        shunned = _when(lambda: sets.contains(address))
        banned = _when(
            lambda: any(e.kind == "ban" and e.source.covers(address) for e in sets.list())
        )
        over.set()
        for thread in threads:
            thread.join()
        reached = arrived()
    limits = _LIMITS[sample]
    counted = [at for at in sorted(made) if at > shunned or not limits.apart]
    due = next((at for n, at in enumerate(counted) if n + 1 > limits.at(at - counted[0])), banned)
    name = f"{sample}: a real flooder"
    note = "from his first SYN on; each of his connections returns its cookie"
    yield seen(f"{name}: shunned after", [(shunned - began) / 1e6], "ms", note)
    yield seen(f"{name}: banned after", [(banned - began) / 1e6], "ms", note)
    before = sum(at < banned for at in made)
    yield seen(f"{name}: his connections until then", [before], "")
    late = max(0.0, (banned - due) / 1e6)
    note = "by the flooder's own clock; looked for each half a millisecond"
    yield at_most(50, f"{name}: banned after the connection that was too many", [late], "ms", note)
    yield seen(f"{name}: his SYNs at the server", [reached], "")


def _when(true: Callable[[], bool]) -> int:
    """Look until something is true; return when that was (monotonic nanoseconds)."""
    end = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > end:
            raise RuntimeError("a flooder was not blocked")
        time.sleep(0.0005)
    return time.monotonic_ns()
