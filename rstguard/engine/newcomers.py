"""Sources seen once: kept apart, so that a flood of forged ones costs little and displaces nobody.

The 2Q replacement rule (T. Johnson and D. Shasha, "2Q: A Low Overhead High Performance Buffer
Management Replacement Algorithm", VLDB 1994): what is met for the first time goes into a queue of
its own, and only what is met again while it waits there gets a place in the main tables.  Nearly
every source of a forged flood is met once, so it never reaches the tables in which the sources
that go on are counted, however many it forges.

Nothing is lost by it: the SYN of a newcomer is kept, and counted by every rule, with its own time,
before anything else of its source is judged.  Only what cannot be crossed by a first SYN may be put
off so (`rstguard.engine.rules.crossed_by_one`).
"""

from __future__ import annotations

from collections.abc import Callable

from rstguard.engine.address import V6
from rstguard.engine.limiter import CAPACITY
from rstguard.engine.wire import Packet

Count = Callable[[Packet, int], None]
"""Count a SYN that came at a time (nanoseconds)."""


class Newcomers:
    """Which sources were met lately: once, with that SYN, or more often.

    Args:
        ipv4_length: a source is a prefix of this length, the widest that any rule counts by.
        ipv6_length: the same for IPv6.
        capacity: sources per generation, of each kind; see `rstguard.engine.limiter`.

    `count` must be set before the first packet: it is given the SYNs that were put off.
    """

    __slots__ = (
        "_capacity", "_met", "_met_before", "_once", "_once_before", "_shift4", "_shift6", "count",
    )  # fmt: skip

    def __init__(self, ipv4_length: int, ipv6_length: int, capacity: int = CAPACITY) -> None:
        # `source_key` is spelled out below: each of these runs for every SYN of a flood.
        self._shift4, self._shift6 = 32 - ipv4_length, 128 - ipv6_length
        self._capacity = capacity
        self._once: dict[int, tuple[Packet, int]] = {}
        self._once_before: dict[int, tuple[Packet, int]] = {}
        self._met: dict[int, None] = {}
        self._met_before: dict[int, None] = {}
        self.count: Count

    @property
    def lengths(self) -> tuple[int, int]:
        """How wide a source is, in bits of prefix: IPv4 and IPv6."""
        return 32 - self._shift4, 128 - self._shift6

    def knows(self, packet: Packet) -> bool:
        """Tell whether a packet's source was met before."""
        source = packet[0]
        key = source >> (self._shift6 if source >= V6 else self._shift4)
        waiting = key in self._once or key in self._once_before
        return waiting or key in self._met or key in self._met_before

    def put_off(self, packet: Packet, now: int) -> bool:
        """Tell whether a SYN is its source's first; if so it is kept, and is not to be counted."""
        source = packet[0]
        key = source >> (self._shift6 if source >= V6 else self._shift4)
        if key in self._met:
            return False
        once = self._once
        if key in once or key in self._once_before or key in self._met_before:
            self._know(key)
            return False
        if len(once) >= self._capacity:
            self._once_before = once
            self._once = once = {}
        once[key] = (packet, now)
        return True

    def meet(self, packet: Packet, *, counts_as_met: bool) -> None:
        """Count what was put off of a packet's source, before the packet itself is judged.

        `counts_as_met` says that the packet enters the tables that a later SYN looks into.
        """
        source = packet[0]
        key = source >> (self._shift6 if source >= V6 else self._shift4)
        waiting = key in self._once or key in self._once_before
        if waiting or (counts_as_met and key not in self._met):
            self._know(key)

    def _know(self, key: int) -> None:
        """Note that a source was met again; its first SYN, if it waits, is counted now."""
        if len(self._met) >= self._capacity:
            self._met_before = self._met
            self._met = {}
        self._met[key] = None
        earlier = self._once.pop(key, None) or self._once_before.pop(key, None)
        if earlier is not None:
            self.count(*earlier)

    def __len__(self) -> int:
        met = len(self._met) + len(self._met_before)
        return met + len(self._once) + len(self._once_before)
