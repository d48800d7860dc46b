"""Lines of iptables-restore and ipset restore, taken apart."""

from __future__ import annotations

import shlex
from functools import lru_cache


@lru_cache(maxsize=1 << 14)
def words_of(line: str) -> tuple[str, ...]:
    """Return the words of a line, which may be quoted; the same lines come again and again."""
    return tuple(shlex.split(line))
