"""What changes from one policy to another, in words and in rules."""

from __future__ import annotations

from rstguard.engine.ruleset import RuleSet
from rstguard.policy.compile import compile_policy
from rstguard.policy.differ import differences, rules_diff
from rstguard.policy.load import parse

HEAD = "version: 1\nname: p\nprotect: {interfaces: [eth0]}\n"
RATE = "{name: rate, measure: syn_rate, over: 5/s, then: drop}"
IDLE = "{name: idle, measure: idle, over: 5m, then: reset}"


def compiled(*rules: str, head: str = HEAD) -> RuleSet:
    return compile_policy(parse(f"{head}rules: [{', '.join(rules)}]\n", "p.yaml").policy)


def test_nothing_changes() -> None:
    assert differences(compiled(RATE, IDLE), compiled(RATE, IDLE)) == []


def test_rules_come_go_and_change() -> None:
    new = compiled(RATE.replace("5/s", "6/s"), IDLE.replace("idle,", "quiet,", 1))
    goes, changes, comes = differences(compiled(RATE, IDLE), new)
    assert goes == "rule idle goes: idle over 5m, per connection -> reset both ends"
    assert changes.startswith("rule rate changes, and counts anew: syn_rate over 5 in 1s")
    assert "-> syn_rate over 6 in 1s" in changes
    assert comes.startswith("rule quiet comes: idle over 5m")


def test_another_order_is_said_to_change_nothing() -> None:
    (said,) = differences(compiled(RATE, IDLE), compiled(IDLE, RATE))
    assert "another order, which changes nothing" in said


def test_the_head_is_compared() -> None:
    head = HEAD.replace(
        "p\n", "q\nmode: observe\non_failure: closed\nbans_per_minute: 7\nmarks: 0xff00\n", 1
    )
    said = differences(compiled(RATE), compiled(RATE, head=head + "trusted: [10.0.0.0/8]\n"))
    assert "name: p -> q" in said
    assert "while the engine is down: traffic passes -> nothing passes" in said
    assert "bans per minute: 1000 -> 7" in said
    assert "mark bits: 0xff000000 -> 0x0000ff00" in said
    assert "trusted: nobody -> 10.0.0.0/8" in said
    assert "nothing will be blocked any more: the policy only observes" in said


def test_a_budget_comes() -> None:
    head = HEAD + "syn_budget: {rate: 300/s}\n"
    (said,) = differences(compiled(RATE), compiled(RATE, head=head))[:1]
    assert said.startswith("SYN budget: 128 half-open for each service; ")
    assert " -> 300/s and 128 half-open for each service; " in said
    none = HEAD + "syn_budget: off\n"
    (said,) = differences(compiled(RATE, head=none), compiled(RATE))[:1]
    assert said.startswith("SYN budget: none -> 128 half-open")


def test_rules_are_shown_as_a_diff() -> None:
    old, new = {"IPv4": "a\nb\nc\n"}, {"IPv4": "a\nB\nc\n"}
    assert rules_diff(old, old) == ""
    lines = rules_diff(old, new).splitlines()
    assert lines[0] == "--- IPv4, in force"
    assert "-b" in lines
    assert "+B" in lines
