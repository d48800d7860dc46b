"""How many connections a source may hold: a rule's limit, which is wider for some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rstguard.engine.ruleset import Rule


class Lenience(NamedTuple):
    """Whose limits are wider.

    `percents` is how productive sources are (`rstguard.engine.lenient`), by the keys that rules
    count them by; `large` is how many connections keys of a rule may hold because of a large
    source (`rstguard.engine.large`).
    """

    percents: Mapping[int, int]
    large: Mapping[Rule, Mapping[int, int]]


def limit_of(rule: Rule, key: int, lenience: Lenience) -> int:
    """Return a rule's limit for a source of this key: wider if it is productive, or large."""
    limit = rule.limit
    if rule.unless is not None and lenience.percents.get(key, 0) >= rule.unless.productive:
        limit *= rule.unless.up_to
    if not lenience.large:  # as nearly always: it takes longer to find a rule than all else
        return limit
    large = lenience.large.get(rule)
    return max(limit, large.get(key, 0)) if large else limit
