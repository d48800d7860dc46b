"""The rate of a SYN budget: above it the kernel answers a service's SYNs with cookies.  Pure.

The other half of a budget, handshakes that are still open, is `rstguard.kernel.half_open`.

In raw PREROUTING hashlimit counts the SYNs of each service.  With --hashlimit-rate-match it is a
switch, not a valve (rateinfo_recalc in net/netfilter/xt_hashlimit.c): over the rate within the
running second or in the last one, *every* SYN matches.  Those are noted in the set rstguard-engaged
and kept from the tracker; what then becomes of them is told in `rstguard.kernel.cookies`.
"""

from __future__ import annotations

from rstguard.engine.ruleset import RuleSet
from rstguard.kernel.counting import LARGEST_RATE, gate, table_size
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.services import Services

ENGAGED_SECONDS = 60
"""How long after its last cookie a service's ACKs are still searched for cookies."""
_BOUND_SECONDS = 2
"""How long the count of a service without cookies is kept after its last SYN."""


def in_force(ruleset: RuleSet) -> bool:
    """Tell whether the policy has a budget that may act: one that observes changes nothing."""
    return ruleset.syn_budget is not None and ruleset.enforce


def has_rate(ruleset: RuleSet) -> bool:
    """Tell whether it is one of SYNs a second, also."""
    budget = ruleset.syn_budget
    return budget is not None and budget.rate is not None and ruleset.enforce


def engaged_set(family: int) -> str:
    """Return the name of the set of services that were lately over budget."""
    return set_name("engaged", family)


def has_count(ruleset: RuleSet) -> bool:
    """Tell whether it is one of open handshakes, also."""
    budget = ruleset.syn_budget
    return budget is not None and budget.half_open is not None and ruleset.enforce


def full_set(family: int) -> str:
    """Return the name of the set of services with too many open handshakes at present."""
    return set_name("full", family)


def engaged(family: int) -> str:
    """Match what goes to such a service."""
    return f"-m set --match-set {engaged_set(family)} dst,dst"


def budget(services: Services) -> tuple[str, ...]:
    """Only SYNs come here.  Who is blocked or trusted goes the usual way."""
    rate, ports = _rate(services)
    # A table lives on with its old rate under its name: another rate needs another name.
    table = f"{PREFIX}{services.family}-{rate}"
    over = (
        f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst 1"
        f" --hashlimit-mode dstip,dstport --hashlimit-name {table}"
        f" --hashlimit-rate-match --hashlimit-rate-interval 1 -j {PREFIX}-over"
    )
    return (
        *exempt(services),
        *services.untranslated.for_each(over, ports=ports),
        *services.translated.for_each(f"{over}-dnat", ports=ports),
    )


def exempt(services: Services) -> tuple[str, ...]:
    """Return the rules by which SYNs go the usual way that no budget is for."""
    ruleset, names = services.ruleset, []
    if ruleset.scope.trusted:
        names.append("trusted")
    if ruleset.blocking != "drop":  # they are answered later, in the filter table
        names += ["ban", "gate"]
    if ruleset.blocking != "drop" or ruleset.challenge:  # or by a cookie
        names.append("shun")
    return tuple(f"{services.in_set(name)} -j RETURN" for name in names)


def over(services: Services) -> tuple[str, ...]:
    """The SYNs above the budget, where nothing translates them."""
    return (note(services), "-j CT --notrack")


def note(services: Services) -> str:
    """Return the rule that notes that a service is over its budget."""
    add = f"-j SET --add-set {engaged_set(services.family)} dst,dst --exist"
    return f"{add} --timeout {ENGAGED_SECONDS}"


def bound(services: Services) -> tuple[str, ...]:
    """The SYNs of a service without cookies that are too many for the queue.

    The engine does not see them; they pass or not as when it is overrun.  So do those that are
    too many for the table.  Where every port is protected a host counts as one service.
    """
    ruleset = services.ruleset
    rate, _ = _rate(services)
    mode = "dstip" if ruleset.scope.ports is None else "dstip,dstport"
    verdict = "RETURN" if ruleset.fail_open else "DROP"
    name = f"{PREFIX}{services.family}-queue"
    rule = (
        f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst {rate}"
        f" --hashlimit-mode {mode} --hashlimit-name {name}-{rate}"
        f" {table_size(_BOUND_SECONDS)} -j {verdict}"
    )
    return (f"{gate(f'{name}-all', _BOUND_SECONDS)} -j {verdict}", rule)


def _rate(services: Services) -> tuple[int, frozenset[int] | None]:
    found = services.ruleset.syn_budget
    assert found is not None
    assert found.rate is not None
    return min(found.rate, LARGEST_RATE), found.ports
