"""The segments by which an end of a connection is asked whether it holds it, and their numbers.

What they are for is told in `rstguard.engine.holding`.  Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from rstguard.engine.evidence import Asked
from rstguard.engine.flow import Tuple

_HALF: Final = 1 << 31
_MODULUS: Final = 1 << 32
# A probe of an end whose numbers are known stays this near to them (kernel-tested: trackers let
# such a segment pass, and the end still finds it old).
_BEHIND: Final = (2_000, 14_000)
_ACKED: Final = (1, 60_000)
_BEYOND: Final = (1 << 24, _HALF - (1 << 24))
"""How far ahead of all that an end has sent a number is, so that it has not sent it."""


class Probe(NamedTuple):
    """One segment to be sent: who seems to send it to whom, and its numbers.

    It carries one byte, or `opens`: a SYN, with an ACK unless that number is None.  `number` tells
    which question to this end it is, from 1 on.
    """

    path: Tuple
    sequence: int
    acknowledgement: int | None
    opens: bool = False
    number: int = 1


class Questions:
    """Makes probes; `draw` draws 32 random bits."""

    def __init__(self, draw: Callable[[], int]) -> None:
        self._draw = draw
        self._probes: list[Probe] = []

    def take(self) -> list[Probe]:
        """Return the probes made since the last call."""
        taken, self._probes = self._probes, []
        return taken

    def ask(self, asked: Asked, sends: Tuple, sequence: int, nonce: int) -> None:
        """Ask an end whose segments are `sends`."""
        asked.probes.append(sequence)
        asked.nonces.append(nonce)
        self._probes.append(Probe(sends.turned, sequence, nonce, number=len(asked.probes)))

    def ask_by(self, asked: Asked, sends: Tuple, received: int | None, sent: int | None) -> None:
        """Ask an end that has received and sent so much, as far as that is known.

        What it acknowledges the end has not sent yet: some stacks only answer that.
        """
        sequence = self._draw() if received is None else self._old(received)
        self.ask(asked, sends, sequence, self._unsent(sent))

    def ask_within(self, asked: Asked, sends: Tuple, received: int, sent: int) -> None:
        """Likewise by numbers that fit the connection: a firewall of the end lets them pass."""
        nonce = (sent - self._from(*_ACKED)) % _MODULUS
        self.ask(asked, sends, self._old(received), nonce)

    def ask_living(self, asked: Asked, sends: Tuple, received: int, sent: int) -> None:
        """Likewise, so that a stack answers, too, that ignores what acknowledges less.

        A dead end answers with the number that a forger knows: that is not recorded.
        """
        sequence = self._old(received)
        asked.probes.append(sequence)
        self._probes.append(Probe(sends.turned, sequence, sent, number=len(asked.probes)))

    def ask_other(self, asked: Asked, sends: Tuple, received: int | None) -> None:
        """Ask an end by numbers that nobody can guess; twice, if none of it is known."""
        if received is not None:
            sequence = (received - self._from(*_BEYOND)) % _MODULUS
            self.ask(asked, sends, sequence, self._draw())
            return
        first, nonce = self._draw(), self._draw()
        for half in (0, _HALF):
            self.ask(asked, sends, first ^ half, nonce ^ half)

    def open(self, sends: Tuple, *, acknowledges: bool) -> None:
        """Send an end a SYN, or a SYN+ACK."""
        acknowledgement = self._draw() if acknowledges else None
        self._probes.append(Probe(sends.turned, self._draw(), acknowledgement, opens=True))

    def _unsent(self, sent: int | None) -> int:
        """Return a number that an end has not sent yet; any if it is not known what it has sent."""
        return self._draw() if sent is None else (sent + self._from(*_BEYOND)) % _MODULUS

    def _old(self, received: int) -> int:
        return (received - self._from(*_BEHIND)) % _MODULUS

    def _from(self, lowest: int, above: int) -> int:
        return lowest + self._draw() % (above - lowest)
