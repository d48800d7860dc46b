"""Load shedding in the kernel: what an overrun worker would only pass on need not reach it.

A worker that stays overrun (`rstguard.engine.shedding`, level THINNED) puts everything into a set
of its own.  While it is there, the SYNs of sources without proof of address and the segments of no
connection go past its queue, but for one in sixteen, by which heavy hitters and the end of the
flood are seen.  The entries expire by themselves, so a worker that dies leaves its queue open.
"""

from __future__ import annotations

from rstguard.engine.address import V6, Prefix
from rstguard.engine.shedding import SAMPLE
from rstguard.kernel import marks
from rstguard.kernel.counting import PREFIX, bits
from rstguard.kernel.sets import Sets

SECONDS = 3
"""How long a queue stays closed without being told so again."""

_SAMPLED = f"-m statistic --mode nth --every {SAMPLE} --packet 0"
_EVERYTHING = {
    4: (Prefix(0, 1), Prefix(1 << 31, 1)),  # a set holds no prefix of length 0
    6: (Prefix(V6, 1), Prefix(V6 | 1 << 127, 1)),
}


def set_name(family: int, index: int) -> str:
    """Return the name of the set of a worker, counted from 0, in an address family."""
    return f"{PREFIX}-thin{family}-{index}"


def syns(family: int, index: int, to_queue: str, drops: bool) -> tuple[str, ...]:
    """Return the chain of the new SYNs of a worker's sources.  Pure.

    With `drops` those that are kept from the queue do not pass.
    """
    return (
        _usually(family, index, to_queue),
        f"-m mark --mark {bits(marks.TO_QUEUE_PROVEN)} {to_queue}",
        f"{_SAMPLED} {to_queue}",
        f"-m set --match-set {PREFIX}-spared{family} src {to_queue}",
        "-j DROP" if drops else "-j RETURN",
    )


def strays(family: int, index: int, to_queue: str) -> tuple[str, ...]:
    """Return the chain of the segments of a worker's sources that fit no connection.  Pure."""
    return (_usually(family, index, to_queue), f"{_SAMPLED} {to_queue}", "-j RETURN")


def _usually(family: int, index: int, to_queue: str) -> str:
    return f"-m set ! --match-set {set_name(family, index)} src {to_queue}"


def thin(sets: Sets, index: int) -> None:
    """Keep SYNs without proof away from a worker's queue for the next seconds.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in _EVERYTHING.items():
        sets.put(set_name(family, index), prefixes, SECONDS)


def restore(sets: Sets, index: int) -> None:
    """Let all SYNs into a worker's queue again.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in _EVERYTHING.items():
        sets.take(set_name(family, index), prefixes)
