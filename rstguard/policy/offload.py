"""Which rules the kernel counts for by itself, so that what is within the limit needs no queue.

The action stays with the engine: what the kernel finds to be one too many is diverted to it, with a
mark that says so, and meets the same code as what the engine counts itself.  So a rule is handed
over only where the kernel's count is the engine's:

- `syn_rate` by hashlimit, whose token bucket is the engine's.  There must be a SYN budget, or a
  forged flood would be more than the kernel's table can hold, and come to the engine after all.
- `connections` stays with the sweep.  connlimit adds a connection to its list with its SYN only,
  which anybody can forge.  Asked at the first ACK, it adds nothing since Linux 6.19 and the stable
  kernels of that time, and drops the ACK if the list is empty by then: tried on 6.18.44
  (__nf_conncount_add in net/netfilter/nf_conncount.c, connlimit_mt in xt_connlimit.c).
"""

from __future__ import annotations

from dataclasses import replace

from rstguard.engine.ruleset import NEEDS, PERIODS, SECOND, Divert, Measure, Rule, RuleSet
from rstguard.engine.verdict import Action

_LARGEST_RATE = 10_000
"""SYNs in a period up to which hashlimit's rate is exact to a hundredth."""
_LARGEST_BURST = 10_000
_MOST_SOURCES = 1 << 16
"""SYNs of one service, at the budget's rate, while an entry lives.

The kernel's table has room for a dozen services that are flooded at once; what more there is goes
to the engine.
"""


def offload(ruleset: RuleSet) -> RuleSet:
    """Return the policy with the rules marked that the kernel counts for."""
    rules = tuple(
        replace(rule, in_kernel=_measured(rule) and not _obstacle(ruleset, rule))
        for rule in ruleset.rules
    )
    return replace(ruleset, rules=rules)


def why_not(ruleset: RuleSet, rule: Rule) -> str:
    """Return why the kernel does not count for a rule whose measure it knows, "" if it does."""
    if rule.in_kernel or not _measured(rule):
        return ""
    return _obstacle(ruleset, rule) or "the policy says `offload: never`"


def _measured(rule: Rule) -> bool:
    return rule.measure in (Measure.SYN_RATE, Measure.CONNECTIONS)


def _own_obstacle(rule: Rule) -> str:
    if rule.measure is Measure.CONNECTIONS:
        return "the kernel counts a connection from its SYN on, which can be forged"
    if rule.of_target:
        return f"it counts per {rule.per.value}"
    if rule.unless is not None:
        return "the kernel does not know which sources are productive"
    if rule.ports is not None:
        return "it is for some ports only"
    if rule.is_partial:
        return "it is for some destinations or sources only"
    return ""


def _obstacle(ruleset: RuleSet, rule: Rule) -> str:
    """Return the first thing that stands in the way, or ""."""
    if said := _own_obstacle(rule):
        return said
    if not ruleset.enforce or rule.action is Action.OBSERVE:
        return "it only observes"
    if any(other.measure is rule.measure and other != rule for other in ruleset.rules):
        return "another rule has the same measure"
    if rule.action is Action.BAN:
        return "a shunned source would come back with a full burst"
    for other in ruleset.rules:
        if other != rule and Divert.SYN in NEEDS.get(other.measure, ()):
            return f"rule {other.name} needs every SYN in the queue"
    budget = ruleset.syn_budget
    if budget is None or budget.rate is None:
        return "without a rate in the SYN budget forged sources could fill the kernel's table"
    if rule.period not in PERIODS or rule.limit > _LARGEST_RATE or rule.burst > _LARGEST_BURST:
        return "the kernel cannot count at this rate exactly"
    if budget.rate * max(rule.refill, SECOND) > _MOST_SOURCES * SECOND:
        return "at the budget's rate the kernel's table could fill up"
    return ""
