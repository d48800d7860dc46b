"""Who is connected to a listener of the guard: bounded, and the longest silent goes first."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Final

ACCEPTED_AT_ONCE: Final = 8
"""Connections that one pass of the loop accepts.

So few that whatever a newcomer has sent is read before the crowd behind it is let in: somebody who
asks at once is never the longest silent.
"""
BACKLOG: Final = 1024
"""Connections that may wait to be accepted (listen(2); the kernel's somaxconn bounds it)."""


@dataclass(eq=False, slots=True)
class Guest:
    """One connection; `whose` is the account or address at its other end."""

    writer: asyncio.StreamWriter
    whose: Hashable
    held: int = 0
    """Bytes that are kept of its request, until that is answered."""


class Crowd:
    """Those who are connected.

    At most `most` are silent, that is: they have asked nothing, or not all of it, or do not read
    their answer; and at most `most_answered` are being answered.  If one more comes, or if requests
    take more than `most_held` bytes, the longest silent is cut off, of whoever has the most
    connections.
    """

    def __init__(self, most: int, most_held: int, most_answered: int) -> None:
        self._most = most
        self._most_answered = most_answered
        self._most_held = most_held
        self._silent: dict[Guest, None] = {}
        """The longest silent first."""
        self._answered = 0
        self._held = 0

    @contextlib.contextmanager
    def entered(self, writer: asyncio.StreamWriter, whose: Hashable) -> Iterator[Guest]:
        """Let somebody in, silent until it has asked, and forget it at the end."""
        # Whoever waits for what was written waits until all of it is on its way, so that a
        # connection which is closed then holds nothing that nobody counts.
        writer.transport.set_write_buffer_limits(high=0)
        guest = Guest(writer, whose)
        self._silent[guest] = None
        if len(self._silent) > self._most:
            self._cut_off(self._silent)
        try:
            yield guest
        finally:
            self._silent.pop(guest, None)
            self._held -= guest.held

    @property
    def full(self) -> bool:
        """Whether as many are being answered as can be."""
        return self._answered >= self._most_answered

    @contextlib.contextmanager
    def answering(self, guest: Guest) -> Iterator[None]:
        """Count somebody as not silent while its answer is worked out."""
        self._silent.pop(guest, None)
        self._answered += 1
        try:
            yield
        finally:
            self._answered -= 1
            self._silent[guest] = None
            if len(self._silent) > self._most:
                self._cut_off(self._silent)

    def holds(self, guest: Guest, size: int) -> None:
        """Note how many bytes are kept of somebody's request."""
        self._held += size - guest.held
        guest.held = size
        while self._held > self._most_held:
            holding = [one for one in self._silent if one.held]
            if not holding:  # all of it is being answered
                return
            self._cut_off(holding)

    def _cut_off(self, silent: Collection[Guest]) -> None:
        connections = Counter(guest.whose for guest in silent)
        most = max(connections.values())
        longest = next(guest for guest in silent if connections[guest.whose] == most)
        del self._silent[longest]
        self._held -= longest.held
        longest.held = 0
        longest.writer.transport.abort()
