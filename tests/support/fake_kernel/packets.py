"""Packets that are sent, queued and logged: nothing leaves, everything is remembered."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

from rstguard.engine.wire import Packet
from rstguard.kernel import InUse
from rstguard.kernel.nfqueue import LENGTH, Queued, QueueState, Verdict
from rstguard.kernel.seam import Copies, Copy
from tests.support.fake_kernel.elements import Around

_FIRST_DESCRIPTOR = 1 << 20
"""No process has a real descriptor of that number."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of a packet that was in a queue; `mark` None: as it was."""

    queue: int
    number: int
    passed: bool
    mark: int | None
    packet: Packet | bytes


@dataclass(slots=True)
class Bound:
    """A queue with a reader."""

    owner: str
    descriptor: int
    fail_open: bool
    waiting: list[Queued] = field(default_factory=list)
    last: int = 0
    full: int = 0


class Packets:
    """All packets of a kernel.

    `hook` is told each packet that the guard sends; it may answer it in whatever way, and returns
    "" or why the kernel does not take it (``ENETUNREACH``).
    """

    def __init__(self) -> None:
        self.hook: Callable[[bytes], str] = lambda packet: ""
        self.sent: list[bytes] = []
        self.judged: list[Judged] = []
        self.queues: dict[int, Bound] = {}
        self.logs: dict[int, FakeLog] = {}
        self._descriptors = itertools.count(_FIRST_DESCRIPTOR)

    def descriptor(self) -> int:
        """Return a number that no other pollable of this kernel has."""
        return next(self._descriptors)

    def queue(self, number: int, packet: Packet | bytes, mark: int = 0) -> int:
        """Put a packet into a queue; return its number there, 0 if it passes unread or is lost.

        As with --queue-bypass a packet passes where nobody reads.
        """
        bound = self.queues.get(number)
        if bound is None:
            self.judged.append(Judged(number, 0, True, None, packet))
            return 0
        if len(bound.waiting) >= LENGTH:
            bound.full += not bound.fail_open
            self.judged.append(Judged(number, 0, bound.fail_open, None, packet))
            return 0
        bound.last += 1
        bound.waiting.append((bound.last, mark, packet))
        return bound.last

    def log(self, group: int, packet: bytes, prefix: str = "") -> None:
        """Send a copy of a packet to a group; without a reader it is lost."""
        if group in self.logs:
            self.logs[group].waiting.append(Copy(prefix, packet))

    def take_queue(self, number: int, program: str) -> None:
        """Let another program read a queue.

        Raises:
            InUse: it is read already.
        """
        if number in self.queues:
            raise InUse(
                f"queue {number} is in use by another program, {self.queues[number].owner}; "
                "stop it or choose another with --queue"
            )
        self.queues[number] = Bound(program, self.descriptor(), fail_open=True)

    def free_queue(self, number: int) -> None:
        """End the reader of a queue, whoever it is: what waits in it is dropped."""
        bound = self.queues.pop(number, None)
        for one, _, packet in bound.waiting if bound else ():
            self.judged.append(Judged(number, one, False, None, packet))

    def states(self) -> dict[int, QueueState]:
        """Return all bound queues."""
        return {
            number: QueueState(number, b.descriptor, len(b.waiting), b.full, 0, b.last)
            for number, b in self.queues.items()
        }

    def readable(self) -> set[int]:
        """Return the descriptors at which something waits."""
        queues = {b.descriptor for b in self.queues.values() if b.waiting}
        return queues | {log.fileno() for log in self.logs.values() if log.waiting}


class FakeInjector:
    """Sends packets: `rstguard.kernel.seam.PacketSender`."""

    def __init__(self, packets: Packets, around: Around) -> None:
        self._packets = packets
        self._around = around
        self.sent = 0
        self.failed: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        """Send packets; return how many the kernel took."""
        before = self.sent
        with self._around("injector.send", ""):
            for packet in packets:
                reason = self._packets.hook(packet)
                if reason:
                    self.failed[reason] = self.failed.get(reason, 0) + 1
                else:
                    self._packets.sent.append(packet)
                    self.sent += 1
        return self.sent - before


