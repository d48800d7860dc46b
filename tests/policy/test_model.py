"""What a policy means once it is loaded and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.ruleset import SECOND, Divert, Escalate, Measure, Per, Rule, RuleSet, SynBudget
from rstguard.engine.verdict import Action, Ends
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from rstguard.policy.model import Policy
from rstguard.policy.rules import MEASURES

MINUTE, HOUR, DAY = 60 * SECOND, 3600 * SECOND, 86400 * SECOND
EXAMPLE = Path(__file__).parent / "golden" / "example.yaml"
LEAST: dict[Measure, dict[str, Any]] = {
    Measure.SYN_RATE: {"over": "100/s"},
    Measure.CONNECTION_RATE: {"over": "100/s"},
    Measure.HALF_OPEN: {"over": 100},
    Measure.DISTINCT_PORTS: {"over": 15, "within": "10s"},
    Measure.DISTINCT_HOSTS: {"over": 15, "within": "10s"},
    Measure.REFUSED_PORTS: {"over": 15, "within": "10s"},
    Measure.BAD_FLAGS: {"over": "5/s"},
    Measure.OUT_OF_STATE: {"over": "5/s"},
    Measure.RESET_RATE: {"over": "5/s"},
    Measure.SHORT_CONNECTIONS: {"over": "10/m", "shorter_than": "10s"},
    Measure.CONNECTIONS: {"over": 200},
    Measure.BYTE_RATE: {"over": "1 MB/s"},
    Measure.PACKET_RATE: {"over": "200/s"},
    Measure.SLOW: {"after": "20s", "under": "50 B/s"},
    Measure.STALLED: {"over": "60s", "window": 0},
    Measure.IDLE: {"over": "15m"},
    Measure.AGE: {"over": "15m"},
    Measure.UNANSWERED: {"over": "30s"},
}
NO_DROP = {
    Measure.CONNECTIONS,
    Measure.BYTE_RATE,
    Measure.PACKET_RATE,
    Measure.SLOW,
    Measure.STALLED,
    Measure.IDLE,
    Measure.AGE,
    Measure.UNANSWERED,
}


def compiled(*rules: dict[str, Any], **top: Any) -> RuleSet:
    data = {"version": 1, "protect": {"interfaces": ["eth0"]}, "rules": list(rules), **top}
    return compile_policy(Policy.model_validate(data))


def only(**rule: Any) -> Rule:
    return compiled({"name": "r", **rule}).rules[0]


def test_the_example_means_what_its_comments_say() -> None:
    ruleset = compile_policy(parse(EXAMPLE.read_text(), "example.yaml").policy)
    assert ruleset.name == "web-edge"
    assert ruleset.enforce
    assert ruleset.fail_open
    scope = ruleset.scope
    assert scope.interfaces == ("eth0",)
    assert scope.destinations == (parse_prefix("203.0.113.10"), parse_prefix("2001:db8::/48"))
    assert scope.ports == frozenset({22, 80, 443, *range(8000, 8101)})
    assert scope.trusted == (parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8"))
    assert (ruleset.source_ipv4, ruleset.source_ipv6) == (32, 64)
    assert ruleset.inspect_packets == 8
    assert ruleset.syn_budget == SynBudget(20000, frozenset({80, 443}), 128)
    assert (ruleset.blocking, ruleset.shun_duration, ruleset.sweep_every) == (
        "drop", 10 * SECOND, 2 * SECOND,
    )  # fmt: skip
    assert ruleset.rules == (
        Rule(
            "syn-rate", Measure.SYN_RATE, Action.BAN, 100, SECOND, burst=200, duration=10 * MINUTE
        ),
        Rule(
            "subnet-rate", Measure.SYN_RATE, Action.DROP, 1000, SECOND, burst=1000,
            per=Per.PREFIX, ipv4_length=24, ipv6_length=48,
        ),
        Rule("hoarder", Measure.CONNECTIONS, Action.RESET, 200),
        Rule(
            "port-scan", Measure.DISTINCT_PORTS, Action.BAN, 15, within=10 * SECOND, duration=HOUR
        ),
        Rule("bad-flags", Measure.BAD_FLAGS, Action.DROP, 5, SECOND, burst=5),
        Rule(
            "ssh-brute", Measure.SHORT_CONNECTIONS, Action.BAN, 10, MINUTE, burst=10,
            ports=frozenset({22}), shorter_than=10 * SECOND, duration=30 * MINUTE,
            escalate=Escalate(4, DAY, 7 * DAY),
        ),
        Rule(
            "slow-request", Measure.SLOW, Action.RESET, 50, ports=frozenset({80, 443}),
            after=20 * SECOND, of="client",
        ),
        Rule("idle", Measure.IDLE, Action.RESET, 15 * MINUTE, ends=Ends.BOTH),
    )  # fmt: skip


def test_every_measure_is_in_the_language() -> None:
    assert set(MEASURES) == {measure.value for measure in Measure}


@pytest.mark.parametrize("action", Action)
@pytest.mark.parametrize("measure", Measure)
def test_measures_and_their_actions(measure: Measure, action: Action) -> None:
    rule = {"measure": measure.value, "then": action.name.lower(), **LEAST[measure]}
    if action is Action.BAN:
        rule["for"] = "10m"
    if action is Action.DROP and measure in NO_DROP:
        with pytest.raises(ValidationError, match="drop cannot be done here"):
            only(**rule)
    else:
        found = only(**rule)
        assert (found.measure, found.action) == (measure, action)


@pytest.mark.parametrize("measure", Measure)
def test_every_key_of_a_measure_is_needed(measure: Measure) -> None:
    for key in LEAST[measure]:
        rest = {name: value for name, value in LEAST[measure].items() if name != key}
        with pytest.raises(ValidationError, match=f"{key}\n  Field required"):
            only(measure=measure.value, then="observe", **rest)


@pytest.mark.parametrize(
    ("over", "burst"), [("100/s", 100), ("10/m", 10), ("1/d", 1), ("5000/s", 5000)]
)
def test_the_burst_that_nobody_wrote_is_one_period_of_the_rate(over: str, burst: int) -> None:
    assert only(measure="syn_rate", over=over, then="drop").burst == burst


def test_half_open_forgets_when_the_kernel_does() -> None:
    assert only(measure="half_open", over=9, then="drop").within == 60 * SECOND
    assert only(measure="half_open", over=9, within="5s", then="drop").within == 5 * SECOND


def test_sources_are_as_wide_as_the_policy_says_unless_the_rule_does() -> None:
    rule = {"measure": "syn_rate", "over": "1/s", "then": "drop"}
    ruleset = compiled(
        {"name": "plain", **rule},
        {"name": "prefix", "per": {"ipv4": 16}, **rule},
        {"name": "service", "per": "service", **rule},
        {"name": "idle", "measure": "idle", "over": "1m", "then": "reset"},
        source={"ipv4": 24, "ipv6": 56},
    )
    found = [(rule.per, rule.ipv4_length, rule.ipv6_length) for rule in ruleset.rules]
    assert found == [
        (Per.SOURCE, 24, 56), (Per.PREFIX, 16, 64), (Per.SERVICE, 24, 56), (Per.SOURCE, 24, 56),
    ]  # fmt: skip


def test_what_nobody_wrote() -> None:
    ruleset = compiled()
    assert ruleset == RuleSet(
        "policy", True, True, ruleset.scope, (), syn_budget=SynBudget(None, None, 128)
    )
    assert ruleset.scope.ports is None
    assert ruleset.scope.protects(parse_address("2001:db8::1"), 1)
    assert not ruleset.scope.trusts(parse_address("127.0.0.1"))


def test_nothing_is_diverted_that_no_rule_needs() -> None:
    ruleset = compiled({"name": "i", "measure": "idle", "over": "1m", "then": "reset"})
    assert ruleset.diverts == frozenset()
    ruleset = compiled({"name": "f", "measure": "bad_flags", "over": "1/s", "then": "drop"})
    assert ruleset.diverts == {Divert.BAD_FLAGS}


def test_a_policy_does_not_change() -> None:
    policy = parse(EXAMPLE.read_text(), "example.yaml").policy
    with pytest.raises(ValidationError, match="frozen"):
        policy.mode = "observe"


def test_names_differ_without_a_file_too() -> None:
    rule = {"name": "same", "measure": "idle", "over": "1m", "then": "reset"}
    with pytest.raises(ValidationError, match="names two rules"):
        compiled(rule, rule)
