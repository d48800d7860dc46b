"""The table of scenarios, its policies, and the attackers' commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rstguard.engine.address import parse_address
from rstguard.lab import LabError
from rstguard.lab.attacks import PACKAGES, Attack
from rstguard.lab.scenarios import DEMO, LOST, SCENARIOS, Scenario, find
from rstguard.lab.server import bearable
from rstguard.lab.topology import ATTACKER, CLIENTS, SERVER, SERVER6
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse

ROOT = Path(__file__).parent.parent.parent

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


def test_all_are_there() -> None:
    assert [scenario.name for scenario in SCENARIOS] == [
        "syn-flood",
        "half-open",
        "forged-flood",
        "carpet",
        "conn-flood",
        "keepalive-flood",
        "slowloris",
        "slow-body",
        "port-scan",
        "scan-fast",
        "scan-slow",
        "scan-services",
        "idle-hoard",
        "botnet",
        "ssh-brute",
        "bad-flags",
        "strays",
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
    assert f"name: {scenario.sample or f'lab-{scenario.name}'}\n" in scenario.policy


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s.sample], ids=lambda s: s.name)
def test_a_sample_is_changed_in_no_more_than_interface_addresses_and_capacity(
    scenario: Scenario,
) -> None:
    sample = (ROOT / "policies" / f"{scenario.sample}.yaml").read_text()
    assert len(scenario.policy.splitlines()) == len(sample.splitlines())
    lines = zip(sample.splitlines(), scenario.policy.splitlines(), strict=True)
    changed = {now.split(":")[0].strip() for before, now in lines if now != before}
    stated = {"pressure"} if scenario.connections else set()
    assert changed <= {"interfaces", "destinations"} | stated
    capacity = parse(scenario.policy, "sample").policy.pressure.capacity
    assert capacity == ({80: bearable(scenario.connections)} if scenario.connections else {})


@every_scenario
def test_a_scenarios_policy_is_valid_and_warns_of_nothing(scenario: Scenario) -> None:
    loaded = parse(scenario.policy, f"{scenario.name}.yaml")
    assert loaded.warnings == ()
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
