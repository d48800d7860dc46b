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
_NFQNL_MSG_VERDICT_BATCH = 3
_NFQA_VERDICT_HDR = 2
_NFQA_CFG_MASK, _NFQA_CFG_FLAGS = 4, 5
_FAIL_OPEN, _GSO = 1, 4
_NLM_F_REQUEST = 1
_NF_ACCEPT = 1
_SOL_NETLINK, _NETLINK_NO_ENOBUFS = 270, 5


class QueuedPacket(Protocol):
    """What the binding hands to the callback for each packet."""

    id: int
    """The packet's number in its queue, from 1 on; the kernel counts up."""
    mark: int
    """The mark it came with."""

    def get_payload(self) -> bytes:
        """Return the packet from its IP header on."""

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
        self._batch = _message_head(_NFQNL_MSG_VERDICT_BATCH, number, 12)
        self._batch += struct.pack("=HH", 12, _NFQA_VERDICT_HDR) + struct.pack(">I", _NF_ACCEPT)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return int(self._queue.get_fd())

    def accept_up_to(self, packet_id: int) -> None:
        """Let every packet pass, unchanged, that has no verdict yet and no higher number.

        One message for many packets: nfqnl_recv_verdict_batch in nfnetlink_queue.c.
        """
        self._socket.sendto(self._batch + struct.pack(">I", packet_id), (0, 0))

    def set_fail_open(self, fail_open: bool) -> None:
        """Choose what happens to a packet that finds the queue full: pass (True) or drop."""
        flags = struct.pack(">I", (_FAIL_OPEN if fail_open else 0) | _GSO)
        mask = struct.pack(">I", _FAIL_OPEN | _GSO)
        attributes = struct.pack("=HH", 8, _NFQA_CFG_MASK) + mask
        attributes += struct.pack("=HH", 8, _NFQA_CFG_FLAGS) + flags
        head = _message_head(_NFQNL_MSG_CONFIG, self.number, len(attributes))
        self._socket.sendto(head + attributes, (0, 0))

    def drain(self) -> None:
        """Hand every waiting packet to the callback; what the callback raises comes out here."""
        self._queue.run(block=False)

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped by the kernel."""
        self._queue.unbind()
        self._socket.close()


def _message_head(kind: int, number: int, attribute_bytes: int) -> bytes:
    """Return the headers of a message to the kernel about a queue, its attributes to follow."""
    length = 16 + 4 + attribute_bytes
    header = struct.pack("=IHHII", length, _NFNL_SUBSYS_QUEUE << 8 | kind, _NLM_F_REQUEST, 0, 0)
    return header + struct.pack(">BBH", socket.AF_UNSPEC, 0, number)
