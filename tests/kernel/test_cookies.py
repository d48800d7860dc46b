"""The SYN budget's rules as text, and that the real kernel takes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope, SynBudget
from rstguard.engine.service import Service
from rstguard.engine.verdict import Action
from rstguard.kernel import chains, cookies, ipset, iptables
from rstguard.kernel.chains import Plan
from rstguard.kernel.linux import Linux
from rstguard.kernel.services import Known

SYN_RATE = Rule("syn-rate", Measure.SYN_RATE, Action.BAN, 100, SECOND, 200)
RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(("eth0", "wan*"), (), frozenset({80, 443}), ()),
    rules=(SYN_RATE,),
    syn_budget=SynBudget(20_000, frozenset({80})),
    challenge=False,
)
WEB4 = Service(parse_address("192.0.2.1"), 80)
WEB6 = Service(parse_address("2001:db8::1"), 80)
FULL = Offer(1460, 7, sack=True, timestamps=True)
KNOWN = {WEB4: FULL, WEB6: FULL._replace(mss=1440)}
LINUX = Linux()
QUEUES = range(5640, 5641)


def planned(ruleset: RuleSet = RULESET, family: int = 4, known: Known = KNOWN) -> Plan:
    return cookies.with_cookies(chains.plan(ruleset, family, QUEUES), ruleset, family, known)


def text(plan: Plan) -> str:
    return "\n".join(rule for of in plan.chains.values() for rules in of.values() for rule in rules)


@pytest.mark.parametrize(
    "ruleset", [replace(RULESET, enforce=False), replace(RULESET, syn_budget=None)]
)
def test_without_a_budget_that_acts_nothing_changes(ruleset: RuleSet) -> None:
    assert planned(ruleset) == chains.plan(ruleset, 4, QUEUES)


def test_each_family_has_its_services() -> None:
    assert "192.0.2.1" in text(planned())
    assert "2001:db8::1" not in text(planned())
    assert "2001:db8::1" in text(planned(family=6))
    assert "192.0.2.1" not in text(planned(family=6))


def test_an_unknown_service_is_answered_by_nobody() -> None:
    assert "SYNPROXY" not in text(planned(known={}))
    assert planned(known={}).chains["raw"]["rstguard-budget"] == ()


@pytest.mark.parametrize(
    ("offer", "options"),
    [
        (FULL, "--mss 1460 --timestamp --sack-perm --wscale 7"),
        (Offer(1400, -1, sack=True, timestamps=True), "--mss 1400 --timestamp --sack-perm"),
        (Offer(1460, 7, sack=True, timestamps=False), "--mss 1460"),
        (Offer(536, -1, sack=False, timestamps=False), "--mss 536"),
    ],
)
def test_what_is_offered_is_what_the_server_offers(offer: Offer, options: str) -> None:
    (*_, proxy) = planned(known={WEB4: offer}).chains["filter"]["rstguard-proxy"]
    assert proxy.endswith(f"-j SYNPROXY {options}")


def test_another_rate_counts_in_another_table() -> None:
    faster = replace(RULESET, syn_budget=SynBudget(30_000, None))
    names = [
        [word for word in rule.split() if word.startswith("rstguard4-")]
        for plan in (planned(), planned(faster))
        for rule in plan.chains["raw"]["rstguard-budget"]
    ]
    assert names == [["rstguard4-20000"], ["rstguard4-30000"]]


@pytest.mark.parametrize(("fail_open", "verdict"), [(True, "RETURN"), (False, "DROP")])
def test_what_is_too_much_for_the_queue_goes_as_on_failure_says(
    fail_open: bool, verdict: str
) -> None:
    *_, bound, queue = planned(replace(RULESET, fail_open=fail_open)).chains["mangle"][
        "rstguard-syn"
    ]
    assert bound.endswith(f"-j {verdict}")
    assert queue == "-j rstguard-syns"


def test_a_blocked_source_gets_no_cookie_where_it_is_to_be_refused() -> None:
    rules = planned(replace(RULESET, blocking="reset")).chains["raw"]["rstguard-budget"]
    names = [rule.split()[3] for rule in rules[:3]]
    assert names == ["rstguard-ban4", "rstguard-gate4", "rstguard-shun4"]


@pytest.mark.netns
@pytest.mark.parametrize("blocking", ["drop", "reset"])
@pytest.mark.parametrize("rate", [1, 20_000, 5_000_000])
def test_the_kernel_takes_them_as_they_are(own_namespace: None, blocking: str, rate: int) -> None:
    budget = SynBudget(rate, frozenset({80}))
    ruleset = replace(RULESET, blocking=blocking, syn_budget=budget)
    ipset.apply(LINUX, ruleset)
    plans = {family: planned(ruleset, family) for family in (4, 6)}
    iptables.apply(LINUX, plans)
    assert iptables.missing(LINUX, plans) == []
    iptables.apply(LINUX, plans)
    assert len(iptables.read(LINUX, 4).jumps) == len(plans[4].jumps)
    assert iptables.remove(LINUX)
    ipset.destroy(LINUX)


@pytest.mark.netns
def test_syns_of_returned_cookies_are_counted_apart(own_namespace: None) -> None:
    """In tables of their own: anybody can forge what is counted in the others."""
    ruleset = replace(RULESET, rules=(replace(SYN_RATE, in_kernel=True),))
    plans = {family: planned(ruleset, family) for family in (4, 6)}
    for plan in plans.values():
        mangle = plan.chains["mangle"]
        usual, returned = (
            {word for rule in mangle[chain] for word in rule.split() if word.startswith("rstguard")}
            for chain in ("rstguard-count", "rstguard-returned")
        )
        assert usual & returned == {"rstguard-queue"}
        assert "-j rstguard-returned" in mangle["rstguard-proved"]
        assert "-j rstguard-count" not in mangle["rstguard-proved"]
    ipset.apply(LINUX, ruleset)
    placed = iptables.apply(LINUX, plans)
    assert iptables.missing(LINUX, plans, placed) == []
    assert iptables.remove(LINUX)
    ipset.destroy(LINUX)
