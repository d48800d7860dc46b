"""What changes from one policy to another, in words.  Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from rstguard.engine.ruleset import RuleSet
from rstguard.policy.compile import describe, describe_rule


def differences(old: RuleSet, new: RuleSet) -> list[str]:
    """Return one sentence for each thing that would change; empty if nothing would.

    Rules are known by their names: a rule of another name is another rule.
    """
    return [*_head(old, new), *_rules(old, new)]


def _head(old: RuleSet, new: RuleSet) -> Iterator[str]:
    before, after = _settings(old), _settings(new)
    for name, value in after.items():
        if before[name] != value:
            yield f"{name}: {before[name]} -> {value}"
    if old.enforce and not new.enforce:
        yield "nothing will be blocked any more: the policy only observes"
    if new.enforce and not old.enforce:
        yield "from now on the policy is enforced"


def _settings(ruleset: RuleSet) -> dict[str, str]:
    """Return the head of a policy's description, by the first words of its lines."""
    head = describe(ruleset).partition("\n\n")[0].splitlines()
    named = {line[:16].strip(): line[16:].strip() for line in head[1:]}
    return {
        "name": ruleset.name,
        "while the engine is down": "traffic passes" if ruleset.fail_open else "nothing passes",
        "SYN budget": "none",
        "capacity": "not stated",
        "large source": "as by default",
        "RSTs": "are not asked for",
        "not asked": "nobody",
        "sweep every": f"{ruleset.sweep_every / 1e9:g} s",
        "bans per minute": str(ruleset.bans_per_minute),
        "mark bits": f"0x{ruleset.marks:08x}",
        "connection labels": f"from {ruleset.labels} on",
        **named,
    }


def _rules(old: RuleSet, new: RuleSet) -> Iterator[str]:
    before = {rule.name: rule for rule in old.rules}
    after = {rule.name: rule for rule in new.rules}
    for name, rule in before.items():
        if name not in after:
            yield f"rule {name} goes: {describe_rule(rule)}"
    for name, rule in after.items():
        if name not in before:
            yield f"rule {name} comes: {describe_rule(rule)}"
        elif before[name] != rule:
            change = f"{describe_rule(before[name])} -> {describe_rule(rule)}"
            yield f"rule {name} changes, and counts anew: {change}"
    if [name for name in before if name in after] != [name for name in after if name in before]:
        yield "the rules stand in another order, which changes nothing: the most severe action wins"


def rules_diff(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return what changes in the compiled iptables rules as a unified diff, "" if nothing does."""
    parts: list[str] = []
    for family, text in new.items():
        lines = difflib.unified_diff(
            old.get(family, "").splitlines(),
            text.splitlines(),
            f"{family}, in force",
            f"{family}, new",
            lineterm="",
            n=1,
        )
        parts += lines
    return "".join(f"{line}\n" for line in parts)
