"""What everything of the guard in the kernel is called: one home for the names of its parts.

Whatever bears the prefix is ours to change and to remove; nothing else is.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

PREFIX: Final = "rstguard"
"""The name of an nf_tables table, and how the name of every other, chain and set begins."""


def set_name(what: str, family: int | None = None) -> str:
    """Return the name of a set: of one address family (4 or 6), or of both."""
    return f"{PREFIX}-{what}{family or ''}"


BAN_SETS: Final = (set_name("ban", 4), set_name("ban", 6))
SHUN_SETS: Final = (set_name("shun", 4), set_name("shun", 6))
GATE_SETS: Final = (set_name("gate", 4), set_name("gate", 6))
BLOCK_SETS: Final = BAN_SETS + GATE_SETS + SHUN_SETS
"""All that hold whom the guard blocks, the most severe first."""


def short_id(text: str) -> str:
    """Return ten characters that stand for a text: the name of a set has room for 31 in all."""
    return blake2b(text.encode(), digest_size=5).hexdigest()


def is_ours(name: str) -> bool:
    """Tell whether a chain or set bears our prefix."""
    return name.startswith(f"{PREFIX}-")
