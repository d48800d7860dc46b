"""Messages between the supervisor and its processes: one datagram each, never blocking.

A worker must not wait for anybody while packets wait for it.  What the socket does not take at
once is kept in a bounded outbox and sent later; what the outbox does not take is counted as lost.

The two ends differ in what they believe.  A child believes the supervisor, which started it and
could do anything to it anyway: what comes down are pickles.  The supervisor believes no child: what
comes up is checked value by value (`rstguard.ipc.codec.decoded`), and an end that sends anything
else is `Garbled`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import pickle
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from rstguard.ipc.codec import Unreadable, decoded, encoded
from rstguard.ipc.messages import FromChild, ToChild

log = logging.getLogger(__name__)

_OUTBOX: Final = 4096
_SOCKET_BUFFER: Final = 4 << 20
_LARGEST_DOWN: Final = _SOCKET_BUFFER
_LARGEST_UP: Final = 1 << 20
"""Bytes of a child's message: twice what the longest takes, who is nearest each of 500 limits."""
_AT_ONCE: Final = 1024
_BYTES_AT_ONCE: Final = 4 << 20
"""Messages, and bytes of them, after which the reader looks after its other work."""
_LAST_MILLISECONDS: Final = 1000

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class Closed(Exception):
    """The other end is gone."""


class Garbled(Closed):
    """The other end sent what is no message, and is not listened to any more; the text says what.

    Its process may live on: whoever started it should end it.
    """


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that keep message boundaries."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    return ends


class Channel(Generic[Sent, Received]):
    """One end of a connection between two processes of the same guard."""

    def __init__(
        self,
        end: socket.socket,
        encode: Callable[[Sent], bytes],
        decode: Callable[[memoryview], Received],
        largest: int,
    ) -> None:
        """Take an end of a `pair`; messages of more than `largest` bytes are not received.

        `decode` raises `Unreadable` for what is no message.
        """
        end.setblocking(False)
        self._socket = end
        self._encode, self._decode = encode, decode
        self._buffer = memoryview(bytearray(largest))
        self._outbox: deque[bytes] = deque()
        self._garbled = ""
        self.lost = 0

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether messages wait for room in the socket."""
        return bool(self._outbox)

    def send(self, message: Sent) -> None:
        """Send a message, now or later.

        Raises:
            Closed: the other end is gone.
        """
        if len(self._outbox) >= _OUTBOX:
            self.lost += 1
        else:
            self._outbox.append(self._encode(message))
        self.flush()

    def send_last(self, message: Sent) -> None:
        """Send a message before all that waits, within a second, as nothing comes after it.

        What cannot be sent any more is left unsaid.
        """
        data = self._encode(message)
        # A confined process may wait by poll, but may not make its socket a blocking one.
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        for wait in (_LAST_MILLISECONDS, 0):
            try:
                self._socket.send(data)
                return
            except BlockingIOError:
                room.poll(wait)
            except OSError as error:
                log.error("the supervisor could not be told: %s", error)
                return
        log.error("the supervisor could not be told: it does not read")

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
                if error.errno != errno.EMSGSIZE:
                    raise Closed from error
                # It never fits (net.core.wmem_max): better lost than in the way of the others.
                self.lost += 1
                log.error("a message of %d bytes is too large to send", len(self._outbox[0]))
            self._outbox.popleft()

    def receive(self) -> list[Received]:
        """Return the messages that have arrived, or some of them if they are many.

        Raises:
            Garbled: what came last is no message.
            Closed: the other end is gone, and nothing is left to read.
        """
        messages: list[Received] = []
        left = _BYTES_AT_ONCE
        while len(messages) < _AT_ONCE and left > 0:
            try:
                size = self._next()
                if size is None:
                    break
                if not size:
                    raise Closed
                messages.append(self._read(size))
            except Closed:
                if messages:
                    break  # it is told again, after these were heard
                raise
            left -= size
        return messages

    def wait(self) -> Received:
        """Wait for one message and return it.

        Raises:
            Garbled: what came is no message.
            Closed: the other end is gone.
        """
        size = None
        while size is None:
            select.select([self], [], [])
            size = self._next()
        if not size:
            raise Closed
        return self._read(size)

    def _next(self) -> int | None:
        """Return the size of the next message, which is in the buffer; 0 at the end, None yet."""
        if self._garbled:
            raise Garbled(self._garbled)
        for _ in range(2):
            try:
                # With MSG_TRUNC the size is that of the message, not of what fits (recv(2)).
                return self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                # The other end left something unread.  The kernel tells that first, and once; its
                # own last words are still there.
                continue
            except OSError as error:
                raise Closed from error
        raise Closed

    def _read(self, size: int) -> Received:
        """Return the message in the buffer."""
        try:
            if size > len(self._buffer):
                raise Unreadable(f"{size} bytes are more than a message has")
            return self._decode(self._buffer[:size])
        except Unreadable as error:
            self._garbled = f"sent what is no message ({error})"
            # The other end notices, and this one stays readable until that was told.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise Garbled(self._garbled) from None

    def close(self) -> None:
        """Give the connection up, and the memory that messages were read into."""
        self._socket.close()
        self._buffer = memoryview(b"")


ChildEnd = Channel[FromChild, ToChild]
SupervisorEnd = Channel[ToChild, FromChild]


def child_end(end: socket.socket) -> ChildEnd:
    """Return a worker's or the sweeper's end of a `pair`."""
    return Channel(end, encoded, _unpickled, _LARGEST_DOWN)


def supervisor_end(end: socket.socket) -> SupervisorEnd:
    """Return the supervisor's end of a `pair`."""
    return Channel(end, pickle.dumps, decoded, _LARGEST_UP)


def _unpickled(data: memoryview) -> ToChild:
    message: ToChild = pickle.loads(data)  # noqa: S301 - the supervisor's, see above
    return message
