"""Reads what the kernel counted by itself: how near sources are to the limit it counts for."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Final

from rstguard.engine.address import parse_address
from rstguard.engine.keys import key_of
from rstguard.engine.nearest import MOST_TRUSTED, Near, told
from rstguard.engine.ruleset import Rule, RuleSet
from rstguard.kernel.counting import RETURNED, table_of

LARGEST: Final = 1 << 20
"""Bytes that are read of a table at most: some 16,000 sources, as they come."""
_TABLES: Final = {4: Path("/proc/net/ipt_hashlimit"), 6: Path("/proc/net/ip6t_hashlimit")}


def nearest(ruleset: RuleSet, most: int) -> list[Near]:
    """Return who has used the most of the limit that the kernel counts for; none if it does not."""
    rule = ruleset.kernel_rule
    if rule is None:
        return []
    best = nlargest(most + MOST_TRUSTED, _shares(rule), key=itemgetter(1))
    return list(told(best, rule, ruleset.scope))


def explain(ruleset: RuleSet, source: int) -> dict[str, float]:
    """Return how much of it a source (a tagged address) has used, if the kernel knows of it."""
    rule = ruleset.kernel_rule
    if rule is None:
        return {}
    key = key_of(rule, source)
    shares = [share for its_key, share in _shares(rule) if its_key == key]
    return {rule.name: max(shares)} if shares else {}


def _shares(rule: Rule) -> Iterator[tuple[int, float]]:
    tables = ((family, end) for family in _TABLES for end in ("", RETURNED))
    for family, end in tables:
        try:
            with (_TABLES[family] / (table_of(rule, family) + end)).open("rb") as file:
                text = file.read(LARGEST).decode()
        except OSError:
            continue  # no rule of the family is in place
        yield from filter(None, (_share(rule, line) for line in text.splitlines()))


def _share(rule: Rule, line: str) -> tuple[int, float] | None:
    """Read a line: seconds left, source and target, then credit, its most, and one packet's cost.

    The kernel works out the credit of the moment when it is read (dl_seq_real_show in
    net/netfilter/xt_hashlimit.c).
    """
    words = line.split()
    if len(words) != 5:
        return None  # cut off
    credit, all_of_it = int(words[2]), int(words[3])
    if credit >= all_of_it:
        return None
    source = parse_address(words[1].partition("->")[0].rpartition(":")[0])
    return key_of(rule, source), 1 - credit / all_of_it
