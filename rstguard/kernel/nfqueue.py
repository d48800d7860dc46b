"""The queue: bind it, set the flags that the binding has no call for, read its depth and losses."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from netfilterqueue import NetfilterQueue

from rstguard.kernel import KernelError
from rstguard.kernel.queues import owner

LENGTH = 4096
"""Packets the kernel holds for a worker before the policy's `on_failure` applies."""

_COPY_BYTES = 1024  # all headers, also of an IPv6 packet with long extension headers
_RECEIVE_BUFFER = 8 << 20
_TABLE = Path("/proc/self/net/netfilter/nfnetlink_queue")

# linux/netfilter/nfnetlink.h and nfnetlink_queue.h
_NFNL_SUBSYS_QUEUE = 3
_NFQNL_MSG_CONFIG = 2
_NFQA_CFG_MASK, _NFQA_CFG_FLAGS = 4, 5
_FAIL_OPEN, _GSO = 1, 4
_NLM_F_REQUEST = 1
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5


class QueuedPacket(Protocol):
    """What the binding hands to the callback for each packet."""

    def get_payload(self) -> bytes:
        """Return the packet from its IP header on."""

    def get_mark(self) -> int:
        """Return the packet's mark."""

    def set_mark(self, mark: int) -> None:
        """Set the mark that goes with the verdict."""

    def accept(self) -> None:
        """Let the packet pass."""

    def drop(self) -> None:
        """Drop the packet."""


class QueueState(NamedTuple):
    """One line of the kernel's queue table; counts since the queue was bound."""

    number: int
    owner: int
    waiting: int
    dropped_full: int
    dropped_reader: int
    last_id: int


def states() -> dict[int, QueueState]:
    """Return all bound queues of this network namespace by number."""
    try:
        lines = _TABLE.read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        number, owner, waiting, _, _, full, reader, last, *_ = map(int, line.split())
        found[number] = QueueState(number, owner, waiting, full, reader, last)
    return found


class Queue:
    """One bound queue.  Each packet that the callback gets must be given one verdict by it."""

    def __init__(
        self, number: int, on_packet: Callable[[QueuedPacket], None], fail_open: bool
    ) -> None:
        """Bind queue `number` (0-65535).

        Raises:
            KernelError: the queue is taken by another program, or the kernel lacks NFQUEUE.
        """
        self.number = number
        taken = states().get(number)
        try:
            self._queue = NetfilterQueue()
            self._queue.bind(
                number, on_packet, max_len=LENGTH, range=_COPY_BYTES, sock_len=_RECEIVE_BUFFER
            )
        except OSError as error:
            if taken is not None:
                raise KernelError(
                    f"queue {number} is in use by another program, {owner(number)}; "
                    "stop it or choose another with --queue"
                ) from error
            raise KernelError(
                f"cannot bind queue {number} ({error}); `rstguard doctor` says what is missing"
            ) from error
        self._socket = socket.socket(fileno=socket.dup(self._queue.get_fd()))
        # A full socket buffer is counted by the kernel; it must not end the reading.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
        self.set_fail_open(fail_open)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return int(self._queue.get_fd())

    def set_fail_open(self, fail_open: bool) -> None:
        """Choose what happens to a packet that finds the queue full: pass (True) or drop."""
        flags = struct.pack(">I", (_FAIL_OPEN if fail_open else 0) | _GSO)
        mask = struct.pack(">I", _FAIL_OPEN | _GSO)
        attributes = struct.pack("=HH", 8, _NFQA_CFG_MASK) + mask
        attributes += struct.pack("=HH", 8, _NFQA_CFG_FLAGS) + flags
        body = struct.pack(">BBH", socket.AF_UNSPEC, 0, self.number) + attributes
        kind = _NFNL_SUBSYS_QUEUE << 8 | _NFQNL_MSG_CONFIG
        header = struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST, 0, 0)
        self._socket.sendto(header + body, (0, 0))

    def drain(self) -> None:
        """Hand every waiting packet to the callback; what the callback raises comes out here."""
        self._queue.run(block=False)

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped by the kernel."""
        self._queue.unbind()
        self._socket.close()
