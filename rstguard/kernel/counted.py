"""Reads what the kernel counted by itself: how near sources are to the limits it counts for."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Final

from rstguard.engine.address import parse_address
from rstguard.engine.keys import key_of
from rstguard.engine.nearest import MOST_TRUSTED, Near, told
from rstguard.engine.ruleset import OF_NO_CONNECTION, Rule, RuleSet
from rstguard.kernel import limiting
from rstguard.kernel.counting import RETURNED, table_of

LARGEST: Final = 1 << 20
"""Bytes that are read of a table at most: some 16,000 sources, as they come."""
_TABLES: Final = {4: Path("/proc/net/ipt_hashlimit"), 6: Path("/proc/net/ip6t_hashlimit")}


def nearest(ruleset: RuleSet, most: int) -> list[Near]:
    """Return who has used the most of the limits that the kernel counts for."""
    found: list[Near] = []
    for rule in _counted(ruleset):
        best = nlargest(most + MOST_TRUSTED, _shares(rule), key=itemgetter(1))
        found += told(best, rule, ruleset.scope)
    return found


def explain(ruleset: RuleSet, source: int) -> dict[str, float]:
    """Return how much of them a source (a tagged address) has used, as far as the kernel knows."""
    used: dict[str, float] = {}
    for rule in _counted(ruleset):
        key = key_of(rule, source)
        shares = [share for its_key, share in _shares(rule) if its_key == key]
        if shares:
            used[rule.name] = max(shares)
    return used


def _counted(ruleset: RuleSet) -> Iterator[Rule]:
    """Return the rules of which the kernel keeps a count for each source.

    Of RSTs it lets pass what a worker must see: that one counts them.
    """
    if ruleset.kernel_rule:
        yield ruleset.kernel_rule
    for measure in OF_NO_CONNECTION:
        of_sources = (rule for rule in ruleset.kept_by_kernel(measure) if not rule.of_target)
        yield from of_sources


def _tables_of(rule: Rule, family: int) -> tuple[str, ...]:
    if rule.measure in OF_NO_CONNECTION:
        return (limiting.table_of(rule, family),)
    return tuple(table_of(rule, family) + end for end in ("", RETURNED))


def _shares(rule: Rule) -> Iterator[tuple[int, float]]:
    for family, directory in _TABLES.items():
        for name in _tables_of(rule, family):
            try:
                with (directory / name).open("rb") as file:
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
