"""What is heard of connections as they begin and end, and what follows from it.

The kernel tells of the keys that come near a limit (`rstguard.kernel.admission`), some milliseconds
late at most, or as late as a sweep takes; whom it lets in meanwhile it counts by itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Final

from rstguard.engine.address import is_v6
from rstguard.engine.admission import Admissions, Count, place_of
from rstguard.engine.flow import Flow, TcpState, Tuple, as_held
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.segment import cookie_rst
from rstguard.engine.wire import FIN, RST, SYN, Packet, parse
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import Reset
from rstguard.kernel import KernelError, admission
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import (
    Connections,
    Copies,
    Counted,
    ElementSets,
    Kernel,
    PacketCopies,
    PacketSender,
)
from rstguard.sweeper.targets import named

log = logging.getLogger(__name__)

_READ_EVERY: Final = SECOND // 500
"""How long what arrives is collected: a reading costs more than what it brings."""
_ALIVE_EVERY: Final = SECOND
_RENEWALS: Final = 5
"""After so many times two sweeps without one more what was counted is forgotten."""
_MOST_SETTINGS: Final = 4
"""Times that counts are set in one go."""
_TOLD_FOR: Final = 60 * SECOND
_OVER: Final = frozenset({TcpState.LAST_ACK, TcpState.TIME_WAIT, TcpState.CLOSE})
"""States in which no end holds the connection."""
_NOTHING: Final = Copies([], lost=False)


class Admitting:
    """Keeps `rstguard.engine.admission.Admissions` up to date, and the kernel's counts with it."""

    def __init__(
        self,
        channel: ChildEnd,
        kernel: Kernel,
        table: Connections,
        sets: ElementSets,
        sender: PacketSender,
        counts: Counter[str],
        marks: Marks,
        cpu_clock: Callable[[], int],
    ) -> None:
        """Listen; where another program does, sweeps alone hold the limits, and `counts` say so."""
        self._channel, self._table, self._sets, self._sender = channel, table, sets, sender
        self._counts, self._cpu_clock = counts, cpu_clock
        self._closing = marks.closing.mask
        self._logs: list[PacketCopies] = []
        try:
            for group in (admission.TOLD_GROUP, admission.REFUSED_GROUP):
                self._logs.append(kernel.packet_log(group))
        except KernelError as error:
            log.error("connections are counted by sweeps alone: %s", error)
            while self._logs:
                self._logs.pop().close()
        self._read_at = self._alive_at = self._calm_at = 0
        self._failing = False

    def follow(self, ruleset: RuleSet, admissions: Admissions) -> None:
        """Take up what counts by another policy."""
        self._admissions = admissions
        self._seconds = admission.lives(ruleset) * _RENEWALS
        self._alive_at = 0
        self._counts["cannot_count"] = int(bool(admissions.rules) and not self._logs)

    @property
    def descriptors(self) -> list[int]:
        """What to wait on."""
        return [one.fileno() for one in self._logs]

    def rests(self, now: int) -> int:
        """Return for how many nanoseconds nothing is read, because something just was."""
        return max(self._read_at - now, 0)

    @property
    def wants_sweep(self) -> bool:
        """Whether somebody may be beyond a limit, which only a sweep can tell."""
        return self._admissions.wants_sweep

    def work(self, now: int) -> None:
        """Take in what was heard, and set the kernel's counts right."""
        if not self._logs or not self._admissions.rules:
            return
        if now >= self._alive_at:
            self._alive_at = now + _ALIVE_EVERY
            self._tell(lambda: admission.alive(self._sets))
        if now >= self._calm_at:
            self._counts["uncounted"] = 0
        if not self.rests(now):
            began = self._cpu_clock()
            if self._hear(now):
                self._read_at = now + _READ_EVERY
                self._settle(now)
                self._counts["counting_cpu_us"] += (self._cpu_clock() - began) // 1000

    def swept(self, now: int) -> None:
        """Set every count that is kept by what a sweep has found, and what was heard since."""
        if self._logs and self._admissions.rules:
            self._hear(now)
            self._set(self._admissions.renewed())
            self._hear(now)
            self._settle(now)
            self._counts["watched"] = self._admissions.watched

    def _settle(self, now: int) -> None:
        """Set the kernel's counts right, and look what has begun meanwhile, which they may lack."""
        for _ in range(_MOST_SETTINGS):
            found = self._admissions.counts()
            if not found:
                return
            self._set(found)
            self._hear(now)

    def _hear(self, now: int) -> bool:
        """Read what has arrived; tell whether there was anything."""
        told, refused = (self._read(one) for one in self._logs)
        if told.lost:
            self._admissions.lost = True
            self._counts["uncounted"], self._calm_at = 1, now + _TOLD_FOR
        ends: dict[Tuple, None] = {}
        for copy in told.copies:
            packet = parse(copy.packet)
            if not isinstance(packet, Packet):
                continue
            path = Tuple(*packet[:4])
            if not packet.flags & (FIN | RST):
                self._admissions.began(path)
            elif self._admissions.has(path):
                ends[path] = None
            elif self._admissions.has(path.turned):
                ends[path.turned] = None
        self._look_at(list(ends))
        self._refused(refused)
        return bool(told.copies or told.lost or refused.copies)

    def _read(self, one: PacketCopies) -> Copies:
        try:
            return one.read()
        except KernelError as error:
            log.error("%s", error)
            return _NOTHING

    def _look_at(self, paths: list[Tuple]) -> None:
        """Ask the tracker which connections are over: a FIN or RST alone proves nothing."""
        found: list[Flow | None] = []
        if paths:
            self._tell(lambda: found.extend(self._table.read([named(path) for path in paths])))
        for path, flow in zip(paths, found, strict=False):  # what is not there is a sweep's to find
            if flow is not None and as_held(flow, self._closing).state in _OVER:
                self._admissions.ended(path)

    def _refused(self, refused: Copies) -> None:
        rules = self._admissions.rules
        for prefix, data in refused.copies:
            packet = parse(data)
            number = int(prefix) if prefix.isdecimal() else len(rules)
            if number >= len(rules) or not isinstance(packet, Packet):
                continue  # of the policy before
            if packet.flags & SYN:  # SYNPROXY's own: its client takes the connection for open
                self._sender.send([cookie_rst(packet)])
            rule = rules[number]
            self._counts[f"rule.{rule.name}"] += 1
            reason, path = REASONS[rule.measure], Tuple(*packet[:4])
            self._channel.send(Reset(path, rule.ends, rule.name, reason, True, by_worker=False))

    def _set(self, found: list[Count]) -> None:
        """Have the kernel count so; an element that it makes begins with 1, so all are that more.

        Which set it is in says the number of the rule, and the address the family.
        """
        rules = self._admissions.rules
        by_set: dict[tuple[int, int], list[Counted]] = {}
        for number, key, held in found:
            address, port = place_of(rules[number], key)
            family = 6 if is_v6(address) else 4
            by_set.setdefault((number, family), []).append(Counted(address, port, held + 1))
        for (number, family), elements in by_set.items():
            name = admission.live_set(rules[number], family)
            self._tell(partial(self._sets.count, name, elements, self._seconds))

    def _tell(self, what: Callable[[], object]) -> None:
        """Do something that the kernel may refuse: then the next sweep's work does it again."""
        try:
            what()
            self._failing = False
        except KernelError as error:
            self._admissions.lost = True
            if not self._failing:
                log.error("%s", error)
            self._failing = True
