"""A kernel for one worker: a queue that owes each packet one verdict, and what it did besides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rstguard.engine.wire import Packet, parse
from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.marks import Marks
from rstguard.kernel.nfqueue import QueueState, Verdict


class Queue:
    """Holds packets until they are received, and then until they have a verdict."""

    def __init__(self, log: list[str]) -> None:
        self.number, self.reader = 5640, "rstguard"
        self.waiting: list[tuple[int, int, Packet | bytes]] = []
        self.owed: list[int] = []
        self.verdicts: dict[int, tuple[bool, int | None]] = {}
        self.closed = False
        self.fail_open = True
        self._log, self._last = log, 0

    def put(self, *packets: Packet, mark: int = 0) -> list[int]:
        """Queue packets; return their numbers."""
        numbers = range(self._last + 1, self._last + len(packets) + 1)
        self.waiting += [(n, mark, p) for n, p in zip(numbers, packets, strict=True)]
        self._last += len(packets)
        return list(numbers)

    def fileno(self) -> int:
        return -1

    def state(self) -> QueueState:
        return QueueState(self.number, 1, len(self.waiting), 0, 0, 0)

    def receive(self, most: int, whole: int) -> list[tuple[int, int, Packet | bytes]]:
        batch, self.waiting = self.waiting[:most], self.waiting[most:]
        self.owed += [number for number, _, _ in batch]
        return batch

    def give(self, verdicts: Sequence[Verdict]) -> None:
        """As the kernel does: each is for all up to its number that have none yet."""
        for number, passes, mark in verdicts:
            while self.owed and self.owed[0] <= number:
                self.verdicts[self.owed.pop(0)] = passes, mark
        self._log.append("verdicts")

    def set_fail_open(self, fail_open: bool) -> None:
        self.fail_open = fail_open

    def close(self) -> None:
        self.closed = True


class Kernel:
    """All that a worker asks for; `log` says in which order things were done."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made = Queue(self.log)
        self.elements: list[Element] = []
        self.sent: list[Packet] = []
        self.refuses = ""

    def sets(self) -> Kernel:
        return self

    def injector(self, _marks: Marks) -> Kernel:
        return self

    def queue(self, number: int, fail_open: bool, _marks: Marks) -> Queue:
        self.made.number, self.made.fail_open = number, fail_open
        return self.made

    def add(self, elements: Iterable[Element]) -> None:
        self.log.append("ban")
        if self.refuses:
            raise KernelError(self.refuses)
        self.elements += elements

    def send(self, packets: Iterable[bytes], mark: int = 0) -> int:
        before = len(self.sent)
        for packet in packets:
            found = parse(packet)
            assert isinstance(found, Packet)
            self.sent.append(found)
        return len(self.sent) - before
