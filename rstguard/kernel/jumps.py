"""How a built-in chain reaches one of ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Jump:
    """The one rule by which a built-in chain reaches one of ours."""

    table: str
    builtin: str
    match: str
    chain: str
    last: bool = False

    @property
    def rule(self) -> str:
        """The rule as iptables-save prints it, less the ``-A CHAIN``."""
        return f"{self.match} -j {self.chain}".strip()
