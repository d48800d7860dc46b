"""Clients that come, hold a connection for a while and leave, from many addresses at once."""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.beside import beside
from tests.support.network import ThreeHosts
from tests.support.sources import server_address
from tests.support.traffic import bind

_MOST_AT_ONCE = 100


class Held:
    """How many connections of one family the server holds more than when this was made.

    The kernel counts its sockets, but those of handshakes and of TIME_WAIT.  A listing would count
    one that goes and one that comes in its place while the list is made.
    """

    def __init__(self, lab: ThreeHosts, v6: bool = False) -> None:
        self.samples: list[int] = []
        with lab.inside("server"):
            self._file = Path(f"/proc/thread-self/net/sockstat{'6' if v6 else ''}").open()  # noqa: SIM115
        self._before = 0
        self._before = self.now()

    def now(self) -> int:
        """Return how many there are."""
        words = os.pread(self._file.fileno(), 4096, 0).split()
        tcp = next(at for at, word in enumerate(words) if word in (b"TCP:", b"TCP6:"))
        return int(words[tcp + 2]) - self._before

    @contextmanager
    def watched(self, every: float = 0.01) -> Iterator[Held]:
        """Count all the while."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(every):
                self.samples.append(self.now())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    @property
    def most(self) -> int:
        """The most of all samples."""
        return max(self.samples)

    def close(self) -> None:
        """Let go."""
        self._file.close()


@contextmanager
def hosting(lab: ThreeHosts, port: int, v6: bool = False) -> Iterator[None]:
    """Have the server take in who connects to a port, and leave when the client does."""
    listener = lab.listen("server", port, v6)
    listener.setblocking(False)
    poll, there = select.epoll(), dict[int, socket.socket]()
    poll.register(listener.fileno(), select.EPOLLIN)

    def serve() -> None:
        for number, _ in poll.poll(0.1):
            if number == listener.fileno():
                with suppress(BlockingIOError):
                    while True:
                        one = listener.accept()[0]
                        there[one.fileno()] = one
                        poll.register(one.fileno(), select.EPOLLIN)
                continue
            with suppress(OSError):
                if said := there[number].recv(4096):
                    there[number].send(said)
                    continue
            poll.unregister(number)
            there.pop(number).close()

    try:
        with beside(serve):
            yield
    finally:
        for one in (*there.values(), listener):
            one.close()
        poll.close()


class Comers:
    """What became of clients: how many connections were begun, answered, refused, unanswered."""

    def __init__(self, lab: ThreeHosts, sources: Sequence[str], port: int) -> None:
        self._lab, self._sources, self._port = lab, sources, port
        self.begun = self.served = self.refused = self.failed = 0
        self.held: list[socket.socket] = []
        """Those of `burst`."""

    def burst(self, count: int) -> float:
        """Begin so many connections in the shortest time; return how long that took (seconds)."""
        self.held += [self._socket(number) for number in range(count)]
        began = time.monotonic()
        for one in self.held[-count:]:
            self._connect(one)
        return time.monotonic() - began

    def come(self, rate: float, seconds: float, stays: float) -> None:
        """Begin connections at a rate, or as fast as can be; each asks once.

        Each leaves after `stays` seconds.
        """
        poll = select.epoll()
        there: dict[int, socket.socket] = {}
        asked: set[int] = set()
        leaving: list[tuple[float, int, socket.socket]] = []
        numbers = itertools.count()
        began = now = time.monotonic()
        while now < began + seconds or there:
            due = int(rate * min(now - began, seconds)) - self.begun
            for _ in range(min(due, _MOST_AT_ONCE)):
                one = self._socket(next(numbers))
                self._connect(one)
                there[one.fileno()] = one
                poll.register(one.fileno(), select.EPOLLIN | select.EPOLLOUT)
                heapq.heappush(leaving, (now + stays, next(numbers), one))
            for number, _ in poll.poll(0.002):
                self._hear(poll, there, asked, number)
            while leaving and leaving[0][0] <= now:
                one = heapq.heappop(leaving)[2]
                if there.get(one.fileno()) is one:
                    self.failed += one.fileno() in asked or not _connected(one)
                    _forget(poll, there, asked, one.fileno())
            now = time.monotonic()
        poll.close()

    def _hear(
        self, poll: select.epoll, there: dict[int, socket.socket], asked: set[int], number: int
    ) -> None:
        one = there[number]
        try:
            if number not in asked:
                one.send(b"?")
                asked.add(number)
                poll.modify(number, select.EPOLLIN)
            elif one.recv(1):
                self.served += 1
                asked.discard(number)
                poll.modify(number, 0)
        except BlockingIOError:
            return
        except OSError as error:
            self.refused += error.errno in (errno.ECONNRESET, errno.EPIPE)
            _forget(poll, there, asked, number)

    def _socket(self, number: int) -> socket.socket:
        v6 = ":" in self._sources[0]
        with self._lab.inside("client"):
            one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
        bind(one, self._sources[number % len(self._sources)])
        one.setblocking(False)
        return one

    def _connect(self, one: socket.socket) -> None:
        self.begun += 1
        with suppress(BlockingIOError):
            one.connect((server_address(":" in self._sources[0]), self._port))

    def leave(self, count: int) -> None:
        """Close so many of those that `burst` began and that live."""
        living = [one for one in self.held if _connected(one)]
        for one in living[:count]:
            one.close()
            self.held.remove(one)

    def close(self) -> None:
        """Close all."""
        for one in self.held:
            one.close()


def _connected(one: socket.socket) -> bool:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


def _forget(
    poll: select.epoll, there: dict[int, socket.socket], asked: set[int], number: int
) -> None:
    poll.unregister(number)
    asked.discard(number)
    there.pop(number).close()
