"""Honest clients of a service while a test does something else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rstguard.lab.waiting import wait_until
from tests.support.network import ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Service, retransmissions


class Crowd:
    """Clients that connect, say a word and leave, one after the other, and count what fails."""

    def __init__(self, lab: ThreeHosts, service: Service) -> None:
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
