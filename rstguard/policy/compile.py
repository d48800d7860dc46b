"""Turn a policy into the plain values the engine and the chains read.  Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rstguard.engine.address import Prefix
from rstguard.engine.ruleset import (
    OF_NO_CONNECTION,
    RATE_MEASURES,
    SECOND,
    SWEEP_MEASURES,
    Divert,
    Escalate,
    Measure,
    Per,
    Rule,
    RuleSet,
    Scope,
    SynBudget,
    Unless,
    needs,
)
from rstguard.engine.shares import DEFAULT_SHARES, Shares
from rstguard.engine.verdict import Action, Ends
from rstguard.policy import model, rules
from rstguard.policy.base import DestinationWidths, Widths
from rstguard.policy.model import Policy
from rstguard.policy.offload import offload, why_not
from rstguard.policy.quantities import PortRange, duration_text, expand, ports_text

_OF_ONE_CONNECTION = frozenset(
    {Measure.SLOW, Measure.STALLED, Measure.IDLE, Measure.AGE, Measure.UNANSWERED}
)


def compile_policy(policy: Policy) -> RuleSet:
    """Return the compiled form of a valid policy."""
    protect, budget = policy.protect, policy.syn_budget
    ruleset = RuleSet(
        name=policy.name,
        enforce=policy.mode == "enforce",
        fail_open=policy.on_failure == "open",
        scope=Scope(
            interfaces=protect.interfaces,
            destinations=protect.destinations,
            ports=_ports(protect.ports),
            trusted=policy.trusted,
        ),
        rules=tuple(_rule(rule, policy.source) for rule in policy.rules),
        source_ipv4=policy.source.ipv4,
        source_ipv6=policy.source.ipv6,
        inspect_packets=policy.inspect.packets,
        syn_budget=_budget(budget) if budget else None,
        blocking=policy.blocking,
        covers_all=policy.ban_covers == "everything",
        challenge=policy.shun == "challenge",
        shun_duration=policy.shun_for,
        sweep_every=policy.sweep_every,
        bans_per_minute=policy.bans_per_minute,
        marks=policy.marks,
        labels=policy.labels,
        forged_resets=policy.forged_resets,
        forged_fins=policy.forged_fins == "hold",
        reset_exempt=policy.reset_exempt,
        strip_mptcp=policy.mptcp == "strip",
        least_ttl=policy.least_ttl,
        spoofed_after=policy.drop_spoofed_after,
        drops_spoofed=policy.drop_spoofed_after == 0,
        capacity=tuple(sorted(policy.pressure.capacity.items())),
        shares=_shares(policy.large_sources),
    )
    return offload(ruleset) if policy.offload == "auto" else ruleset


def _shares(large: model.LargeSources) -> Shares:
    return Shares(large.share, large.after, large.ordinary)


def _budget(budget: model.SynBudget) -> SynBudget:
    return SynBudget(budget.rate, _ports(budget.ports), budget.half_open)


def _ports(ranges: tuple[PortRange, ...] | None) -> frozenset[int] | None:
    return None if ranges is None else expand(ranges)


def _rule(rule: rules.AnyRule, source: Widths) -> Rule:
    per = rule.per if isinstance(rule, rules.SourceRule | rules.PacketRateRule) else None
    counted, widths = _counted(per, source)
    more = rule.escalate
    common = Rule(
        name=rule.name,
        measure=Measure(rule.measure),
        action=Action[rule.then.upper()],
        limit=0,
        ports=_ports(rule.ports),
        destinations=rule.destinations,
        excepted=rule.excepted,
        per=counted,
        ipv4_length=widths.ipv4,
        ipv6_length=widths.ipv6,
        duration=rule.ban_for or 0,
        escalate=Escalate(more.factor, more.up_to, more.memory) if more else None,
        keep_existing=rule.keep_existing,
        ends=Ends(rule.ends),
        unless=_unless(rule),
        when_pressed=rule.when == "pressed",
    )
    return _limited(common, rule)


def _counted(per: rules.Counted, source: Widths) -> tuple[Per, Widths]:
    """Return what a rule counts by, and how wide one of it is."""
    if isinstance(per, DestinationWidths):
        return Per.DESTINATION, Widths(ipv4=per.destination_ipv4, ipv6=per.destination_ipv6)
    if isinstance(per, Widths):
        return Per.PREFIX, per
    if per is None:
        return Per.SOURCE, source
    return Per(per), source


def _unless(rule: rules.AnyRule) -> Unless | None:
    written = getattr(rule, "unless", None)
    return Unless(written.productive, written.up_to) if written else None


def _limited(common: Rule, rule: rules.AnyRule) -> Rule:
    """Add what only this measure has.

    A rate's default burst is what it allows in one of its own periods: a second's worth of
    `100/s`, and ten at once of `10/m`, where a second's worth would object to the second event.
    """
    match rule:
        case rules.RateRule() | rules.ShortConnectionsRule() | rules.PacketRateRule():
            rated = replace(
                common,
                limit=rule.over.amount,
                period=rule.over.period,
                burst=rule.burst or rule.over.amount,
            )
            if isinstance(rule, rules.ShortConnectionsRule):
                return replace(rated, shorter_than=rule.shorter_than)
            return rated
        case rules.ByteRateRule():
            return replace(common, limit=rule.over, period=SECOND, burst=rule.burst or rule.over)
        case rules.HalfOpenRule() | rules.DistinctRule():
            return replace(common, limit=rule.over, within=rule.within)
        case rules.SlowRule():
            return replace(
                common,
                limit=rule.under,
                after=rule.after,
                of=rule.of,
                over_last=rule.over_last or 0,
            )
        case rules.StalledRule():
            return replace(common, limit=rule.over, window=rule.window)
        case rules.ConnectionsRule() | rules.IdleRule() | rules.UnansweredRule():
            return replace(common, limit=rule.over)


def tier_of(rule: Rule) -> str:
    """Return which tier enforces a rule: kernel, queue or sweep."""
    if rule.in_kernel:
        return "kernel"
    return "sweep" if rule.measure in SWEEP_MEASURES else "queue"


def describe(ruleset: RuleSet) -> str:
    """Return the compiled form in lines for people: what is guarded, counted, and looked at."""
    return "\n".join([*_head(ruleset), "", *_rules(ruleset), "", *_tiers(ruleset)]) + "\n"


def _head(ruleset: RuleSet) -> Iterator[str]:
    scope = ruleset.scope
    does = "enforces" if ruleset.enforce else "observes only"
    passes = "everything" if ruleset.fail_open else "nothing"
    yield f"policy {ruleset.name}: {does}; {passes} passes while the engine is down"
    yield f"  interfaces    {', '.join(scope.interfaces)}"
    yield f"  destinations  {_prefixes(scope.destinations) or 'any'}"
    yield f"  ports         {_port_set(scope.ports)}"
    yield f"  trusted       {_prefixes(scope.trusted) or 'nobody'}"
    yield f"  one source    IPv4 /{ruleset.source_ipv4}, IPv6 /{ruleset.source_ipv6}"
    yield f"  inspected     at most {ruleset.inspect_packets} inbound packets of a connection"
    if ruleset.syn_budget:
        budget = ruleset.syn_budget
        yield (
            f"  SYN budget    {budget} for each service; "
            f"above it SYN cookies, ports {_port_set(budget.ports)}"
        )
    if ruleset.capacity:
        held = (f"{most} connections at port {port}" for port, most in ruleset.capacity)
        yield f"  capacity      {', '.join(held)}"
    if ruleset.shares != DEFAULT_SHARES:
        yield f"  large source  {_large(ruleset.shares)}"
    shown = {"drop": "silence", "reset": "a RST", "unreachable": "an ICMP error"}
    yield f"  blocked       sees {shown[ruleset.blocking]}; a shun lasts {_time(ruleset)}"
    if not ruleset.covers_all:
        yield "  not blocked   what goes to targets that are not protected, and what is not TCP"
    if ruleset.challenge:
        yield "  shunned       SYN cookies where the service's offers are known"
    if ruleset.forged_resets != "off":
        first = {"hold": "before it passes", "observe": "after it has passed"}
        also = "; of FINs as well" if ruleset.forged_fins else ""
        yield f"  RSTs          the sender is asked {first[ruleset.forged_resets]}{also}"
        if ruleset.reset_exempt:
            yield f"  not asked     {_prefixes(ruleset.reset_exempt)}"
    yield f"  untracked     {', '.join(_untracked(ruleset)) or 'nothing'}"


def _large(shares: Shares) -> str:
    but = f", but not {_prefixes(shares.ordinary)}" if shares.ordinary else ""
    return f"{shares.least}% of all proven connections for {duration_text(shares.after)}{but}"


def _untracked(ruleset: RuleSet) -> Iterator[str]:
    """Say what is dropped before the connection tracker sees it."""
    if not ruleset.enforce:
        return
    if ruleset.least_ttl:
        yield f"TTL below {ruleset.least_ttl} dropped"
    if ruleset.spoofed_after is None:
        yield "spoofed inside addresses counted"
    else:
        wait = duration_text(ruleset.spoofed_after)
        yield "spoofed inside addresses dropped" + (
            f" after {wait}" if ruleset.spoofed_after else ""
        )


def _time(ruleset: RuleSet) -> str:
    return duration_text(ruleset.shun_duration)


def _prefixes(prefixes: tuple[Prefix, ...]) -> str:
    return ", ".join(map(str, prefixes))


def _port_set(ports: frozenset[int] | None) -> str:
    if ports is None:
        return "any"
    return ports_text(ports) + (f" ({len(ports)} ports)" if len(ports) > 5 else "")


def _rules(ruleset: RuleSet) -> Iterator[str]:
    width = max((len(rule.name) for rule in ruleset.rules), default=0)
    if not ruleset.rules:
        yield "no rules"
    for rule in ruleset.rules:
        yield f"rule {rule.name:{width}}  {tier_of(rule)}  {describe_rule(rule)}"


def describe_rule(rule: Rule) -> str:
    """Return when a rule is hit and what it then does, on one line."""
    only = "" if rule.ports is None else f", ports {_port_set(rule.ports)}"
    only += f", to {_prefixes(rule.destinations)}" if rule.destinations else ""
    only += f", except from {_prefixes(rule.excepted)}" if rule.excepted else ""
    only += ", when pressed" if rule.when_pressed else ""
    return f"{_condition(rule)}{only} -> {_action(rule)}"


def _condition(rule: Rule) -> str:
    """Return when a rule is hit, in plain numbers."""
    text = f"{rule.measure.value} "
    if rule.measure in RATE_MEASURES:
        unit = " bytes" if rule.measure is Measure.BYTE_RATE else ""
        period = duration_text(rule.period)
        text += f"over {rule.limit}{unit} in {period}, burst {rule.burst}"
    elif rule.measure is Measure.SLOW:
        text += f"under {rule.limit} bytes/s of {rule.of} after {duration_text(rule.after)}"
        text += f" in the last {duration_text(rule.over_last)}" if rule.over_last else ""
    elif rule.measure is Measure.UNANSWERED:
        text += f"over {duration_text(rule.limit)}, less the fuller the service is"
    elif rule.measure in (Measure.IDLE, Measure.AGE, Measure.STALLED):
        text += f"over {duration_text(rule.limit)}"
    else:
        text += f"over {rule.limit}"
    if rule.measure is Measure.STALLED:
        text += f" at a window of {rule.window} bytes or less"
    if rule.within:
        text += f" within {duration_text(rule.within)}"
    if rule.shorter_than:
        text += f", shorter than {duration_text(rule.shorter_than)}"
    if rule.unless:
        text += f" (x{rule.unless.up_to} if {rule.unless.productive}% productive)"
    return f"{text}, per {_per(rule)}"


def _per(rule: Rule) -> str:
    if rule.measure in _OF_ONE_CONNECTION:
        return "connection"
    if rule.per in (Per.SERVICE, Per.CONNECTION):
        return str(rule.per.value)
    return f"{rule.per.value} (/{rule.ipv4_length}, /{rule.ipv6_length})"


def _action(rule: Rule) -> str:
    text = rule.action.name.lower()
    if rule.action is Action.RESET:
        return f"{text} {rule.ends.value}" + (" ends" if rule.ends is Ends.BOTH else "")
    if rule.action is not Action.BAN:
        return text
    text += f" for {duration_text(rule.duration)}"
    if rule.escalate:
        more = rule.escalate
        text += (
            f", x{more.factor} each time within {duration_text(more.memory)} "
            f"up to {duration_text(more.up_to)}"
        )
    return text + (", existing connections stay" if rule.keep_existing else "")


def _tiers(ruleset: RuleSet) -> Iterator[str]:
    """Say which packets go through the queue, and for which rules."""
    if not ruleset.diverts:
        yield "nothing is diverted into the queue"
    for divert in Divert:
        if divert not in ruleset.diverts:
            continue
        rules = [rule.name for rule in ruleset.rules if divert in needs(rule)]
        ports = _port_set(ruleset.ports_needing(divert))
        yield f"queue gets {divert.value}, ports {ports}, for {', '.join(rules)}"
    swept = [rule.name for rule in ruleset.rules if rule.measure in SWEEP_MEASURES]
    if swept:
        yield f"sweep every {duration_text(ruleset.sweep_every)} for {', '.join(swept)}"
    kept = (
        rule.name
        for measure in (*OF_NO_CONNECTION, Measure.RESET_RATE)
        for rule in ruleset.kept_by_kernel(measure)
    )
    if names := ", ".join(kept):
        yield f"the kernel drops what is beyond the limit in front of the queue for {names}"
    for rule in ruleset.rules:
        if reason := why_not(ruleset, rule):
            yield f"not counted by the kernel: {rule.name}, {reason}"
