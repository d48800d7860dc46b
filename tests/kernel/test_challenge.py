"""The rules of a shun that challenges, as text, and that the real kernel takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope, SynBudget
from rstguard.engine.service import Service
from rstguard.engine.verdict import Action
from rstguard.kernel import chains, cookies, ipset, iptables
from rstguard.kernel.chains import Plan
from rstguard.kernel.linux import Linux

RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(("eth0",), (), frozenset({80, 443}), (parse_prefix("10.0.0.0/8"),)),
    rules=(Rule("syn-rate", Measure.SYN_RATE, Action.BAN, 100, SECOND, 200),),
)
FULL = Offer(1460, 7, sack=True, timestamps=True)
WEB4 = Service(parse_address("192.0.2.1"), 80)
WEB6 = Service(parse_address("2001:db8::1"), 443)
UNPROTECTED = Service(parse_address("192.0.2.1"), 81)
KNOWN = {WEB4: FULL, WEB6: FULL, UNPROTECTED: FULL}
BUDGET = SynBudget(20_000, frozenset({80}))
LINUX = Linux()


def planned(ruleset: RuleSet = RULESET, family: int = 4) -> Plan:
    return cookies.with_cookies(chains.plan(ruleset, family, range(1)), ruleset, family, KNOWN)


@pytest.mark.parametrize("change", [{"challenge": False}, {"enforce": False}])
def test_a_policy_that_does_not_challenge_is_left_as_it_is(change: dict[str, bool]) -> None:
    ruleset = replace(RULESET, **change)  # type: ignore[arg-type]
    assert planned(ruleset) == chains.plan(ruleset, 4, range(1))


@pytest.mark.parametrize(("family", "service"), [(4, WEB4), (6, WEB6)])
def test_what_is_protected_and_known_is_answered_and_all_else_dropped(
    family: int, service: Service
) -> None:
    raw = planned(family=family).chains["raw"]
    valve, last = raw["rstguard-challenge"]
    assert f"--dport {service.port} -m hashlimit --hashlimit-upto 125000/sec" in valve
    assert valve.endswith("-g rstguard-answered")
    assert last == "-j DROP"


def test_an_answer_comes_behind_the_rules_of_others() -> None:
    plan = planned()
    hooks = {jump.builtin for jump in plan.jumps if jump.table == "security"}
    assert hooks == {"INPUT", "FORWARD"}
    answer, last = plan.chains["security"]["rstguard-give"]
    assert "--ctstate NEW -j SYNPROXY --mss 1460" in answer
    assert last == "-j DROP"
    _, syn, *_ = plan.chains["filter"]["rstguard-proxy"]  # behind trusted sources
    assert syn == "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN"


def test_who_is_banned_or_gated_gets_no_cookie() -> None:
    syn, ban, gate, shun = planned().chains["raw"]["rstguard-blocked"]
    assert syn.endswith("-j RETURN")
    assert "rstguard-ban4" in ban
    assert "rstguard-gate4" in gate
    assert ban.endswith("-j DROP")
    assert gate.endswith("-j DROP")
    assert "rstguard-shun4" in shun
    assert shun.endswith("-g rstguard-challenge")


def test_where_a_policy_refuses_only_what_is_answered_is_not_refused() -> None:
    plan = planned(replace(RULESET, blocking="reset"))
    ban, gate, answered, shun = plan.chains["filter"]["rstguard-refused"]
    assert all(rule.endswith("-j rstguard-refusal") for rule in (ban, gate, shun))
    assert answered == "-d 192.0.2.1 -p tcp -m tcp --dport 80 -j RETURN"
    # Above the valve there is no answer of any kind.
    assert plan.chains["raw"]["rstguard-challenge"][-1].endswith("--dport 80 -j DROP")


@pytest.mark.netns
@pytest.mark.parametrize("blocking", ["drop", "reset", "unreachable"])
@pytest.mark.parametrize("budget", [None, BUDGET])
def test_the_kernel_takes_them_as_they_are(
    own_namespace: None, blocking: str, budget: SynBudget | None
) -> None:
    ruleset = replace(RULESET, blocking=blocking, syn_budget=budget)
    ipset.apply(LINUX, ruleset)
    plans = {family: planned(ruleset, family) for family in (4, 6)}
    iptables.apply(LINUX, plans)
    assert iptables.missing(LINUX, plans) == []
    assert iptables.remove(LINUX)
    ipset.destroy(LINUX)
