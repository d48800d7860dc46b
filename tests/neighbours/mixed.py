"""Honest traffic of many kinds at once, counted where it arrives.

Every client and server does a fixed piece of work, slowly enough for a busy machine: what is
missing in the end has been kept from it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from rstguard.lab.network import Network
from tests.support.traffic import bind

TICKS: Final = 70
EVERY: Final = 0.03
_CHUNK: Final = os.urandom(12_000)
_REQUEST: Final = 400
_ANSWER: Final = os.urandom(6_000)
_REQUESTS: Final = 20
_DATAGRAMS: Final = 30
_FASTOPEN_CONNECT: Final = 30
_PATIENCE: Final = 6.0
"""Seconds that an end waits for the other."""


class Target(NamedTuple):
    """A service: what clients connect to, and where it listens."""

    name: str
    address: str
    port: int
    inside: str
    """The host that serves."""
    listens: int
    sources: tuple[str, ...] = ()
    """Addresses of clients; without them those that the route gives."""
    outside: str = "client"
    """The host that the clients are on."""
    fast_open: bool = False
    """Whether clients send what they have with their SYN."""
    own: str = ""
    """The server's address that datagrams are answered from, where it has others as well."""

    @property
    def family(self) -> socket.AddressFamily:
        """The address family."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


@dataclass
class Tally:
    """What arrived, by service and kind, at which end."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, count: int) -> None:
        """Count something that has arrived."""
        with self._lock:
            self.counts[what] += count

    def failed(self, what: str, error: BaseException) -> None:
        """Note what went wrong."""
        with self._lock:
            self.problems.append(f"{what}: {error!r}")

    def short_of(self, control: Tally, share: float = 0.99) -> dict[str, str]:
        """Return all of which less arrived than the share of what did in the control."""
        return {
            what: f"{self.counts[what]} of {count}"
            for what, count in sorted(control.counts.items())
            if self.counts[what] < share * count
        }


def run(network: Network, targets: list[Target]) -> Tally:
    """Let clients of all kinds use all services at once, and return what arrived."""
    tally = Tally()
    with contextlib.ExitStack() as stack:
        for target in targets:
            stack.enter_context(_serving(network, target, tally))
        threads = [
            threading.Thread(target=_guarded, args=(tally, f"{target.name} {name}", work, ends))
            for target in targets
            for name, work in _CLIENTS.items()
            for ends in [_Ends(network, target, tally)]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tally


class _Ends(NamedTuple):
    network: Network
    target: Target
    tally: Tally

    def connect(self, number: int = 0) -> socket.socket:
        """Return a new connection of one of the clients."""
        target = self.target
        with self.network.inside(target.outside):
            one = socket.socket(target.family)
        try:
            one.settimeout(_PATIENCE)
            if target.sources:
                bind(one, target.sources[number % len(target.sources)])
            if target.fast_open:
                one.setsockopt(socket.IPPROTO_TCP, _FASTOPEN_CONNECT, 1)
            one.connect((target.address, target.port))
        except BaseException:
            one.close()
            raise
        return one


def _guarded(tally: Tally, name: str, work: Callable[[_Ends, str], None], ends: _Ends) -> None:
    try:
        work(ends, name)
    except (OSError, EOFError) as error:
        tally.failed(name, error)


def _requests(ends: _Ends, name: str) -> None:
    """Short connections one after another, of which each second one is closed half first.

    Not so with `fast_open`: to close what is not open yet is to give it up.
    """
    for number in range(_REQUESTS):
        time.sleep(TICKS * EVERY / _REQUESTS)
        first = bool(number % 2 and not ends.target.fast_open)
        try:
            with ends.connect(number) as one:
                one.sendall(b"r" + bytes(_REQUEST - 1))
                if first:
                    one.shutdown(socket.SHUT_WR)
                ends.tally.add(f"{name} bytes", len(_exactly(one, len(_ANSWER))))
                if not first:
                    one.shutdown(socket.SHUT_WR)
                if not one.recv(1):
                    ends.tally.add(f"{name} connections", 1)
        except (OSError, EOFError) as error:
            ends.tally.failed(f"{name} {number}", error)


def _download(ends: _Ends, name: str) -> None:
    with ends.connect(1) as one:
        one.sendall(b"d")
        while data := one.recv(1 << 18):
            ends.tally.add(f"{name} bytes", len(data))
        ends.tally.add(f"{name} connections", 1)


def _upload(ends: _Ends, name: str) -> None:
    with ends.connect(2) as one:
        one.sendall(b"u")
        _paced(one)
        one.shutdown(socket.SHUT_WR)
        (count,) = struct.unpack(">Q", _exactly(one, 8))
        ends.tally.add(f"{name} bytes told by the server", count)
        ends.tally.add(f"{name} connections", 1)


def _idle(ends: _Ends, name: str) -> None:
    """Connections that speak, are silent while the others work, and speak again."""
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(ends.connect(number)) for number in range(3)]
        for late in (False, True):
            for one in links:
                one.sendall(b"e" + bytes(99))
                ends.tally.add(f"{name} bytes", len(_exactly(one, 100)))
            if not late:
                time.sleep(TICKS * EVERY)
        ends.tally.add(f"{name} connections", len(links))


