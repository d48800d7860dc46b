"""What is allowed in a policy, but is probably not what its author meant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from rstguard.engine.address import Networks
from rstguard.engine.ruleset import FORGEABLE, NEVER_BANS, Measure
from rstguard.policy.base import Widths
from rstguard.policy.explain import Finding
from rstguard.policy.model import Policy, is_wide
from rstguard.policy.quantities import HOUR, MINUTE, PortRange, expand, ports_text
from rstguard.policy.rules import (
    AnyRule,
    IdleRule,
    PacketRateRule,
    ShortConnectionsRule,
    SlowRule,
    SourceRule,
)

_ONE_SIDE_SUFFICES: Final = frozenset(
    {Measure.SYN_RATE, Measure.DISTINCT_PORTS, Measure.DISTINCT_HOSTS, Measure.BAD_FLAGS}
)
"""What is counted of clients whose service is not seen to answer."""


_WEB: Final = frozenset({80, 443, 8080, 8443})
_ENCRYPTED: Final = 443
_UNPINGED: Final = 10 * MINUTE
"""Servers and proxies ping a WebSocket every 30 seconds to some minutes, if they do."""
_NORMAL: Final = {Measure.IDLE: HOUR, Measure.SLOW: HOUR, Measure.AGE: 24 * HOUR}
"""Up to which limit a rule on single connections meets those that are normal on the web."""

Around = Callable[[Policy], Iterable[Finding]]
"""Tells what of a policy cannot match where this machine stands."""


def check(
    policy: Policy, around: Around | None = None, one_sided: Collection[str] = ()
) -> list[Finding]:
    """Return the warnings for a policy; pure, if `around` is.

    Args:
        policy: a valid policy.
        around: looks at this machine, or None not to look at that.
        one_sided: services of which a guard here sees only one side.
    """
    findings = list(_protect(policy))
    if around is not None:
        findings += around(policy)
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
    if policy.protect.ports is None or _ENCRYPTED in expand(policy.protect.ports):
        message = "TCP alone is guarded: UDP 443 (HTTP/3), if something serves it, is not"
        findings.append(Finding(("protect",), message, note=True))
    findings += _narrow(policy.source, ("source", "ipv6"))
    for index, rule in enumerate(policy.rules):
        findings += _rule(policy, index, rule)
    return findings


def _protect(policy: Policy) -> Iterator[Finding]:
    for index, name in enumerate(policy.protect.interfaces):
        if name == "*":
            path = ("protect", "interfaces", index)
            yield Finding(path, "this covers every interface, the loopback too")


def _one_sided(policy: Policy, services: Collection[str]) -> Finding:
    blind = [rule.name for rule in policy.rules if Measure(rule.measure) not in _ONE_SIDE_SUFFICES]
    rules = f", so these rules cannot act on it: {', '.join(blind)}" if blind else ""
    seen = ", ".join(services)
    message = f"only one side is seen of {seen}: its answers do not pass this machine{rules}"
    return Finding(("protect",), message)


def _rule(policy: Policy, index: int, rule: AnyRule) -> Iterator[Finding]:
    yield from _ports(policy, rule.ports, ("rules", index, "ports"), "the rule")
    yield from _destinations(policy, index, rule)
    measure = Measure(rule.measure)
    if rule.then == "ban" and measure in FORGEABLE:
        yield Finding(("rules", index, "then"), _what_bans(measure), note=True)
    acts = rule.then in ("reset", "ban") and rule.when != "pressed"
    if isinstance(rule, IdleRule | SlowRule) and acts:
        yield from _normal(policy, index, rule)
    if isinstance(rule, ShortConnectionsRule) and rule.then in ("drop", "reset"):
        message = f"{rule.then} comes too late: the connection is over when it counts; use `ban`"
        yield Finding(("rules", index, "then"), message)
    if not isinstance(rule, SourceRule | PacketRateRule) or not isinstance(rule.per, Widths):
        return
    yield from _narrow(rule.per, ("rules", index, "per", "ipv6"))
    if rule.then == "ban" and (rule.per.ipv4 < 16 or rule.per.ipv6 < 32):
        message = "one offender bans a whole network this wide: use `then: drop`, or count narrower"
        yield Finding(("rules", index, "per"), message)


def _normal(policy: Policy, index: int, rule: IdleRule | SlowRule) -> Iterator[Finding]:
    """Tell of a rule that ends what is normal at web ports, as nobody sees whether it is attacked.

    Who names such a port has meant it, and is told what it costs; else it is a warning, unless the
    limit is so long that hardly anything is met.
    """
    measure, ranges = Measure(rule.measure), rule.ports or policy.protect.ports
    limit = rule.after if isinstance(rule, SlowRule) else rule.over
    web = _WEB if ranges is None else _WEB & expand(ranges)
    if not web or limit >= _NORMAL[measure]:
        return
    key = "after" if isinstance(rule, SlowRule) else "over"
    normal = {
        Measure.IDLE: "WebSockets and long polls that are not pinged",
        Measure.SLOW: "idle WebSockets, long polls and event streams, even if they are pinged",
        Measure.AGE: "WebSockets, event streams and long downloads",
    }[measure]
    message = (
        f"at {'port' if len(web) == 1 else 'ports'} {ports_text(web)} this ends {normal}: name the "
        "rule's ports without those that serve such, or write a longer time"
    )
    meant = rule.ports is not None or (measure is not Measure.SLOW and limit >= _UNPINGED)
    yield Finding(("rules", index, key), message, note=meant)


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


def _destinations(policy: Policy, index: int, rule: AnyRule) -> Iterator[Finding]:
    """Name destinations of a rule that the policy does not protect."""
    protected = policy.protect.destinations
    if not protected:
        return
    for place, prefix in enumerate(rule.destinations):
        if not Networks(protected).meets(prefix):
            path = ("rules", index, "destinations", place)
            yield Finding(path, f"the rule never matches {prefix}: protect.destinations lacks it")


def _narrow(widths: Widths, path: tuple[str | int, ...]) -> Iterator[Finding]:
    if widths.ipv6 > 64:
        message = f"one host usually owns a whole /64: counting by /{widths.ipv6} is easy to evade"
        yield Finding(path, message)
