"""What sources showed of a rule's measure, summed up: how many showed how much, and who most.

So much is enough to propose a limit, and it is small however many sources there were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from rstguard.engine.address import prefix_of
from rstguard.engine.keys import key_of
from rstguard.engine.nearest import subject_of_key
from rstguard.engine.ruleset import Measure, Rule, RuleSet

HIGHEST = 3
"""Sources that are named."""
_DIGITS = 3


class Shown(NamedTuple):
    """How many sources showed an amount: `(amount, productive ones, all others)`, by amount.

    Amounts have three digits, rounded away from what is harmless.  `highest` are the sources that
    showed most (of `slow`: least), with the productive ones first among equals.
    """

    amounts: tuple[tuple[int, int, int], ...]
    highest: tuple[tuple[str, int], ...]


def sum_up(rule: Rule, shown: Mapping[int, int], productive: Iterable[int]) -> Shown:
    """Sum up a gauge; `productive` are addresses, or the networks of `Breadth.of` them."""
    good = _keys(rule, shown, productive)
    least = rule.measure is Measure.SLOW
    counted: dict[int, list[int]] = {}
    for key, amount in shown.items():
        counted.setdefault(_coarse(amount, down=least), [0, 0])[key not in good] += 1
    sign = 1 if least else -1
    order = sorted(shown.items(), key=lambda i: (sign * i[1], i[0] not in good, i[0]))
    return Shown(
        tuple((amount, counts[0], counts[1]) for amount, counts in sorted(counted.items())),
        tuple((subject_of_key(rule, key), amount) for key, amount in order[:HIGHEST]),
    )


def _keys(rule: Rule, shown: Mapping[int, int], productive: Iterable[int]) -> Collection[int]:
    """Return the keys of a gauge that belong to productive sources; all, if it is per target."""
    if rule.of_target:
        return shown.keys()
    return {key_of(rule, source) for source in productive} & shown.keys()


def _coarse(amount: int, *, down: bool) -> int:
    """Return an amount with its first digits alone, so that there are not too many of them."""
    scale = int(10 ** max(0, len(str(amount)) - _DIGITS))
    return amount // scale * scale if down else -(-amount // scale) * scale


class Breadth:
    """How much of an address tells all sources of a policy apart that any rule counts.

    With `source_only` it is the policy's own width of a source.
    """

    def __init__(self, ruleset: RuleSet, *, source_only: bool = False) -> None:
        counting = () if source_only else ruleset.rules
        rules = [rule for rule in counting if not rule.of_target]
        self._ipv4 = max([ruleset.source_ipv4, *(rule.ipv4_length for rule in rules)])
        self._ipv6 = max([ruleset.source_ipv6, *(rule.ipv6_length for rule in rules)])

    def of(self, address: int) -> int:
        """Return the network of an address (both tagged integers)."""
        return prefix_of(address, self._ipv4, self._ipv6).network
