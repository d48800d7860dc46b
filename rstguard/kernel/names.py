"""What everything of the guard in the kernel is called: one home for the names of its parts.

Whatever bears the prefix is ours to change and to remove; nothing else is.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "rstguard"
"""The name of the nf_tables table, and how the name of every chain and set begins."""


def set_name(what: str, family: int | None = None) -> str:
    """Return the name of a set: of one address family (4 or 6), or of both."""
    return f"{PREFIX}-{what}{family or ''}"


BAN_SETS: Final = (set_name("ban", 4), set_name("ban", 6))
SHUN_SETS: Final = (set_name("shun", 4), set_name("shun", 6))
GATE_SETS: Final = (set_name("gate", 4), set_name("gate", 6))
BLOCK_SETS: Final = BAN_SETS + GATE_SETS + SHUN_SETS
"""All that hold whom the guard blocks, the most severe first."""


def is_ours(name: str) -> bool:
    """Tell whether a chain or set bears our prefix."""
    return name.startswith(f"{PREFIX}-")
