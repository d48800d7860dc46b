"""Services of which only one side is seen: what follows from it for rules, and what is told.  Pure.

Where a service's SYN-ACKs never pass here no handshake can be seen to end: `half_open` must not act
on its clients.  Who says so is the kernel (`rstguard.kernel.oneway`): only while no SYN-ACK of the
service at all passes, though its clients go on.  It is asked only when a limit is crossed, so that
a usual SYN costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from rstguard.engine.keys import service_of
from rstguard.engine.limiter import Distinct, Memory
from rstguard.engine.ruleset import SECOND
from rstguard.engine.service import Service
from rstguard.engine.wire import KNOWN, OUTBOUND, Packet

ASK_EVERY: Final = SECOND
"""How long (ns) an answer is believed."""
TELL_AFTER: Final = 12 * SECOND
"""How long (ns) clients must go on unanswered to be told: longer than one segment is remembered."""
FORGET_AFTER: Final = 600 * SECOND
"""How long (ns) it stays told of a service that nobody asks any more."""
MOST: Final = 64
"""Services that are told at a time."""
_MOST_CANDIDATES: Final = 1024

Name = Callable[[Packet], int]
Ask = Callable[[int, int], bool]
"""Tells whether only one side is seen of an address (tagged) and port."""


class OneSided:
    """Asks for services when it matters; bounded."""

    def __init__(self, ask: Ask = lambda _address, _port: False) -> None:
        self._ask = ask
        self._answers: dict[tuple[int, int], tuple[int, bool]] = {}
        """What was answered of a service, and until when that is believed."""

    def known(self, address: int, port: int, now: int) -> bool:
        """Tell whether a service was found one-sided within the last second."""
        until, one_sided = self._answers.get((address, port), (0, False))
        return one_sided and until > now

    def find(self, address: int, port: int, now: int) -> bool:
        """Tell whether a service is one-sided, by an answer that is at most a second old."""
        until, one_sided = self._answers.get((address, port), (0, False))
        if until <= now:
            if len(self._answers) >= _MOST_CANDIDATES:
                self._answers.clear()
            one_sided = self._ask(address, port)
            self._answers[address, port] = now + ASK_EVERY, one_sided
        return one_sided


class Handshakes:
    """What `half_open` counts: SYNs of a source that no ACK has followed yet.

    A SYN of a returned SYN cookie opens nothing: its handshake is over.  What opens at a service of
    which only one side is seen does not count, as no ACK could take it back.
    """

    def __init__(self, key: Name, flow: Name, pending: Distinct, one_sided: OneSided) -> None:
        """Count by `key` in `pending`; `flow` names a packet's connection."""
        self._key, self._flow = key, flow
        self._pending, self._one_sided = pending, one_sided
        self._begun: Memory[int] = Memory()
        """The number of each connection's SYN."""

    def opened(self, packet: Packet, now: int) -> bool:
        """Count a SYN; tell whether it is too much."""
        service = packet.destination, packet.destination_port
        if packet.state & KNOWN or self._one_sided.known(*service, now):
            return False
        key, flow = self._key(packet), self._flow(packet)
        self._begun.put(flow, packet.sequence)
        if not self._pending.over(key, flow, now):
            return False
        if self._one_sided.find(*service, now):
            self._pending.forget_those(key, lambda flow: service_of(flow) == service)
            return False
        return True

    def completed(self, packet: Packet, now: int) -> bool:
        """Take it back at its first ACK."""
        self._pending.forget(self._key(packet), self._flow(packet))
        return False

    def given_up(self, packet: Packet, now: int) -> bool:
        """Take it back at a RST of the server, or of the client with the number behind its SYN's.

        The tracker takes a RST of the client with many numbers, the server surely only that one.
        """
        flow = self._flow(packet)
        last = self._begun.get(flow)
        of_server = bool(packet.state & OUTBOUND)
        if of_server or (last is not None and packet.sequence == (last + 1) & 0xFFFFFFFF):
            self._pending.forget(self._key(packet), flow)
        return False


class News(NamedTuple):
    """What a look has changed."""

    began: tuple[Service, ...]
    ended: tuple[Service, ...]


class Told:
    """Which services are told to be one-sided, from looks some seconds apart."""

    def __init__(self) -> None:
        self._since: dict[Service, int] = {}
        self._last: dict[Service, int] = {}

    @property
    def services(self) -> tuple[Service, ...]:
        """Those that are told now, in the order of addresses and ports."""
        return tuple(sorted(self._last))

    def look(self, oneway: Collection[Service], answers: Collection[Service], now: int) -> News:
        """Take in which services' clients go on unanswered, and which services have answered.

        It ends with the first answer, or when nobody has asked for long.
        """
        there = [service for service in oneway if service not in answers]
        self._since = {
            service: self._since.get(service, now) for service in there[:_MOST_CANDIDATES]
        }
        ended = [
            service
            for service, last in self._last.items()
            if service in answers or now - last >= FORGET_AFTER
        ]
        for service in ended:
            del self._last[service]
        began = []
        for service, since in self._since.items():
            if service in self._last:
                self._last[service] = now
            elif now - since >= TELL_AFTER and len(self._last) < MOST:
                self._last[service] = now
                began.append(service)
        return News(tuple(sorted(began)), tuple(sorted(ended)))
