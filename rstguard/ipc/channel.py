"""Messages between the supervisor and its processes: one datagram each, never blocking.

A worker must not wait for anybody while packets wait for it.  What the socket does not take at
once is kept in a bounded outbox and sent later; what the outbox does not take is counted as lost.
"""

from __future__ import annotations

import pickle
import select
import socket
from collections import deque
from typing import Any

_OUTBOX = 4096
_SOCKET_BUFFER = 4 << 20


class Closed(Exception):
    """The other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep message boundaries."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    return ends


class Channel:
    """One end of a connection between two processes of the same guard."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._outbox: deque[bytes] = deque()
        self.lost = 0

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether messages wait for room in the socket."""
        return bool(self._outbox)

    def send(self, message: object) -> None:
        """Send a message, now or later.

        Raises:
            Closed: the other end is gone.
        """
        if len(self._outbox) >= _OUTBOX:
            self.lost += 1
        else:
            self._outbox.append(pickle.dumps(message))
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it.

        Raises:
            Closed: the other end is gone.
        """
        while self._outbox:
            try:
                self._socket.send(self._outbox[0])
            except BlockingIOError:
                return
            except OSError as error:
                raise Closed from error
            self._outbox.popleft()

    def receive(self) -> list[Any]:
        """Return the messages that have arrived.

        Raises:
            Closed: the other end is gone, and nothing is left to read.
        """
        messages: list[Any] = []
        reset = False
        while True:
            try:
                data = self._socket.recv(_SOCKET_BUFFER)
            except BlockingIOError:
                return messages
            except ConnectionResetError as error:
                # The other end left something unread.  The kernel tells that first, and once; its
                # own last words are still there.
                if reset:
                    raise Closed from error
                reset = True
                continue
            except OSError as error:
                raise Closed from error
            if not data:
                if messages:
                    return messages
                raise Closed
            # Both ends are processes of one guard, started by one supervisor.
            messages.append(pickle.loads(data))  # noqa: S301

    def wait(self) -> Any:
        """Wait for one message and return it.

        Raises:
            Closed: the other end is gone.
        """
        select.select([self], [], [])
        data = self._socket.recv(_SOCKET_BUFFER)
        if not data:
            raise Closed
        return pickle.loads(data)  # noqa: S301

    def close(self) -> None:
        """Give the connection up."""
        self._socket.close()
