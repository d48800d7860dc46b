"""The rules that count open handshakes, and that the real kernel takes them as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.offers import Offer
from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope, SynBudget
from rstguard.engine.service import Service
from rstguard.engine.verdict import Action
from rstguard.kernel import chains, cookies, half_open, ipset, iptables
from rstguard.kernel.chains import Plan
from rstguard.kernel.linux import Linux
from rstguard.kernel.names import short_id
from rstguard.kernel.services import Known

RATE = Rule("rate", Measure.SYN_RATE, Action.DROP, 100, SECOND, 200)
RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(("eth0",), (), None, ()),
    rules=(RATE,),
    syn_budget=SynBudget(None, None, 100),
)
FULL = Offer(1460, 7, sack=True, timestamps=True)
WEB4 = Service(parse_address("192.0.2.1"), 80)
WEB6 = Service(parse_address("2001:db8::1"), 80)
BEHIND = Service(parse_address("192.0.2.2"), 80)
KNOWN = {WEB4: FULL, WEB6: FULL, BEHIND: FULL._replace(to=(Service(1, 8080),))}
LINUX = Linux()
QUEUES = range(5640, 5641)


def planned(ruleset: RuleSet = RULESET, family: int = 4, known: Known = KNOWN) -> Plan:
    return cookies.with_cookies(chains.plan(ruleset, family, QUEUES), ruleset, family, known)


def lists(ruleset: RuleSet = RULESET, family: int = 4, known: Known = KNOWN) -> list[str]:
    return [
        spec.name
        for spec in half_open.sets(ruleset, family, known)
        if spec.name.startswith(f"rstguard-half{family}-")
    ]


@pytest.mark.parametrize(
    "ruleset",
    [
        replace(RULESET, enforce=False),
        replace(RULESET, syn_budget=None),
        replace(RULESET, syn_budget=SynBudget(100, None)),
        replace(RULESET, syn_budget=SynBudget(None, frozenset({443}), 100)),
    ],
)
def test_what_is_not_asked_for_is_not_counted(ruleset: RuleSet) -> None:
    assert not any("half" in chain for of in planned(ruleset).chains.values() for chain in of)
    assert not lists(ruleset)


def counted(ruleset: RuleSet = RULESET, known: Known = KNOWN) -> set[str]:
    """Return the addresses of the services whose handshakes are counted."""
    rules = planned(ruleset, known=known).chains["mangle"].get(half_open.SYNS, ())
    return {rule.split()[1] for rule in rules if rule.startswith("-d ")}


def test_a_service_behind_dnat_is_counted_if_it_leads_to_one_server_and_no_rate_decides() -> None:
    assert counted() == {"192.0.2.1", "192.0.2.2"}
    assert counted(replace(RULESET, syn_budget=SynBudget(300, None, 100))) == {"192.0.2.1"}
    servers = Service(1, 8080), Service(2, 8080)
    assert counted(known={WEB4: FULL, BEHIND: FULL._replace(to=servers)}) == {"192.0.2.1"}


def test_no_cookie_is_given_in_front_of_others_rules_but_to_whom_they_have_let_pass() -> None:
    plan = planned()
    raw = plan.chains["raw"]["rstguard-full"]
    assert all("--match-set rstguard-passed4 src" in r for r in raw if "192.0.2.2" in r)
    *_, admit = (r for r in plan.chains["security"]["rstguard-admit"] if "192.0.2.2" in r)
    assert "! --match-set rstguard-admitted4 src,dst,dst -j DROP" in admit


def test_a_syn_is_counted_before_the_queue_and_after_its_entry_is_marked() -> None:
    rules = planned().chains["mangle"]["rstguard-syn"]
    at = rules.index(f"-j {half_open.SYNS}")
    assert "CONNMARK" in rules[at - 1] or "CONNMARK" in " ".join(rules[:at])
    assert all(rule.endswith("-j RETURN") for rule in rules[at + 1 : at + 3])
    assert rules[at + 3 :] == ("-j rstguard-syns",)


def test_the_name_of_a_list_is_its_services_whatever_else_is_known() -> None:
    alone = lists(known={WEB4: FULL})
    other = Service(WEB4.address, 81)
    assert set(alone) < set(lists(known={other: FULL, WEB4: FULL}))
    assert all(len(name) + len("-new") <= 31 for name in lists(family=6))


def test_there_are_so_many_lists_and_the_rest_share_one() -> None:
    many = {Service(WEB4.address, port): FULL for port in range(1, 500)}
    assert len(lists(known=many)) == half_open.MOST_OWN + 1
    rules = planned(known=many).chains["mangle"][half_open.SYNS]
    assert sum("rstguard-half-rest" in rule for rule in rules) == 499 - half_open.MOST_OWN


def test_who_may_be_one_listener_for_both_families_has_one_limit() -> None:
    other = Service(WEB4.address, 81)
    most = {
        spec.name: int(spec.options.split()[3])
        for family in (4, 6)
        for spec in half_open.sets(RULESET, family, {WEB4: FULL, other: FULL, WEB6: FULL})
        if spec.name.startswith(f"rstguard-half{family}-")
    }
    shared4, shared6 = (short_id(f"{s} shared") for s in (WEB4, WEB6))
    assert most == {
        f"rstguard-half4-{shared4}": 50,
        f"rstguard-half4-{short_id(str(other))}": 100,
        f"rstguard-half6-{shared6}": 50,
    }


@pytest.mark.netns
@pytest.mark.parametrize("most", [16, 128, 4096])
@pytest.mark.parametrize("blocking", ["drop", "reset"])
@pytest.mark.parametrize("challenge", [True, False])
def test_the_kernel_takes_them_as_they_are(
    own_namespace: None, most: int, blocking: str, challenge: bool
) -> None:
    ruleset = replace(
        RULESET, syn_budget=SynBudget(None, None, most), blocking=blocking, challenge=challenge
    )
    ipset.apply(LINUX, ruleset, 1, KNOWN)
    assert ipset.lost(LINUX, ruleset, 1, KNOWN) == []
    plans = {family: planned(ruleset, family) for family in (4, 6)}
    iptables.apply(LINUX, plans)
    for family, plan in plans.items():
        held = iptables.read(LINUX, family).chains
        for table, of_table in plan.chains.items():
            for chain, rules in of_table.items():
                if "half" in chain or chain == "rstguard-last":
                    said = [re.sub(r"/(32|128) ", " ", rule) for rule in held[table, chain]]
                    assert said == list(rules)
    assert iptables.remove(LINUX)
    ipset.destroy(LINUX)
