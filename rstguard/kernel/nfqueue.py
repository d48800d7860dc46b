"""The queue: its settings, its packets and their verdicts, its depth and losses."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rstguard.kernel import InUse, KernelError
from rstguard.kernel.marks import Marks
from rstguard.kernel.netlink import attribute, encode
from rstguard.kernel.queues import owner
from rstguard.kernel.readers import CONFIG, LENGTH, MOST, Queued, bind, request

__all__ = ["LENGTH", "MOST", "Queue", "QueueState", "Queued", "Verdict", "states"]

_TABLE = Path("/proc/self/net/netfilter/nfnetlink_queue")

_PART = 4096
"""Bytes of the table read at once."""

# linux/netfilter/nfnetlink_queue.h
_VERDICT, _VERDICT_BATCH = 1, 3
_MARK, _VERDICT_HDR = 3, 2
_CFG_MASK, _CFG_FLAGS = 4, 5
_FAIL_OPEN, _GSO = 1, 4
_NF_DROP, _NF_ACCEPT, _NF_QUEUE = 0, 1, 3  # linux/netfilter.h
_NUMBER_AT, _QUEUE_BYPASS = 16, 0x8000
_MARK_HEAD = attribute(_MARK, bytes(4))[:4]
_NUMBER, _NUMBER_AND_MARK = struct.Struct(">I"), struct.Struct(">I4sI")

Verdict = tuple[int, bool, int | None]
"""The number of the last packet it is for, whether they pass, and their new mark, if any."""


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
        text = _TABLE.read_text()
    except FileNotFoundError:
        return {}
    return _states(text)


def _states(text: str) -> dict[int, QueueState]:
    found = {}
    for line in text.splitlines():
        number, owner, waiting, _, _, full, reader, last, *_ = map(int, line.split())
        found[number] = QueueState(number, owner, waiting, full, reader, last)
    return found


class Queue:
    """One bound queue.  Each packet that `receive` returns is owed one verdict."""

    def __init__(self, number: int, fail_open: bool, marks: Marks) -> None:
        """Bind queue `number` (0-65535); `marks` says where the bits on its packets are.

        Raises:
            InUse: another program reads the queue.
            KernelError: the kernel lacks NFQUEUE.
        """
        self.number = number
        taken = states().get(number)
        try:
            self._reader = bind(number, marks)
        except OSError as error:
            if taken is not None:
                raise InUse(
                    f"queue {number} is in use by another program, {owner(number)}; "
                    "stop it or choose another with --queue"
                ) from error
            raise KernelError(
                f"cannot bind queue {number} ({error}); `rstguard doctor` says what is missing"
            ) from error
        self.reader = self._reader.name
        self.receive = self._reader.receive
        self._socket = self._reader.socket
        self._drop, self._accept = (self._verdict(code)[:-4] for code in (_NF_DROP, _NF_ACCEPT))
        self._accept_marked = self._verdict(_NF_ACCEPT, attribute(_MARK, bytes(4)))[:-12]
        self.set_fail_open(fail_open)
        # Kept open, and read anew from its beginning: a confined process can open nothing.
        self._table = _TABLE.open("rb", buffering=0)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def give(self, verdicts: Sequence[Verdict]) -> None:
        """Give verdicts, in the order of their numbers, with one system call.

        Each is for all packets up to its number that have none yet, so it need not be told for
        each of several in a row that fare alike (nfqnl_recv_verdict_batch in nfnetlink_queue.c).
        """
        if len(verdicts) > 1:
            following = (*verdicts[1:], (0, None, None))
            ends = [v for v, after in zip(verdicts, following, strict=True) if v[1:] != after[1:]]
            self._socket.send(b"".join(map(self._message, ends)))
        else:
            self._socket.send(self._message(verdicts[0]))

    def _message(self, verdict: Verdict) -> bytes:
        number, passes, mark = verdict
        if mark is None:
            return (self._accept if passes else self._drop) + _NUMBER.pack(number)
        return self._accept_marked + _NUMBER_AND_MARK.pack(number, _MARK_HEAD, mark)

    def settle(self, number: int, passes: bool, mark: int, to: int | None = None) -> None:
        """Give one packet its verdict and its mark, while others that came before it still wait.

        With `to` it goes on to that queue, or, if nobody reads it, as if it had passed.
        """
        code = _NF_ACCEPT if passes else _NF_DROP
        if to is not None:
            code = _NF_QUEUE | _QUEUE_BYPASS | to << _NUMBER_AT
        attributes = attribute(_VERDICT_HDR, struct.pack(">II", code, number))
        attributes += attribute(_MARK, mark.to_bytes(4, "big"))
        self._socket.send(encode(request(_VERDICT, self.number, attributes), 0, 0))

    def _verdict(self, code: int, more: bytes = b"") -> bytes:
        """Return the message for packets up to number 0."""
        attributes = attribute(_VERDICT_HDR, struct.pack(">II", code, 0)) + more
        return encode(request(_VERDICT_BATCH, self.number, attributes), 0, 0)

    def set_fail_open(self, fail_open: bool) -> None:
        """Choose what happens to a packet that finds the queue full: pass (True) or drop."""
        flags = struct.pack(">I", (_FAIL_OPEN if fail_open else 0) | _GSO)
        mask = struct.pack(">I", _FAIL_OPEN | _GSO)
        attributes = attribute(_CFG_MASK, mask) + attribute(_CFG_FLAGS, flags)
        self._socket.send(encode(request(CONFIG, self.number, attributes), 0, 0))

    def state(self) -> QueueState:
        """Return how the kernel sees this queue now."""
        parts = []
        at = 0
        while part := os.pread(self._table.fileno(), _PART, at):
            parts.append(part)
            at += len(part)
        return _states(b"".join(parts).decode())[self.number]

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped by the kernel."""
        self._reader.close()
        self._table.close()
