"""Targets that refused a source: what a scan meets, and an honest client hardly ever.  Pure.

A service refuses by a RST before the handshake is over, or is silent: a SYN that nothing has
followed for `ANSWER_WITHIN` counts when its source, or anybody, next sends one.  A connection that
its client gives up counts for nobody: a browser that tries two addresses at once does so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from rstguard.engine.keys import service_of
from rstguard.engine.limiter import Distinct, Memory
from rstguard.engine.onesided import OneSided
from rstguard.engine.ruleset import SECOND
from rstguard.engine.wire import KNOWN, OUTBOUND, Packet

ANSWER_WITHIN: Final = 4 * SECOND
"""How long (ns) a handshake may take: a SYN that was lost is sent again after one second and after
three (RFC 6298, 2.1 and 5.5)."""
_MOST_WAITING: Final = 1 << 16
"""SYNs that are waited for; of a flood the oldest are forgotten, which favours their sources."""
_MOST_CROSSED: Final = 1 << 12

Name = Callable[[Packet], int]


class _Waiting(NamedTuple):
    until: int
    flow: int
    key: int


class Refusals:
    """What `refused_ports` counts: different targets (address and port) that refused a source."""

    def __init__(
        self, key: Name, flow: Name, limit: int, refused: Distinct, one_sided: OneSided
    ) -> None:
        """Count by `key` in `refused`, whose limit it is; `flow` names a packet's connection."""
        self._key, self._flow, self._limit = key, flow, limit
        self._refused, self._one_sided = refused, one_sided
        self._open: Memory[bool] = Memory()
        """The connections that have only begun."""
        self._waiting: deque[_Waiting] = deque(maxlen=_MOST_WAITING)
        self._crossed: set[int] = set()
        """Who has crossed the limit, and may be beyond it still."""

    def opened(self, packet: Packet, now: int) -> bool:
        """Wait for what becomes of a SYN; tell whether its source is beyond the limit."""
        self._look(now)
        key = self._key(packet)
        if not packet.state & KNOWN:
            flow = self._flow(packet)
            self._open.put(flow, True)
            self._waiting.append(_Waiting(now + ANSWER_WITHIN, flow, key))
        if key not in self._crossed:
            return False
        if self._refused.count(key, now) > self._limit:
            return True
        self._crossed.discard(key)
        return False

    def completed(self, packet: Packet, now: int) -> bool:
        """The target has answered, be it late."""
        flow = self._flow(packet)
        self._open.pop(flow)
        self._refused.forget(self._key(packet), _target(flow))
        return False

    def given_up(self, packet: Packet, now: int) -> bool:
        """Count a RST of the server; tell whether it is one too many."""
        self._look(now)
        flow = self._flow(packet)
        if not self._open.pop(flow) or not packet.state & OUTBOUND:
            return False
        return self._count(self._key(packet), _target(flow), now)

    def _look(self, now: int) -> None:
        """Count what has waited too long."""
        waiting = self._waiting
        while waiting and waiting[0].until <= now:
            _, flow, key = waiting.popleft()
            if self._open.pop(flow):
                self._count(key, _target(flow), now)

    def _count(self, key: int, target: int, now: int) -> bool:
        """Count a refusal; where only one side is seen, silence says nothing."""
        if not self._refused.over(key, target, now):
            return False
        self._refused.forget_those(
            key, lambda one: self._one_sided.find(one >> 16, one & 0xFFFF, now)
        )
        if self._refused.count(key, now) <= self._limit:
            return False
        if len(self._crossed) >= _MOST_CROSSED:
            self._crossed.clear()
        self._crossed.add(key)
        return True


def _target(flow: int) -> int:
    """Return the address and port that a connection was to lead to."""
    address, port = service_of(flow)
    return address << 16 | port
