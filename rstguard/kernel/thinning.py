"""Load shedding in the kernel: what an overrun worker would only pass on need not reach it.

A worker that stays overrun (`rstguard.engine.shedding`, level THINNED) puts everything into a set
of its own.  While it is there, the SYNs of sources without proof of address and the segments of no
connection go past its queue, but for one in sixteen, by which heavy hitters and the end of the
flood are seen.  The entries expire by themselves, so a worker that dies leaves its queue open.
"""

from __future__ import annotations

from rstguard.engine.address import V6, Prefix
from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.shedding import SAMPLE
from rstguard.kernel.counting import LARGEST_RATE, UNITS, table_size
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.seam import ElementSets

SECONDS = 3
"""How long a queue stays closed without being told so again."""

_MOST_PORTS = 15
"""What the multiport match takes at once."""
_SAMPLED = f"-m statistic --mode nth --every {SAMPLE} --packet 0"
_EVERYTHING = {
    4: (Prefix(0, 1), Prefix(1 << 31, 1)),  # a set holds no prefix of length 0
    6: (Prefix(V6, 1), Prefix(V6 | 1 << 127, 1)),
}


def thin_set(family: int, index: int) -> str:
    """Return the name of the set of a worker, counted from 0, in an address family."""
    return f"{set_name('thin', family)}-{index}"


def syns(ruleset: RuleSet, family: int, index: int, to_queue: str) -> tuple[str, ...]:
    """Return the chain of the new SYNs of a worker's sources.  Pure."""
    limits = service_limits(ruleset, family) if ruleset.enforce else ()
    drops = ruleset.enforce and not ruleset.fail_open
    return (
        _usually(family, index, to_queue),
        f"-m mark --mark {Marks(ruleset.marks).to_queue_proven} {to_queue}",
        f"{_SAMPLED} {to_queue}",
        f"-m set --match-set {set_name('protected', family)} src {to_queue}",
        *limits,
        "-j DROP" if drops else "-j RETURN",
    )


def service_limits(ruleset: RuleSet, family: int) -> tuple[str, ...]:
    """Return the rules that drop what spares the queue but is more than a service may get.

    The kernel counts that apart from the engine, so a service gets its limit, and what comes
    through the queue besides.
    """
    rules = []
    for rule in ruleset.rules:
        if not rule.limits_service or rule.period not in UNITS or rule.limit > LARGEST_RATE:
            continue
        lives = max(1, -(-rule.refill // SECOND))
        table = f"{PREFIX}{family}-of-{rule.limit}-{rule.period // SECOND}-{rule.burst}"
        limit = (
            f"-m hashlimit --hashlimit-above {rule.limit}/{UNITS[rule.period]}"
            f" --hashlimit-burst {min(rule.burst, LARGEST_RATE)} --hashlimit-mode dstip,dstport"
            f" --hashlimit-name {table} {table_size(lives, rule.period // SECOND)} -j DROP"
        )
        ports = sorted(rule.ports or ())
        several = [
            ports[start : start + _MOST_PORTS] for start in range(0, len(ports), _MOST_PORTS)
        ]
        named = (f"-p tcp -m multiport --dports {','.join(map(str, some))} " for some in several)
        rules += [match + limit for match in (named if ports else ("",))]
    return tuple(rules)


def strays(family: int, index: int, to_queue: str) -> tuple[str, ...]:
    """Return the chain of the segments of a worker's sources that fit no connection.  Pure."""
    return (_usually(family, index, to_queue), f"{_SAMPLED} {to_queue}", "-j RETURN")


def _usually(family: int, index: int, to_queue: str) -> str:
    return f"-m set ! --match-set {thin_set(family, index)} src {to_queue}"


def thin(sets: ElementSets, index: int) -> None:
    """Keep SYNs without proof away from a worker's queue for the next seconds.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in _EVERYTHING.items():
        sets.put(thin_set(family, index), prefixes, SECONDS)


def restore(sets: ElementSets, index: int) -> None:
    """Let all SYNs into a worker's queue again.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in _EVERYTHING.items():
        sets.take(thin_set(family, index), prefixes)