class FakeQueue:
    """Reads a queue: `rstguard.kernel.seam.PacketQueue`."""

    reader = "fake"

    def __init__(
        self, packets: Packets, number: int, fail_open: bool, owner: str, around: Around
    ) -> None:
        packets.take_queue(number, owner)
        self.number = number
        self._packets = packets
        self._around = around
        self._bound = packets.queues[number]
        self._read = 0
        self.set_fail_open(fail_open)

    def fileno(self) -> int:
        """A number, to ask `Packets.readable` for."""
        return self._bound.descriptor

    def receive(self, most: int, whole: int, /) -> list[Queued]:
        """Return up to `most` packets that were not yet read; they stay until they are judged."""
        with self._around("queue.receive", str(self.number)):
            self._check_open()
            found = [one for one in self._bound.waiting if one[0] > self._read][:most]
            self._read = found[-1][0] if found else self._read
            return found

    def give(self, verdicts: Sequence[Verdict]) -> None:
        """Give verdicts, each for all packets up to its number that have none yet."""
        with self._around("queue.give", str(self.number)):
            self._check_open()
            for upto, passed, mark in verdicts:
                waiting = self._bound.waiting
                while waiting and waiting[0][0] <= upto:
                    number, _, packet = waiting.pop(0)
                    judged = Judged(self.number, number, passed, mark, packet)
                    self._packets.judged.append(judged)

    def settle(self, number: int, passes: bool, mark: int, to: int | None = None) -> None:
        """Give one packet its verdict, and no other; `to` names a queue that it goes on to."""
        with self._around("queue.settle", str(self.number)):
            self._check_open()
            for at, (waiting, _, packet) in enumerate(self._bound.waiting):
                if waiting == number:
                    del self._bound.waiting[at]
                    judged = Judged(self.number, number, passes, mark, packet)
                    self._packets.judged.append(judged)
                    if to is not None:
                        self._packets.queue(to, packet, mark)
                    return

    def set_fail_open(self, fail_open: bool) -> None:
        """Choose what happens to a packet that finds the queue full: pass (True) or drop."""
        self._bound.fail_open = fail_open

    def state(self) -> QueueState:
        """Return how long it is, and what it lost."""
        self._check_open()
        return self._packets.states()[self.number]

    def _check_open(self) -> None:
        if self._packets.queues.get(self.number) is not self._bound:
            raise OSError(errno.EBADF, "the queue was given up")

    def close(self) -> None:
        """Give the queue up; packets still in it are dropped."""
        if self._packets.queues.get(self.number) is self._bound:
            self._packets.free_queue(self.number)


class FakeLog:
    """Receives copies: `rstguard.kernel.seam.PacketCopies`."""

    def __init__(self, packets: Packets, group: int) -> None:
        if group in packets.logs:
            raise InUse(f"NFLOG group {group} is in use by another program; stop it")
        self._packets = packets
        self._group = group
        self._descriptor = packets.descriptor()
        self.waiting: list[Copy] = []
        self.overrun = False
        """Whether copies were lost since the last reading."""
        packets.logs[group] = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """A number, to ask `Packets.readable` for."""
        return self._descriptor

    def receive(self) -> list[bytes]:
        """Return the packets that have arrived."""
        return [copy.packet for copy in self.read().copies]

    def read(self) -> Copies:
        """Return the packets that have arrived, with the prefixes of the rules."""
        found = Copies(self.waiting, self.overrun)
        self.waiting, self.overrun = [], False
        return found

    def close(self) -> None:
        """Give the group up."""
        if self._packets.logs.get(self._group) is self:
            del self._packets.logs[self._group]
