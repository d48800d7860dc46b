"""The rules by which the kernel counts SYNs, as text, and that its table can never be full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope, SynBudget
from rstguard.engine.verdict import Action
from rstguard.kernel.chains import plan
from rstguard.kernel.cookies import with_cookies
from rstguard.kernel.counting import syns

TABLE = 1 << 20


def ruleset(**of_rule: int | bool) -> RuleSet:
    wanted = {"limit": 100, "period": SECOND, "burst": 200, "in_kernel": True} | of_rule
    rule = Rule("rate", Measure.SYN_RATE, Action.DROP, **wanted)  # type: ignore[arg-type]
    return RuleSet("p", True, True, Scope(("eth0",), (), None, ()), (rule,))


@pytest.mark.parametrize(("family", "length"), [(4, 32), (6, 64)])
def test_the_exact_rules(family: int, length: int) -> None:
    gate = "-m hashlimit --hashlimit-above 250000/sec --hashlimit-burst 250000"
    gate += f" --hashlimit-name rstguard{family}-count-250000 -j rstguard-queue"
    within = "-m hashlimit --hashlimit-upto 100/sec --hashlimit-burst 200"
    mask = " --hashlimit-srcmask 64" if family == 6 else ""
    within += f" --hashlimit-mode srcip --hashlimit-name rstguard{family}-100-1-200-{length}"
    within += " --hashlimit-htable-size 65536"
    within += f" --hashlimit-htable-max {TABLE} --hashlimit-htable-expire 2000{mask} -j RETURN"
    over = "-j MARK --set-xmark 0x4000000/0x4000000"
    assert syns(ruleset(), family) == (gate, within, over, "-j rstguard-queue")


def test_nothing_without_a_rule_for_the_kernel() -> None:
    assert syns(ruleset(in_kernel=False), 4) == ()


def option(rule: str, name: str) -> int:
    words = rule.split()
    return int(words[words.index(f"--hashlimit-{name}") + 1].partition("/")[0])


@pytest.mark.parametrize(
    ("limit", "period", "burst"),
    [(10_000, 1, 1), (100, 1, 200), (7, 1, 100), (1, 60, 3), (999, 60, 1000), (10, 3600, 100)],
)
def test_the_table_cannot_be_full(limit: int, period: int, burst: int) -> None:
    gate, within, *_ = syns(ruleset(limit=limit, period=period * SECOND, burst=burst), 4)
    usual = 1000 * period  # milliseconds; so long they live if nothing is said
    expire = option(within, "htable-expire") if "htable-expire" in within else usual
    assert expire >= 1000 * period * burst // limit  # by then the bucket is full again
    # iptables turns a rate into whole microseconds between two packets, rounded down.
    rate = 1_000_000 / (1_000_000 // option(gate, "above"))
    until_swept = expire / 1000 + 1
    assert option(gate, "burst") + rate * until_swept <= option(within, "htable-max") == TABLE


def test_the_count_of_services_without_cookies_cannot_be_full() -> None:
    budgeted = replace(ruleset(), syn_budget=SynBudget(300, None))
    whole = with_cookies(plan(budgeted, 4, range(1)), budgeted, 4, {})
    gate, bound = whole.chains["mangle"]["rstguard-syn"][-3:-1]
    assert gate.endswith(" -j RETURN")
    assert "--hashlimit-mode dstip " in bound
    rate = 1_000_000 / (1_000_000 // option(gate, "above"))
    until_swept = option(bound, "htable-expire") / 1000 + 1
    assert option(gate, "burst") + rate * until_swept <= option(bound, "htable-max") == TABLE
