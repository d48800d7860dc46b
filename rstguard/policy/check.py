"""What is allowed in a policy, but is probably not what its author meant."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Final

from rstguard.engine.ruleset import FORGEABLE, NEVER_BANS, Measure
from rstguard.policy.base import Widths
from rstguard.policy.explain import Finding
from rstguard.policy.model import Policy, is_wide
from rstguard.policy.quantities import PortRange, expand, ports_text
from rstguard.policy.rules import AnyRule, ShortConnectionsRule, SourceRule

_ONE_SIDE_SUFFICES: Final = frozenset(
    {Measure.SYN_RATE, Measure.DISTINCT_PORTS, Measure.DISTINCT_HOSTS, Measure.BAD_FLAGS}
)
"""What is counted of clients whose service is not seen to answer."""


def check(
    policy: Policy, interfaces: Collection[str] | None = None, one_sided: Collection[str] = ()
) -> list[Finding]:
    """Return the warnings for a policy; pure.

    Args:
        policy: a valid policy.
        interfaces: names of the interfaces that exist, or None not to look at that.  A mapping says
            of each why no packet can be seen to come in by it, or "".
        one_sided: services of which a guard here sees only one side.
    """
    findings = list(_protect(policy, interfaces))
    if one_sided:
        findings.append(_one_sided(policy, one_sided))
    if not policy.rules:
        findings.append(Finding(("rules",), "there is no rule, so nothing will be guarded"))
    for index, prefix in enumerate(policy.trusted):
        if is_wide(prefix):
            message = f"{prefix} is a large part of all addresses: nobody in it will be guarded"
            findings.append(Finding(("trusted", index), message))
    if policy.syn_budget is not None:
        path = ("syn_budget", "ports")
        findings += _ports(policy, policy.syn_budget.ports, path, "the budget")
    findings += _narrow(policy.source, ("source", "ipv6"))
    for index, rule in enumerate(policy.rules):
        findings += _rule(policy, index, rule)
    return findings


def _protect(policy: Policy, interfaces: Collection[str] | None) -> Iterator[Finding]:
    for index, name in enumerate(policy.protect.interfaces):
        path = ("protect", "interfaces", index)
        if name == "*":
            yield Finding(path, "this covers every interface, the loopback too")
        elif interfaces is not None and not _exists(name, interfaces):
            yield Finding(path, f"there is no interface {name} here now: is the name right?")
        if isinstance(interfaces, Mapping):
            for complaint in (
                interfaces[there] for there in interfaces if fnmatchcase(there, name)
            ):
                if complaint:
                    yield Finding(path, complaint)


def _one_sided(policy: Policy, services: Collection[str]) -> Finding:
    blind = [rule.name for rule in policy.rules if Measure(rule.measure) not in _ONE_SIDE_SUFFICES]
    rules = f", so these rules cannot act on it: {', '.join(blind)}" if blind else ""
    seen = ", ".join(services)
    message = f"only one side is seen of {seen}: its answers do not pass this machine{rules}"
    return Finding(("protect",), message)


def _exists(name: str, interfaces: Collection[str]) -> bool:
    if name.endswith("*"):
        return any(there.startswith(name[:-1]) for there in interfaces)
    return name in interfaces


def _rule(policy: Policy, index: int, rule: AnyRule) -> Iterator[Finding]:
    yield from _ports(policy, rule.ports, ("rules", index, "ports"), "the rule")
    measure = Measure(rule.measure)
    if rule.then == "ban" and measure in FORGEABLE:
        yield Finding(("rules", index, "then"), _what_bans(measure))
    if isinstance(rule, ShortConnectionsRule) and rule.then in ("drop", "reset"):
        message = f"{rule.then} comes too late: the connection is over when it counts; use `ban`"
        yield Finding(("rules", index, "then"), message)
    if not isinstance(rule, SourceRule) or not isinstance(rule.per, Widths):
        return
    yield from _narrow(rule.per, ("rules", index, "per", "ipv6"))
    if rule.then == "ban" and (rule.per.ipv4 < 16 or rule.per.ipv6 < 32):
        message = "one offender bans a whole network this wide: use `then: drop`, or count narrower"
        yield Finding(("rules", index, "per"), message)


def _what_bans(measure: Measure) -> str:
    """Say what a rule bans by that counts packets which anybody can forge."""
    sentence = "anybody can send this in another's name, so the rule "
    if measure in NEVER_BANS:
        return f"{sentence}shuns and never bans"
    by = "RSTs of proven connections" if measure is Measure.RESET_RATE else "returned SYN cookies"
    return f"{sentence}bans only over {by}, and shuns otherwise"


def _ports(
    policy: Policy,
    ranges: tuple[PortRange, ...] | None,
    path: tuple[str | int, ...],
    whose: str,
) -> Iterator[Finding]:
    if ranges is None or policy.protect.ports is None:
        return
    wanted = expand(ranges)
    outside = wanted - expand(policy.protect.ports)
    if outside == wanted:
        yield Finding(path, f"{whose} never matches: protect.ports has none of these ports")
    elif outside:
        message = f"{whose} never matches {ports_text(outside)}: protect.ports lacks them"
        yield Finding(path, message)


def _narrow(widths: Widths, path: tuple[str | int, ...]) -> Iterator[Finding]:
    if widths.ipv6 > 64:
        message = f"one host usually owns a whole /64: counting by /{widths.ipv6} is easy to evade"
        yield Finding(path, message)
