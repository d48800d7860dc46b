"""The two ways to read a queue: a small C extension of ours, and the netfilterqueue binding.

`rstguard.kernel._queue` reads many packets with one system call and their usual headers with them.
Where it was not built (no compiler at hand), the binding does the same, a packet at a time.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import struct
from types import ModuleType
from typing import Protocol

from netfilterqueue import NetfilterQueue

from rstguard.engine.wire import Packet
from rstguard.kernel import KernelError
from rstguard.kernel.marks import Marks
from rstguard.kernel.netlink import (
    NETLINK_NETFILTER,
    SO_RCVBUFFORCE,
    SOL_NETLINK,
    Request,
    attribute,
    configure,
    encode,
)

log = logging.getLogger(__name__)

LENGTH = 4096
"""Packets the kernel holds for a worker before the policy's `on_failure` applies."""
MOST = 64
"""Packets that can be read at once."""

BUILT_IN = "rstguard"
BINDING = "netfilterqueue"
CHOICE = "RSTGUARD_READER"
"""Environment variable that names the one to use; without it the extension, if it is there."""

_COPY_BYTES = 1024  # all headers, also of an IPv6 packet with long extension headers
_RECEIVE_BUFFER = 8 << 20
_NO_ENOBUFS = 5

# linux/netfilter/nfnetlink.h and nfnetlink_queue.h
_SUBSYSTEM = 3
CONFIG = 2
_CFG_CMD, _CFG_PARAMS, _CFG_QUEUE_MAXLEN = 1, 2, 3
_BIND, _COPY_PACKET = 1, 2
_POST_ROUTING = 4  # linux/netfilter.h, enum nf_inet_hooks

Queued = tuple[int, int, Packet | bytes]
"""A packet's number in its queue, its mark, and itself: read, or from its IP header on.

One that the protected side sends bears no bit of ours; it is known by its hook, and its mark is
given with `Marks.outbound`.
"""


class Reader(Protocol):
    """What a queue is read by."""

    name: str
    socket: socket.socket
    """Its netlink socket: to wait on, and for verdicts."""

    def receive(self, most: int, whole: int) -> list[Queued]:
        """Return up to `most` (1-64) packets that wait; fewer mean that no more were there.

        They come in the order of their numbers, and each is owed a verdict.  Segments with any of
        the flags in `whole` come as bytes: somebody wants to know their options.
        """

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped by the kernel."""


def request(kind: int, number: int, attributes: bytes) -> Request:
    """Return a message to the kernel about queue `number`."""
    return Request(_SUBSYSTEM << 8 | kind, socket.AF_UNSPEC, attributes, number)


def extension() -> ModuleType | None:
    """Return the extension, or None if the binding is to be used.

    Raises:
        KernelError: what was asked for is not to be had.
    """
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", BUILT_IN, BINDING):
        raise KernelError(f"{CHOICE} is {choice!r}; it can be {BUILT_IN} or {BINDING}")
    if choice == BINDING:
        return None
    module, problem = built_in()
    if module is None and choice:
        raise KernelError(
            f"{CHOICE} asks for rstguard's own packet reader, which {problem}; "
            "`rstguard doctor` says what fixes it"
        )
    return module


def built_in() -> tuple[ModuleType | None, str]:
    """Return the extension, or None and what is wrong with it."""
    try:
        module = importlib.import_module("rstguard.kernel._queue")
    except ModuleNotFoundError:
        return None, "was not built"
    except ImportError as problem:
        return None, f"does not load ({problem})"
    # It makes packets field by field: one left behind by another version would mix them up.
    if getattr(module, "FIELDS", "").split() != list(Packet._fields):
        return None, "was built for another version of rstguard"
    return module, ""


def bind(number: int, marks: Marks) -> Reader:
    """Bind queue `number` (0-65535) and return what reads it.

    Raises:
        OSError: the queue is taken, or the kernel lacks NFQUEUE.
        KernelError: the reader that was asked for is not to be had.
    """
    found = extension()
    if found is None and not os.environ.get(CHOICE):
        log.warning("packets are read by netfilterqueue: rstguard's own reader %s", built_in()[1])
    return _Binding(number, marks) if found is None else _BuiltIn(number, marks, found)


class _BuiltIn:
    name = BUILT_IN

    def __init__(self, number: int, marks: Marks, module: ModuleType) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self.socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        try:
            self.socket.connect((0, 0))  # nobody but the kernel may send to it
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            _silence(self.socket)
            # No packet comes before the parameters: the answer is the first that can be read.
            command = attribute(_CFG_CMD, struct.pack(">BxH", _BIND, socket.AF_INET))
            command += attribute(_CFG_QUEUE_MAXLEN, LENGTH.to_bytes(4, "big"))
            configure(self.socket, request(CONFIG, number, command))
            parameters = attribute(_CFG_PARAMS, struct.pack(">IB", _COPY_BYTES, _COPY_PACKET))
            self.socket.sendto(encode(request(CONFIG, number, parameters), 0, 0), (0, 0))
        except OSError:
            self.socket.close()
            raise
        about_marks = (bytes(marks.states), marks.base, marks.outbound)
        self.receive = module.Reader(self.socket.fileno(), Packet, *about_marks).receive

    def close(self) -> None:
        self.socket.close()


class _Collected(Protocol):
    """What the binding hands over; it gives no verdict unless it is told to."""

    id: int
    hook: int
    mark: int

    def get_payload(self) -> bytes: ...


class _Full(Exception):
    """As many packets as were asked for have been collected."""


class _Binding:
    """Collects what the binding reads: it leaves a packet in the queue until a verdict is given."""

    name = BINDING

    def __init__(self, number: int, marks: Marks) -> None:
        self._outbound = marks.outbound
        self._queue = NetfilterQueue()
        self._queue.bind(
            number, self._collect, max_len=LENGTH, range=_COPY_BYTES, sock_len=_RECEIVE_BUFFER
        )
        self.socket = socket.socket(fileno=socket.dup(self._queue.get_fd()))
        self.socket.connect((0, 0))
        _silence(self.socket)
        self._collected: list[Queued] = []
        self._most = MOST

    def receive(self, most: int, whole: int) -> list[Queued]:
        self._most, self._collected = most, []
        with contextlib.suppress(_Full):
            self._queue.run(block=False)
        return self._collected

    def _collect(self, packet: _Collected) -> None:
        try:
            data = packet.get_payload()
        except RuntimeError:
            data = b""  # it has none
        outbound = self._outbound if packet.hook == _POST_ROUTING else 0
        self._collected.append((packet.id, packet.mark | outbound, data))
        if len(self._collected) >= self._most:
            raise _Full

    def close(self) -> None:
        self._queue.unbind()
        self.socket.close()


def _silence(channel: socket.socket) -> None:
    """A full socket buffer is counted by the kernel; it must not end the reading."""
    channel.setsockopt(SOL_NETLINK, _NO_ENOBUFS, 1)
