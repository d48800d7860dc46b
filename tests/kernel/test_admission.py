"""The rules that count connections as they begin: where they are, and what they do to a packet."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import pytest

from rstguard.engine.address import Prefix, parse_address
from rstguard.engine.admission import admitting
from rstguard.engine.ruleset import Measure, Per, Rule, RuleSet, Scope
from rstguard.engine.verdict import Action, Ends
from rstguard.engine.wire import ACK, FIN, RST
from rstguard.kernel import admission, chains, ipset
from rstguard.kernel.elements import EVERYTHING
from rstguard.kernel.footprint import rules_text
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.names import set_name
from rstguard.kernel.seam import Counted
from rstguard.kernel.sets import Sets
from rstguard.kernel.tracker import Tracker
from tests.support.netfilter import Netfilter, Seen, World
from tests.support.random_policies import random_ruleset

QUEUES: Final = range(5640, 5641)
SOURCE, TARGET = parse_address("192.0.2.7"), parse_address("198.51.100.1")
HOARD = Rule("hoard", Measure.CONNECTIONS, Action.RESET, 100)
MARKS, LABELS = Marks(), Labels()


def policy(*rules: Rule, enforce: bool = True) -> RuleSet:
    trusted = (Prefix(parse_address("10.0.0.0"), 8),)
    return RuleSet("p", enforce, True, Scope(("eth0",), (), None, trusted), rules)


def rules_of(ruleset: RuleSet) -> Netfilter:
    return Netfilter(rules_text(ruleset, QUEUES)["IPv4"])


def first_ack(**more: object) -> Seen:
    packet = Seen("forward", "eth0", "lan0", True, SOURCE, TARGET, 40000, 80, ACK)
    states = frozenset({"ESTABLISHED"})
    known = replace(packet, states=states, assured=True, connmark=MARKS.guarded.value, packets=2)
    return replace(known, **more)  # type: ignore[arg-type]


def pass_through(
    ruleset: RuleSet, seen: Seen, full: bool, listened: bool = True, who: str = ""
) -> list[str]:
    """Send a packet through; return what was done to it.  `who`: of which set its source is."""
    world = World(chance=lambda asked: full if "--packets-gt" in asked else "upto" in asked)
    world.sets[admission.live_set(HOARD, 4)] = {(Prefix(SOURCE, 32),), (Prefix(TARGET, 32),)}
    if listened:
        world.sets[admission.counting_set(4)] = {(prefix,) for prefix in EVERYTHING[4]}
    if who:
        world.sets[set_name(who, 4)] = {(Prefix(SOURCE, 32),)}
    return [effect.rule for effect in rules_of(ruleset).pass_through(seen, world)]


def told(done: list[str], group: int = admission.TOLD_GROUP) -> bool:
    return any(f"--nflog-group {group} " in rule for rule in done)


def condemned(seen: Seen) -> bool:
    return bool(seen.connmark & MARKS.condemned.mask) and LABELS.condemned in seen.labels


def test_who_is_at_the_limit_is_refused_by_the_ack_that_completes_the_handshake() -> None:
    seen = first_ack(labels=frozenset({LABELS.begun}))
    done = pass_through(policy(HOARD), seen, full=True)
    assert condemned(seen)
    assert "REJECT --reject-with tcp-reset" in done[-1]
    assert told(done, admission.REFUSED_GROUP)
    assert not told(done)  # nobody counts it


def test_who_is_below_it_is_counted() -> None:
    seen = first_ack()
    done = pass_through(policy(HOARD), seen, full=False)
    assert not condemned(seen)
    assert any(f"--add-set {admission.live_set(HOARD, 4)} src" in rule for rule in done)
    assert seen.connmark & MARKS.established.mask


def test_without_a_reader_and_of_protected_addresses_none_is_refused() -> None:
    for more in ({"listened": False}, {"who": "protected"}):
        seen = first_ack()
        done = pass_through(policy(HOARD), seen, full=True, **more)
        assert not condemned(seen)
        assert told(done)


def test_a_rule_that_bans_refuses_nobody_and_an_excepted_source_is_not_counted() -> None:
    ban = replace(HOARD, action=Action.BAN, duration=1)
    excepted = replace(HOARD, excepted=(Prefix(SOURCE, 32),))
    for rule, is_told in ((ban, True), (excepted, False)):
        seen = first_ack()
        assert told(pass_through(policy(rule), seen, full=True)) is is_told
        assert not condemned(seen)


@pytest.mark.parametrize("ends", list(Ends))
def test_the_ends_that_a_rule_names_hear_of_it(ends: Ends) -> None:
    seen = first_ack()
    pass_through(policy(replace(HOARD, ends=ends)), seen, full=True)
    assert seen.connmark & MARKS.condemned.mask == MARKS.condemned_for[ends]


def test_only_the_first_ack_counts() -> None:
    for more in (
        {"connmark": MARKS.proven.value},
        {"assured": False},
        {"connmark": 0},
        {"flags": ACK | FIN},
    ):
        done = pass_through(policy(HOARD), first_ack(**more), full=True)
        assert not any("--add-set rstguard-live" in rule for rule in done)


@pytest.mark.parametrize("flags", [FIN | ACK, RST, RST | ACK])
@pytest.mark.parametrize("inward", [True, False])
def test_fins_and_rsts_of_both_ends_are_told_of(flags: int, inward: bool) -> None:
    seen = first_ack(flags=flags, connmark=MARKS.proven.value, labels=frozenset({LABELS.likely}))
    if not inward:
        ways = {"came_in": "lan0", "goes_out": "eth0", "reply": True}
        ends = {"source": TARGET, "destination": SOURCE, "source_port": 80}
        seen = replace(seen, **ways, **ends, destination_port=40000)  # type: ignore[arg-type]
    assert told(pass_through(policy(HOARD), seen, full=True))
    assert not told(pass_through(policy(HOARD), replace(seen), full=False))


@pytest.mark.parametrize("family", [4, 6])
def test_a_policy_has_nothing_of_it_that_does_not_need_it(family: int) -> None:
    draw = random.Random(11)
    for _ in range(200):
        ruleset = random_ruleset(draw)
        for liberal in (False, True):
            plan = chains.plan(ruleset, family, QUEUES, Tracker(liberal=liberal))
            text = repr(plan.chains)
            wanted = bool(admitting(ruleset)) and not liberal
            for part in ("rstguard-admit", "rstguard-live", "rstguard-ended", "-counting"):
                assert (part in text) is wanted, ruleset
        names = {spec.name for spec in ipset.plan(ruleset)}
        assert (admission.counting_set(family) in names) is bool(admitting(ruleset))
    assert not admitting(policy(HOARD, enforce=False))


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8:1:2::7"])
def test_the_kernel_counts_from_what_it_is_told(own_namespace: None, address: str) -> None:
    service = replace(HOARD, name="full", per=Per.SERVICE)
    wide = replace(HOARD, name="wide", per=Per.PREFIX, ipv4_length=24, ipv6_length=48)
    kernel, at = Linux(), parse_address(address)
    family = 6 if ":" in address else 4
    ipset.apply(kernel, policy(HOARD, wide, service))
    shown = []
    with Sets() as sets:
        for rule, port in ((HOARD, -1), (wide, -1), (service, 443)):
            name = admission.live_set(rule, family)
            for packets in (7, 23):
                sets.count(name, [Counted(at, port, packets)], 20)
            (line,) = kernel.run(["ipset", "save", name]).splitlines()[1:]
            shown.append(line.split()[2:])
    own = "198.51.100.7" if family == 4 else "2001:db8:1:2::"
    prefix = "198.51.100.0" if family == 4 else "2001:db8:1::"
    assert [words[0] for words in shown] == [own, prefix, f"{address},tcp:443"]
    assert all(words[words.index("packets") + 1] == "23" for words in shown)


def test_very_many_keys_are_counted_at_once(own_namespace: None) -> None:
    kernel, first = Linux(), parse_address("198.18.0.0")
    ipset.apply(kernel, policy(HOARD))
    name = admission.live_set(HOARD, 4)
    with Sets() as sets:
        sets.count(name, [Counted(first + n, -1, 5) for n in range(1201)], 20)
    lines = kernel.run(["ipset", "save", name]).splitlines()[1:]
    assert len(lines) == 1201
    assert all(" packets 5 " in f"{line} " for line in lines)
