"""What is known of one connection of which a RST waits.  Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rstguard.engine.evidence import Asked
from rstguard.engine.flow import Flow, Tuple
from rstguard.engine.ruleset import SECOND

AGAIN: Final = SECOND // 10
"""When the other end is sent a SYN, and the sender asked by what the other end has told."""
MOST_ASKED: Final = 3
"""Questions to one end."""
ENOUGH: Final = 2
"""Answers that say that it is dead: what stands before it may have said so."""


@dataclass(slots=True, eq=False)
class Case:
    """One connection of which a RST waits."""

    flow: Flow
    sender: Tuple
    """Segments of the named sender, as they come in here."""
    other: Tuple
    """Those of the other end."""
    sequence: int | None
    """The number that the sender goes on with if it has sent nothing; None of an orphan's."""
    closes: int | None
    """The one behind the FIN; None of a RST."""
    began: int
    inside: bool
    hops: int
    numbers: list[int] = field(default_factory=list)
    of_sender: Asked = field(default_factory=Asked)
    of_other: Asked = field(default_factory=Asked)
    bare_hops: int = -1
    """The hops of a bare ACK of the sender that came after it was asked."""
    ends: int = 0
    echoes: int = 0
    """Bare ACKs of the other end since it was asked."""
    opened: bool = False
    """Whether the other end was sent a SYN."""
    other_dead: bool = False
    """Whether the other end, or what stands before it, has said so."""
    received: int | None = None
    """What the sender has received, by the RST."""
    told: tuple[int, int] | None = None
    """What the sender has received and sent, by the other end."""
    dead: set[int] = field(default_factory=set)
    """By which numbers the sender, or what stands before it, has said that it is dead."""
    anew: bool = False
    """Whether the sender was asked by the numbers of its own bare ACK."""
    exactly: bool = False
    """Whether the sender was asked by true numbers, or will have been once they are known."""
    insisted: bool = False
    """Whether the sender was asked once more, in the end."""

    @property
    def by_client(self) -> bool:
        """Whether the named sender is the client."""
        return self.sender == self.flow.original

    @property
    def may_ask(self) -> bool:
        """Whether the sender may be asked once more."""
        return len(self.of_sender.probes) < MOST_ASKED

    @property
    def is_over(self) -> bool:
        """Whether what was said of deaths is enough.

        One answer is enough where no other was awaited and its number was any of all.
        """
        said = len(self.dead)
        if self.other_dead:
            return said >= min(ENOUGH, len(self.of_sender.nonces))
        return said >= ENOUGH and self.exactly and self.of_sender.nonces[-1] in self.dead

    @property
    def opens_at(self) -> int:
        """When the other end is sent a SYN, if it has told no numbers.

        At once if the sender may be dead, and the other end seems so or has no DSACK.
        """
        soon = (self.dead and self.echoes) or self.other_dead
        return self.began if soon else self.began + AGAIN
