"""Many sources that connect faster than they may, all at once, and a server that greets them."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread

from tests.support.network import ThreeHosts
from tests.support.sources import server_address
from tests.support.traffic import bind

_AT_ONCE = 250


@contextmanager
def greeting(lab: ThreeHosts, port: int, v6: bool) -> Iterator[None]:
    """Have the server greet who connects to a port, and close."""
    listener = lab.listen("server", port, v6)

    def greet() -> None:
        with suppress(OSError):
            while True:
                one, _ = listener.accept()
                with one, suppress(OSError):
                    one.sendall(b"+")

    thread = Thread(target=greet)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def hurry(
    lab: ThreeHosts, sources: Sequence[str], port: int, times: int, patience: float = 0.5
) -> int:
    """Connect so many times from each source; return how many connections were greeted.

    `patience` is for how many seconds a greeting is waited for.
    """
    return sum(
        _once(lab, sources[first : first + _AT_ONCE], port, patience)
        for first in range(0, len(sources), _AT_ONCE)
        for _ in range(times)
    )


def _once(lab: ThreeHosts, sources: Sequence[str], port: int, patience: float) -> int:
    """Connect once from each source, all at the same time."""
    open_ones: dict[int, socket.socket] = {}
    poll = select.poll()
    greeted = 0
    v6 = ":" in sources[0]
    try:
        for source in sources:
            with lab.inside("client"):
                one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
            open_ones[one.fileno()] = one
            bind(one, source)
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect((server_address(v6), port))
            poll.register(one, select.POLLIN)
        end = time.monotonic() + patience
        while open_ones and time.monotonic() < end:
            for descriptor, _ in poll.poll(50):
                poll.unregister(descriptor)
                with open_ones.pop(descriptor) as one, suppress(OSError):
                    greeted += one.recv(1) == b"+"
    finally:
        for one in open_ones.values():
            one.close()
    return greeted
