"""How well the connections of a source prove its address, by what the kernel's table tells of them.

The kernel labels connections that nobody can have forged (`rstguard.kernel.proof`).  One that is
older than the guard bears no label, but shows by its bytes that the server has sent data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rstguard.engine.address import V6
from rstguard.engine.flow import Flow
from rstguard.engine.ruleset import ADOPTED, BEGUN, CONFIRMED, LIKELY, Rule
from rstguard.engine.verdict import Action

PROOFS = 4
"""Handshakes that prove an address together, though each by itself may be a lucky forgery
(`rstguard.kernel.proof`): the chance of it is 1 in 66,077 each, after which no more are counted."""
TAKEN = 1 << 18
"""Bytes of a client that no socket keeps for long: an application has read some of them."""
LONGEST4, LONGEST6 = 80, 100
"""Bytes of a segment without data, at most: IP header (without options), TCP header with all."""


class Grades:
    """Tells connections that cannot have been forged from others; `labels` is the first label.

    `likely`, `confirmed` and `adopted` are the bits that the labels have in `Flow.labels`.
    """

    def __init__(self, labels: int) -> None:
        self.likely, self.confirmed = 1 << labels + LIKELY, 1 << labels + CONFIRMED
        self.adopted = 1 << labels + ADOPTED
        self.seen_to_begin = 1 << labels + BEGUN | self.adopted | self.likely
        """What a connection bears one of that is not older than the guard."""

    def suspect(self, rule: Rule) -> Callable[[Flow], bool]:
        """Return what tells a connection that a rule gives up first, as it may be forged."""
        return self.is_unreal if rule.action is Action.BAN else self.is_doubtful

    def is_real(self, flow: Flow) -> bool:
        """Tell whether it is likely or confirmed."""
        return bool(flow.labels & self.likely) or self.is_confirmed(flow)

    def is_unreal(self, flow: Flow) -> bool:
        """Tell whether it is neither."""
        return not self.is_real(flow)

    def is_doubtful(self, flow: Flow) -> bool:
        """Tell whether it was adopted, and its server has sent no data since.

        To a stray ACK in anybody's name a server with a half-open connection answers as well.
        """
        return bool(flow.labels & self.adopted) and not self.is_confirmed(flow)

    def is_served(self, flow: Flow) -> bool:
        """Tell whether its server has sent data on it, or taken in `TAKEN` bytes of its client.

        A returned SYN cookie does not count: a connection that began by one is CONFIRMED from the
        start, and never LIKELY.
        """
        return self.is_answered(flow) or flow.client_bytes >= TAKEN

    def is_answered(self, flow: Flow) -> bool:
        """Tell whether its server has sent data on it; a returned SYN cookie does not count."""
        own = flow.labels & (self.likely | self.adopted)
        return self._has_sent(flow) or bool(flow.labels & self.confirmed and own)

    def real(self, flows: Iterable[Flow]) -> int:
        """Return how many are."""
        return sum(map(self.is_real, flows))

    def prove(self, flows: Iterable[Flow]) -> bool:
        """Tell whether these connections of a source prove its address.

        One on which the server has sent data does, or `PROOFS` that are likely.
        """
        likely = 0
        for flow in flows:
            if self.is_confirmed(flow):
                return True
            likely += bool(flow.labels & self.likely)
        return likely >= PROOFS

    def is_confirmed(self, flow: Flow) -> bool:
        """Tell whether its server has sent data, or it has begun by a returned SYN cookie."""
        return bool(flow.labels & self.confirmed) or self._has_sent(flow)

    def _has_sent(self, flow: Flow) -> bool:
        longest = LONGEST6 if flow.original.source >= V6 else LONGEST4
        return flow.server_bytes > flow.server_packets * longest
