"""How well the connections of a source prove its address, by what the kernel's table tells of them.

The kernel labels connections that nobody can have forged (`rstguard.kernel.proof`).  One that is
older than the guard bears no label, but shows by its bytes that the server has sent data.
"""

from __future__ import annotations

from collections.abc import Iterable

from rstguard.engine.address import V6
from rstguard.engine.flow import Flow
from rstguard.engine.rules import PROOFS
from rstguard.engine.ruleset import ADOPTED, CONFIRMED, LIKELY

_LONGEST4, _LONGEST6 = 80, 100
"""Bytes of a segment without data, at most: IP header (without options), TCP header with all."""


class Grades:
    """Tells connections that cannot have been forged from others; `labels` is the first label."""

    def __init__(self, labels: int) -> None:
        self._likely, self._confirmed = 1 << labels + LIKELY, 1 << labels + CONFIRMED
        self._adopted = 1 << labels + ADOPTED

    def is_real(self, flow: Flow) -> bool:
        """Tell whether it is likely or confirmed."""
        return bool(flow.labels & self._likely) or self._is_confirmed(flow)

    def is_doubtful(self, flow: Flow) -> bool:
        """Tell whether it was adopted, and its server has sent no data since.

        To a stray ACK in anybody's name a server with a half-open connection answers as well.
        """
        return bool(flow.labels & self._adopted) and not self._is_confirmed(flow)

    def real(self, flows: Iterable[Flow]) -> int:
        """Return how many are."""
        return sum(map(self.is_real, flows))

    def prove(self, flows: Iterable[Flow]) -> bool:
        """Tell whether these connections of a source prove its address.

        One on which the server has sent data does, or `PROOFS` that are likely.
        """
        likely = 0
        for flow in flows:
            if self._is_confirmed(flow):
                return True
            likely += bool(flow.labels & self._likely)
        return likely >= PROOFS

    def _is_confirmed(self, flow: Flow) -> bool:
        longest = _LONGEST6 if flow.original.source >= V6 else _LONGEST4
        return bool(flow.labels & self._confirmed) or flow.server_bytes > (
            flow.server_packets * longest
        )
