"""A connection on which something is under way all the while."""

from __future__ import annotations

import struct
import threading
from typing import Final

from tests.support.traffic import Link

_AT_ONCE: Final = 64
_NUMBER: Final = struct.Struct(">Q")
_BLOCK: Final = struct.Struct(f">{_AT_ONCE}Q")


class Stream:
    """Numbers that a client sends all the while, some each few seconds; they arrive in order."""

    def __init__(self, link: Link, every: float = 0.002) -> None:
        self._link, self._every = link, every
        self._over = threading.Event()
        self.sent = self.received = 0
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(20)

    def _send(self) -> None:
        try:
            while not self._over.wait(self._every):
                block = _BLOCK.pack(*range(self.sent, self.sent + _AT_ONCE))
                self._link.client.sendall(block)
                self.sent += _AT_ONCE
            self._link.client.shutdown(1)
        except OSError as error:
            self.problems.append(f"sending: {error!r}")

    def _receive(self) -> None:
        self._link.server.settimeout(10)
        with self._link.server.makefile("rb") as stream:
            try:
                while data := stream.read(_NUMBER.size):
                    if _NUMBER.unpack(data) != (self.received,):
                        self.problems.append(f"{data!r} came after {self.received}")
                    self.received += 1
            except (OSError, struct.error) as error:
                self.problems.append(f"receiving: {error!r}")
