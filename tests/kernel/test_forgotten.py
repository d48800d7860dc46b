"""The rules for what the tracker has forgotten: what they say, and that the kernel takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope
from rstguard.engine.verdict import Action
from rstguard.kernel import chains, forgotten, ipset, iptables
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.linux import Linux
from rstguard.kernel.tracker import USUAL, Tracker
from tests.support.fake_kernel import FakeKernel

RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(("eth0",), (), frozenset({80}), ()),
    rules=(Rule("strays", Measure.OUT_OF_STATE, Action.BAN, 10, SECOND, 20),),
)
LINUX = Linux()
QUEUES = range(5640, 5641)
MAX, LIBERAL = "net.netfilter.nf_conntrack_max", "net.netfilter.nf_conntrack_tcp_be_liberal"


def mangle(ruleset: RuleSet = RULESET, tracker: Tracker = USUAL) -> dict[str, tuple[str, ...]]:
    return chains.plan(ruleset, 4, QUEUES, tracker).chains["mangle"]


@pytest.mark.parametrize("most", [1, 4_000, 65_536, 262_144, 1_000_003, 50_000_000])
def test_all_ways_together_stay_below_a_quarter_of_the_table(most: int) -> None:
    each = forgotten.most_a_second(Tracker(most))
    assert each >= 1
    assert each == 1 or 4 * each * forgotten.UNANSWERED_SECONDS <= most / 4
    assert 1_000_000 // (1_000_000 // each) == each  # hashlimit prints it as it reads it


def test_the_valve_comes_before_what_is_counted_and_after_what_is_not_protected() -> None:
    out_of_scope, *_, new, counted = mangle()["rstguard-invalid"]
    assert out_of_scope.endswith("! --match-set rstguard-ports dst -j RETURN")
    assert new.endswith("-g rstguard-valve")
    assert counted == "-g rstguard-unfit"
    assert mangle()["rstguard-valve-strays"][-2].endswith("-g rstguard-lost")


def test_a_policy_that_observes_drops_nothing() -> None:
    rules = mangle(replace(RULESET, enforce=False))
    assert "rstguard-valve" not in rules
    assert rules["rstguard-invalid"][-1] == "-j rstguard-lost"


@pytest.mark.parametrize("liberal", [False, True])
def test_a_first_ack_proves_nothing_where_any_number_is_taken(liberal: bool) -> None:
    likely = [rule for rule in mangle(tracker=Tracker(liberal=liberal))["rstguard-first"]
              if "connlabel" in rule]  # fmt: skip
    assert bool(likely) is not liberal


@pytest.mark.parametrize(("name", "value"), [(MAX, "4000"), (LIBERAL, "1")])
def test_rules_follow_what_the_administrator_sets(tmp_path: Path, name: str, value: str) -> None:
    kernel = FakeKernel()
    footprint = Footprint(kernel, tmp_path, QUEUES)
    footprint.prepare(RULESET)
    footprint.divert(RULESET)
    before = footprint.rules(RULESET)
    assert footprint.lost(RULESET) == []
    kernel.sysctls[name] = value
    assert len(footprint.lost(RULESET)) == 1
    footprint.restore(RULESET)
    assert footprint.lost(RULESET) == []
    assert footprint.rules(RULESET) != before
    assert kernel.sysctls[name] == value


def test_services_of_another_scope_are_forgotten(tmp_path: Path) -> None:
    kernel = FakeKernel()
    footprint = Footprint(kernel, tmp_path, QUEUES)
    footprint.prepare(RULESET)
    footprint.divert(RULESET)

    def known() -> str:
        return kernel.run(["ipset", "save", "rstguard-serving4"])

    kernel.run(["ipset", "add", "rstguard-serving4", "192.0.2.1,tcp:80"])
    footprint.replace(RULESET, replace(RULESET, name="same"))
    assert "192.0.2.1" in known()
    other = replace(RULESET, scope=replace(RULESET.scope, ports=frozenset({443})))
    footprint.replace(RULESET, other)
    assert "192.0.2.1" not in known()


@pytest.mark.netns
@pytest.mark.parametrize("most", [1_000, 262_144, 1_000_003])
@pytest.mark.parametrize("enforce", [True, False])
def test_the_kernel_takes_them_as_they_are(own_namespace: None, most: int, enforce: bool) -> None:
    ruleset = replace(RULESET, enforce=enforce)
    ipset.apply(LINUX, ruleset)
    plans = {f: chains.plan(ruleset, f, QUEUES, Tracker(most)) for f in (4, 6)}
    iptables.apply(LINUX, plans)
    for family, plan in plans.items():
        held = iptables.read(LINUX, family).chains
        for chain, rules in plan.chains["mangle"].items():
            assert held["mangle", chain] == rules
    assert iptables.remove(LINUX)
    ipset.destroy(LINUX)