def _datagrams(ends: _Ends, name: str) -> None:
    with ends.network.inside(ends.target.outside):
        one = socket.socket(ends.target.family, socket.SOCK_DGRAM)
    with one:
        one.settimeout(3)
        one.connect((ends.target.address, ends.target.port))
        for _ in range(_DATAGRAMS):
            time.sleep(TICKS * EVERY / _DATAGRAMS)
            one.send(b"ask")
            one.recv(16)
            ends.tally.add(f"{name}", 1)


_CLIENTS: Final = {
    "requests": _requests,
    "download": _download,
    "upload": _upload,
    "idle": _idle,
    "datagrams": _datagrams,
}


@contextlib.contextmanager
def _serving(network: Network, target: Target, tally: Tally) -> Iterator[None]:
    with network.inside(target.inside):
        listener = socket.create_server(("", target.listens), family=target.family, backlog=512)
        inbox = socket.socket(target.family, socket.SOCK_DGRAM)
        if target.family is socket.AF_INET6:
            inbox.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        inbox.bind((target.own, target.listens))
    threads: list[threading.Thread] = []

    def accept() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=_serve, args=(one, target.name, tally)))
            threads[-1].start()

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = inbox.recvfrom(100)
                if data == b"end":
                    return
                inbox.sendto(b"answer", peer)

    threads += [threading.Thread(target=work) for work in (accept, answer)]
    for thread in threads[:]:
        thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        local = "::1" if target.family is socket.AF_INET6 else "127.0.0.1"
        inbox.sendto(b"end", (target.own or local, target.listens))
        for thread in threads:
            thread.join(2 * _PATIENCE)
        listener.close()
        inbox.close()


def _serve(one: socket.socket, name: str, tally: Tally) -> None:
    one.settimeout(_PATIENCE)
    try:
        with one:
            kind = one.recv(1)
            if kind == b"r":
                tally.add(f"{name} served bytes", len(_exactly(one, _REQUEST - 1)))
                one.sendall(_ANSWER)
                if not one.recv(1):
                    tally.add(f"{name} served connections", 1)
            elif kind == b"d":
                _paced(one)
                one.shutdown(socket.SHUT_WR)
                one.recv(1)
            elif kind == b"u":
                count = 0
                while data := one.recv(1 << 18):
                    count += len(data)
                tally.add(f"{name} uploaded bytes", count)
                one.sendall(struct.pack(">Q", count))
            elif kind == b"e":
                one.sendall(kind + _exactly(one, 99))
                one.settimeout(TICKS * EVERY + _PATIENCE)
                while data := one.recv(100):
                    one.sendall(data)
    except (OSError, EOFError) as error:
        tally.failed(f"{name}, serving", error)


def _paced(one: socket.socket) -> None:
    """Send a piece again and again, at the pace at which it was to be sent."""
    begin = time.monotonic()
    for tick in range(TICKS):
        one.sendall(_CHUNK)
        time.sleep(max(0.0, begin + (tick + 1) * EVERY - time.monotonic()))


def _exactly(one: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := one.recv(count - len(data))):
            raise EOFError(f"{len(data)} of {count} bytes")
        data += more
    return data
