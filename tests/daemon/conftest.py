"""The network that a module's tests share, and the services they open in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.guard import Service, give_sources, retransmissions, source
from tests.netns import Lab, wait_until

Open = Callable[..., Service]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Client, gateway and server; the client has as many addresses as one likes."""
    with Lab("rgf") as lab:
        give_sources(lab)
        yield lab


@pytest.fixture
def serve(lab: Lab) -> Iterator[Open]:
    """Open TCP ports, closed after the test together with all their connections."""
    opened: list[Service] = []

    def open_service(port: int, v6: bool = False, place: str = "server") -> Service:
        opened.append(Service(lab, port, place, v6))
        return opened[-1]

    yield open_service
    for service in opened:
        service.close()


class Crowd:
    """Clients that connect, say a word and leave, one after the other, and count what fails."""

    def __init__(self, lab: Lab, service: Service) -> None:
        self.good, self.failures = 0, list[str]()
        self.repeated = 0
        """Segments that a client had to send again: each tells of a packet lost on the way."""
        self._lab, self._service = lab, service
        self._over = threading.Event()

    def _client(self) -> None:
        address = source(self._service.v6)
        while not self._over.is_set():
            try:
                link = self._service.connect(address)
                link.talk()
                self.repeated += retransmissions(link.client)
                link.close()
            except OSError as error:
                self.failures.append(repr(error))
            else:
                self.good += 1

    @contextmanager
    def at_work(self) -> Iterator[Crowd]:
        """Connect all the while."""
        thread = threading.Thread(target=self._client)
        thread.start()
        try:
            self.more(20)
            yield self
        finally:
            self._over.set()
            thread.join()

    def more(self, count: int) -> None:
        """Wait until so many more have been there."""
        until = self.good + count
        wait_until(lambda: self.good >= until, 20)
