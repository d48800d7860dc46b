"""The table of scenarios, its policies, and the attackers' commands."""

from __future__ import annotations

import sys

import pytest

from rstguard.engine.address import parse_address
from rstguard.lab import LabError
from rstguard.lab.attacks import PACKAGES, Attack
from rstguard.lab.scenarios import DEMO, LOST, SCENARIOS, Scenario, find
from rstguard.lab.topology import ATTACKER, CLIENTS, SERVER, SERVER6
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


def test_all_are_there() -> None:
    assert [scenario.name for scenario in SCENARIOS] == [
        "syn-flood",
        "conn-flood",
        "slowloris",
        "slow-body",
        "port-scan",
        "idle-hoard",
        "ssh-brute",
        "bad-flags",
        "evasion",
        "forged-proof",
        "poisoned-window",
        "cap",
        "forged-resets",
    ]


@every_scenario
def test_a_scenario_is_sound(scenario: Scenario) -> None:
    assert find(scenario.name) is scenario
    assert scenario.limit >= 0
    attack = scenario.plan(3.0)
    assert attack.idle + attack.busy or scenario.measure != LOST
    assert 0 < scenario.least_seconds <= scenario.seconds <= 12
    assert f"name: lab-{scenario.name}" in scenario.policy


@every_scenario
def test_a_scenarios_policy_is_valid_and_warns_but_of_what_can_be_forged(
    scenario: Scenario,
) -> None:
    loaded = parse(scenario.policy, f"{scenario.name}.yaml")
    assert all("in another's name" in warning.message for warning in loaded.warnings)
    ruleset = compile_policy(loaded.policy)
    assert ruleset.enforce
    assert ruleset.scope.protects(parse_address(SERVER), 80)
    assert ruleset.scope.protects(parse_address(SERVER6), 80)
    assert not any(ruleset.scope.trusts(parse_address(who)) for who in (ATTACKER, *CLIENTS))


@every_scenario
def test_an_attack_names_known_tools_and_ends_by_itself(scenario: Scenario) -> None:
    attack = scenario.plan(3.0)
    assert attack.commands or attack.onlooker
    for command in (*attack.commands, *attack.prepare):
        assert command[0] in PACKAGES or command[0] == sys.executable
    for command in attack.commands:
        text = " ".join(command)
        bounded = ("-c ", "-l 3", "-d3s", "--host-timeout 3s", "--seconds 3")
        assert any(word in text for word in bounded), text


def test_the_demo_stays_under_two_minutes() -> None:
    # Building, starting and collecting take well under four seconds for each half.
    assert sum(2 * (find(name).seconds + 4) for name in DEMO) < 120


def test_an_unknown_scenario_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        LabError, match=r"no scenario 'syn'; there are syn-flood, .*forged-resets\."
    ):
        find("syn")


def test_a_missing_tool_is_named_with_its_package() -> None:
    with pytest.raises(LabError, match=r"^no-such-tool is missing: apt-get install no-such-tool"):
        Attack((("no-such-tool",),)).require_tools()
