"""Which rules the kernel may count for, and what is said of the others."""

from __future__ import annotations

import pytest

from rstguard.engine.ruleset import RuleSet
from rstguard.policy.compile import compile_policy, tier_of
from rstguard.policy.load import parse
from rstguard.policy.offload import why_not

RATE = "{name: one, measure: syn_rate, over: 50/s, burst: 100, then: drop}"


def compiled(rules: str, extra: str = "syn_budget: {rate: 1000/s}") -> RuleSet:
    text = f"version: 1\nprotect: {{interfaces: [eth0]}}\n{extra}\nrules:\n"
    text += "".join(f"  - {rule}\n" for rule in rules.splitlines())
    return compile_policy(parse(text, "test").policy)


@pytest.mark.parametrize(
    ("rule", "tier"),
    [
        (RATE, "kernel"),
        ("{name: one, measure: byte_rate, over: 1 MB/s, then: reset}", "sweep"),
        ("{name: one, measure: connection_rate, over: 5/s, then: drop}", "queue"),
    ],
)
def test_tiers(rule: str, tier: str) -> None:
    ruleset = compiled(rule)
    assert tier_of(ruleset.rules[0]) == tier
    assert not why_not(ruleset, ruleset.rules[0])


@pytest.mark.parametrize(
    ("rules", "extra", "reason"),
    [
        (RATE, "offload: never\nsyn_budget: {rate: 1000/s}", "`offload: never`"),
        (RATE, "", "without a rate in the SYN budget"),
        (RATE, "syn_budget: off", "without a rate"),
        (RATE, "mode: observe\nsyn_budget: {rate: 1000/s}", "only observes"),
        (RATE, "syn_budget: {rate: 100000/s}", "table could fill up"),
        (RATE.replace("drop", "ban, for: 1m"), None, "full burst"),
        ("{name: one, measure: connections, over: 50, then: reset}", None, "can be forged"),
        (RATE.replace("then", "ports: [80], then"), None, "some ports only"),
        (RATE.replace("then", "per: service, then"), None, "per service"),
        (RATE.replace("50/s", "50000/s"), None, "at this rate"),
        (RATE + "\n" + RATE.replace("one", "two"), None, "same measure"),
        (
            RATE + "\n{name: scan, measure: distinct_ports, over: 9, within: 9s, then: drop}",
            None,
            "rule scan needs every SYN",
        ),
    ],
)
def test_what_stands_in_the_way(rules: str, extra: str | None, reason: str) -> None:
    ruleset = compiled(rules) if extra is None else compiled(rules, extra)
    assert not ruleset.rules[0].in_kernel
    assert reason in why_not(ruleset, ruleset.rules[0])
