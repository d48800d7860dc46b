"""Who has used most of a limit: found in a big table without holding up who counts in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import nlargest
from operator import attrgetter
from typing import NamedTuple

from rstguard.engine.address import Prefix, source_of_key
from rstguard.engine.flow import endpoint
from rstguard.engine.ruleset import Per, Rule, Scope

_PIECE = 256
"""Keys of a table that are looked at one by one if the largest of them is among the largest."""


MOST_TRUSTED = 16
"""How many more are to be found, so that trusted sources with much use hide no others."""


class Near(NamedTuple):
    """A source, prefix or service as people write it, and how much of a rule's limit it has used.

    `used` is 1 at the limit, and more beyond it.
    """

    rule: str
    subject: str
    used: float


def largest(table: dict[int, int], most: int) -> list[tuple[int, int]]:
    """Return the keys with the largest values, with them, at most so many; the largest first.

    The largest values are in the pieces with the largest maxima, and `max` runs at C's speed: it
    takes a tenth of looking at every key if each is larger than the last, as times are.
    """
    keys, values = list(table), list(table.values())
    starts = range(0, len(keys), _PIECE)
    maxima = [(max(values[start : start + _PIECE]), start) for start in starts]
    found = [
        (value, key)
        for _, start in nlargest(most, maxima)
        for value, key in zip(
            values[start : start + _PIECE], keys[start : start + _PIECE], strict=True
        )
    ]
    return [(key, value) for value, key in nlargest(most, found)]


def prefix_of_key(rule: Rule, key: int) -> Prefix:
    """Return the source, prefix or destination that a rule counts under a key."""
    return source_of_key(key, rule.ipv4_length, rule.ipv6_length)


def subject_of_key(rule: Rule, key: int) -> str:
    """Return whom or what a rule counts under a key, as people write it."""
    if rule.per is Per.SERVICE:
        return endpoint(key >> 16, key & 0xFFFF)
    prefix = str(prefix_of_key(rule, key))
    return f"to {prefix}" if rule.per is Per.DESTINATION else prefix


def told(found: Iterable[tuple[int, float]], rule: Rule, scope: Scope) -> Iterator[Near]:
    """Name those that were found; to trusted ones no limit applies, so they are left out."""
    for key, used in found:
        if rule.of_target or not _is_trusted(prefix_of_key(rule, key), scope):
            yield Near(rule.name, subject_of_key(rule, key), used)


def _is_trusted(prefix: Prefix, scope: Scope) -> bool:
    return any(one.length <= prefix.length and one.covers(prefix.network) for one in scope.trusted)


def merged(found: Iterable[Near], most: int) -> tuple[Near, ...]:
    """Return the nearest of each rule, at most so many, the nearest of all first.

    Who was found more than once counts with the most.
    """
    best: dict[tuple[str, str], Near] = {}
    for near in found:
        if near.used > 0 and near.used >= best.get(near[:2], near).used:
            best[near[:2]] = near
    by_rule: dict[str, list[Near]] = {}
    for near in sorted(best.values(), key=attrgetter("used"), reverse=True):
        by_rule.setdefault(near.rule, []).append(near)
    kept = [near for of_rule in by_rule.values() for near in of_rule[:most]]
    return tuple(sorted(kept, key=attrgetter("used"), reverse=True))
