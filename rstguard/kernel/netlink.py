"""Raw netlink, to the netfilter subsystems above all: requests in batches, and dumps.

Only what the tables of connections and routes need: messages (linux/netlink.h), attributes, one
socket per conversation.  Attribute headers are in host order, netfilter's values in network order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from rstguard.kernel import Changed, KernelError

NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10
SO_RCVBUFFORCE: Final = 33

NLM_F_REQUEST: Final = 0x01
NLM_F_ACK: Final = 0x04
NLM_F_DUMP_INTR: Final = 0x10
NLM_F_DUMP: Final = 0x300
NLM_F_CREATE: Final = 0x400

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLMSG_FIRST_OWN: Final = 0x10
"""Types below belong to netlink itself."""

NLA_F_NESTED: Final = 0x8000
NLA_TYPE_MASK: Final = 0x3FFF

HEADER: Final = struct.Struct("=IHHII")
ATTRIBUTE: Final = struct.Struct("=HH")
NFGEN: Final = struct.Struct("=BBH")
_ERROR: Final = struct.Struct("=i")

RECEIVE_BUFFER: Final = 4 << 20
"""Bytes of answers the kernel may hold for us; far more than one batch can cause."""
CHUNK: Final = 64 << 10
"""Bytes read at once; the kernel fills at most 32 KiB per dump message buffer."""
BATCH: Final = 64
"""Requests per system call."""
PATIENCE: Final = 5.0
"""Seconds to wait for an answer, which the kernel gives at once unless something is wrong."""


class Request(NamedTuple):
    """One request: message type (subsystem in the high byte), address family, attributes.

    `resource` is the number of the queue or group that is spoken of, where there are several;
    `flags` are those that not every request of its kind has.
    """

    kind: int
    family: int
    attributes: bytes
    resource: int = 0
    flags: int = 0


class Answer(NamedTuple):
    """The outcome of one request: an errno (0 for success) and the message that came, if any."""

    error: int
    message: bytes


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded to four bytes."""
    return ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes that stand one behind the other in some bytes, by their kind."""
    found, place = {}, 0
    while place + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, place)
        found[kind & NLA_TYPE_MASK] = data[place + ATTRIBUTE.size : place + length]
        place += max(length + 3 & ~3, ATTRIBUTE.size)
    return found


def nest(kind: int, *inner: bytes) -> bytes:
    """Return a nested attribute."""
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def encode(request: Request, flags: int, sequence: int) -> bytes:
    """Return a request as it goes through the socket."""
    length = HEADER.size + NFGEN.size + len(request.attributes)
    flags |= request.flags | NLM_F_REQUEST
    head = HEADER.pack(length, request.kind, flags, sequence, 0)
    family = NFGEN.pack(request.family, 0, socket.htons(request.resource))
    return head + family + request.attributes


def configure(channel: socket.socket, request: Request) -> None:
    """Send one request on a socket that brings nothing else yet, and wait until it is done.

    Raises:
        OSError: the kernel refused.
    """
    channel.sendto(encode(request, NLM_F_ACK, 0), (0, 0))
    chunk = channel.recv(CHUNK)
    for start, _, kind, _, _ in messages(chunk):
        if kind == NLMSG_ERROR:
            code = -_ERROR.unpack_from(chunk, start + HEADER.size)[0]
            if code:
                raise OSError(code, os.strerror(code))


class Netlink:
    """One netlink socket, in the network namespace of the thread that makes it.

    Raises:
        KernelError: the kernel has no netfilter netlink, or privileges are missing.
    """

    def __init__(self, protocol: int = NETLINK_NETFILTER) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
            )
        except OSError as error:
            raise KernelError(
                f"The kernel offers no netfilter netlink ({error.strerror}): "
                "load it with `modprobe nfnetlink`."
            ) from error
        self._sequence = 0
        self._socket.connect((0, 0))  # nobody but the kernel may send to it
        self._socket.settimeout(PATIENCE)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def transact(self, requests: Sequence[Request]) -> list[Answer]:
        """Send requests, many per system call, and return one answer for each, in order.

        The kernel works through a batch before the send returns.  Only the last request of a batch
        asks for an acknowledgement; of the others it is enough that errors are always reported.

        Raises:
            KernelError: the conversation itself failed (not: one request was refused).
        """
        answers: list[Answer] = []
        for start in range(0, len(requests), BATCH):
            answers += self._batch(requests[start : start + BATCH])
        return answers

    def _batch(self, requests: Sequence[Request]) -> list[Answer]:
        first = self._next(len(requests))
        last = first + len(requests) - 1
        answers = [Answer(0, b"")] * len(requests)
        self._send(
            b"".join(
                encode(request, NLM_F_ACK if number == last else 0, number)
                for number, request in enumerate(requests, first)
            )
        )
        while True:
            chunk = self._receive()
            for start, end, kind, _, number in messages(chunk):
                if not first <= number <= last:
                    continue  # left over from a conversation that was broken off
                if kind == NLMSG_ERROR:
                    code = -_ERROR.unpack_from(chunk, start + HEADER.size)[0]
                    if code:
                        answers[number - first] = Answer(code, b"")
                    if number == last:
                        return answers
                elif kind >= NLMSG_FIRST_OWN:
                    answers[number - first] = Answer(0, chunk[start:end])

    def dump(self, request: Request) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
        """Yield the answer to a dump request: buffers, each with (start, end) of its messages.

        One dump at a time; what is left of one that is broken off is read and forgotten.

        Raises:
            KernelError: the dump failed or overran the socket, or (Changed) was interrupted
                (NLM_F_DUMP_INTR); what was yielded before then is valid but incomplete.
        """
        number = self._begin_dump(request)
        changed = done = False
        try:
            while not done:
                chunk = self._receive()
                spans: list[tuple[int, int]] = []
                for start, end, kind, flags, sequence in messages(chunk):
                    if sequence != number:
                        continue
                    changed = changed or bool(flags & NLM_F_DUMP_INTR)
                    if kind >= NLMSG_FIRST_OWN:
                        spans.append((start, end))
                    elif kind in (NLMSG_ERROR, NLMSG_DONE):
                        done = True
                        raise_failed(chunk, start, end)
                yield chunk, spans
        finally:
            if not done:
                self._read_up(number)
        if changed:
            raise interrupted()

    def _begin_dump(self, request: Request) -> int:
        """Ask for a dump; return the number that its messages bear."""
        number = self._next(1)
        self._send(encode(request, NLM_F_DUMP, number))
        return number

    def _read_up(self, number: int) -> None:
        """Read the rest of a dump: the kernel begins no other on this socket before its end."""
        with contextlib.suppress(KernelError):
            while True:
                for _, _, kind, _, sequence in messages(self._receive()):
                    if sequence == number and kind in (NLMSG_ERROR, NLMSG_DONE):
                        return

    def _next(self, count: int) -> int:
        if self._sequence + count >= 1 << 32:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += count
        return first

    def _send(self, data: bytes) -> None:
        try:
            self._socket.send(data)
        except OSError as error:
            raise KernelError(
                f"Could not ask the kernel through netlink: {_say(error)}."
            ) from error

    def _receive(self) -> bytes:
        try:
            chunk, _, flags, _ = self._socket.recvmsg(CHUNK)
        except OSError as error:
            raise unreadable(error) from error
        if flags & socket.MSG_TRUNC:
            raise KernelError(f"The kernel sent a netlink message of more than {CHUNK} bytes.")
        return chunk


def unreadable(error: OSError) -> KernelError:
    """Return what to say when nothing can be read from a socket."""
    if isinstance(error, TimeoutError):
        return KernelError(
            f"The kernel gave no netlink answer within {PATIENCE:.0f} s: "
            "see `dmesg` for what holds it up."
        )
    if error.errno == errno.ENOBUFS:
        return KernelError("Netlink answers were lost because the socket overran: ask again.")
    return KernelError(f"Could not read from netlink: {_say(error)}.")


def interrupted() -> Changed:
    """Return what to say of a dump that bears NLM_F_DUMP_INTR."""
    return Changed(
        "The table changed while it was read, so the reading is incomplete: read it again."
    )


def messages(chunk: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (start, end, type, flags, sequence) of each netlink message of a buffer.

    Raises:
        KernelError: a length leads out of the buffer.
    """
    start = 0
    size = len(chunk)
    unpack = HEADER.unpack_from
    while start + 16 <= size:
        length, kind, flags, sequence, _ = unpack(chunk, start)
        end = start + length
        if length < 16 or end > size:
            break
        yield start, end, kind, flags, sequence
        start = (end + 3) & ~3
    if start < size:
        raise KernelError(f"The kernel sent a netlink message that is cut off at byte {start}.")


def raise_failed(chunk: bytes, start: int, end: int) -> None:
    """Raise what the end of a dump reports, if it is an error.

    Raises:
        KernelError: it is one.
    """
    if end - start < HEADER.size + _ERROR.size:
        return
    code = -_ERROR.unpack_from(chunk, start + HEADER.size)[0]
    if code > 0:
        cause = OSError(code, os.strerror(code))
        raise KernelError(f"The kernel broke off reading the table: {_say(cause)}.") from cause


def _say(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "not permitted; run as root or with CAP_NET_ADMIN"
    return error.strerror or str(error)
