"""Load shedding in the kernel: what an overrun worker would only pass on need not reach it.

A worker that stays overrun (`rstguard.engine.shedding`, level THINNED) puts everything into a set
of its own.  While it is there, the SYNs of sources without proof of address and the segments of no
connection go past its queue, but for one in sixteen, by which heavy hitters and the end of the
flood are seen.  The entries expire by themselves, so a worker that dies leaves its queue open.
"""

from __future__ import annotations

from rstguard.engine.address import Prefix, is_v6
from rstguard.engine.ruleset import Rule, RuleSet
from rstguard.engine.shedding import SAMPLE
from rstguard.kernel.counting import UNITS, kept_in, table_of
from rstguard.kernel.elements import EVERYTHING
from rstguard.kernel.marks import Marks
from rstguard.kernel.matching import ports_named
from rstguard.kernel.names import set_name
from rstguard.kernel.seam import ElementSets

SECONDS = 3
"""How long a queue stays closed without being told so again."""

_SAMPLED = f"-m statistic --mode nth --every {SAMPLE} --packet 0"


def thin_set(family: int, index: int) -> str:
    """Return the name of the set of a worker, counted from 0, in an address family."""
    return f"{set_name('thin', family)}-{index}"


def syns(ruleset: RuleSet, family: int, index: int, to_queue: str) -> tuple[str, ...]:
    """Return the chain of the new SYNs of a worker's sources.  Pure."""
    limits = service_limits(ruleset, family, to_queue) if ruleset.enforce else ()
    drops = ruleset.enforce and not ruleset.fail_open
    return (
        _usually(family, index, to_queue),
        f"-m mark --mark {Marks(ruleset.marks).to_queue_proven} {to_queue}",
        f"{_SAMPLED} {to_queue}",
        f"-m set --match-set {set_name('protected', family)} src {to_queue}",
        *limits,
        "-j DROP" if drops else "-j RETURN",
    )


def service_limits(ruleset: RuleSet, family: int, to_queue: str) -> tuple[str, ...]:
    """Return the rules that drop what spares the queue but is more than a service may get.

    The kernel counts that apart from the engine, so a service gets its limit, and what comes
    through the queue besides.  Whom a rule excepts goes to the queue, where all rules are known.
    """
    rules: list[str] = []
    for rule in ruleset.rules:
        if not rule.limits_service or not rule.countable:
            continue
        to = [f"-d {prefix} " for prefix in rule.destinations if _is_of(prefix, family)]
        if rule.destinations and not to:
            continue
        excepted = [prefix for prefix in rule.excepted if _is_of(prefix, family)]
        rules += [f"-s {prefix} {to_queue}" for prefix in excepted]
        limit = _limit(rule, family)
        rules += [
            where + match + limit for where in to or [""] for match in ports_named(rule.ports)
        ]
    return tuple(rules)


def _is_of(prefix: Prefix, family: int) -> bool:
    return is_v6(prefix.network) is (family == 6)


def _limit(rule: Rule, family: int) -> str:
    table = table_of(rule, family, f"-of-{rule.per.value}")
    return (
        f"-m hashlimit --hashlimit-above {rule.limit}/{UNITS[rule.period]}"
        f" --hashlimit-burst {rule.burst} {kept_in(rule, family, table)} -j DROP"
    )


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
    for family, prefixes in EVERYTHING.items():
        sets.put(thin_set(family, index), prefixes, SECONDS)


def restore(sets: ElementSets, index: int) -> None:
    """Let all SYNs into a worker's queue again.

    Raises:
        KernelError: the kernel refused.
    """
    for family, prefixes in EVERYTHING.items():
        sets.take(thin_set(family, index), prefixes)
