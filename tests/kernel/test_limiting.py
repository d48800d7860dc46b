"""The limits that the kernel keeps by itself: what they say, and that they are the engine's."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import pytest

from rstguard.engine.address import Prefix, parse_address
from rstguard.engine.checks import Kind
from rstguard.engine.engine import kind_of
from rstguard.engine.ruleset import PERIODS, SECOND, Measure, Per, Rule, RuleSet, Scope
from rstguard.engine.verdict import Action
from rstguard.engine.wire import ACK, FIN, PSH, RST, STRAY, SYN, URG, Packet
from rstguard.kernel import chains, forgotten, ipset, iptables, limiting
from rstguard.kernel.counting import UNITS
from rstguard.kernel.footprint import rules_text
from rstguard.kernel.linux import Linux
from rstguard.kernel.matching import ports_named
from rstguard.kernel.tracker import USUAL
from tests.support.netfilter import Netfilter, Seen, World

LINUX: Final = Linux()
QUEUES: Final = range(5640, 5641)
SOURCE, TARGET = parse_address("192.0.2.7"), parse_address("198.51.100.1")
ALL_FLAGS: Final = (FIN, SYN, RST, PSH, ACK, URG)
COMBINATIONS: Final = [
    sum(flag for bit, flag in enumerate(ALL_FLAGS) if number >> bit & 1) for number in range(64)
]


def limit(measure: Measure, action: Action = Action.DROP, **more: object) -> Rule:
    rule = Rule(f"{measure.value}-rule", measure, action, 5, SECOND, 5, duration=60 * SECOND)
    return replace(rule, **more)  # type: ignore[arg-type]


def policy(*rules: Rule, enforce: bool = True, fail_open: bool = True) -> RuleSet:
    trusted = (Prefix(parse_address("10.0.0.0"), 8),)
    return RuleSet("p", enforce, fail_open, Scope(("eth0",), (), None, trusted), rules)


def seen(flags: int, **more: object) -> Seen:
    packet = Seen("forward", "eth0", "lan0", True, SOURCE, TARGET, 40000, 80, flags)
    return replace(packet, states=frozenset({"INVALID"}), **more)  # type: ignore[arg-type]


def way(ruleset: RuleSet, packet: Seen, chance: bool, world: World | None = None) -> list[str]:
    """Return what was done to a packet; with `chance` all limits are exceeded."""
    rules = Netfilter(rules_text(ruleset, QUEUES)["IPv4"])
    world = world or World()
    # The valves let pass what is at most so much, and a limit hits what is above it.
    world.chance = lambda asked: ("--hashlimit-above" in asked) is chance
    return [effect.rule for effect in rules.pass_through(packet, world)]


@pytest.mark.parametrize("flags", COMBINATIONS)
def test_kernel_and_engine_agree_on_what_is_impossible(flags: int) -> None:
    """The tracker calls each of them INVALID (tcp_valid_flags), or they are SYNs."""
    both = policy(limit(Measure.BAD_FLAGS), limit(Measure.OUT_OF_STATE))
    done = way(both, seen(flags), True)
    packet = Packet(SOURCE, TARGET, 40000, 80, 1, 1, flags, 64240, 0, STRAY)
    wanted = {Kind.BAD: "flags", Kind.STRAY: "strays"}.get(kind_of(packet))
    found = {kind for kind in ("flags", "strays") if f"-A rstguard-over-{kind} -j DROP" in done}
    found |= {kind for kind in ("flags", "strays") if f"-A rstguard-valve-{kind} -j DROP" in done}
    assert found == ({wanted} if wanted else set())


@pytest.mark.parametrize("action", [Action.DROP, Action.RESET, Action.BAN])
@pytest.mark.parametrize("fail_open", [True, False])
@pytest.mark.parametrize(("kind", "flags"), [("strays", RST), ("flags", 0)])
def test_what_is_beyond_a_rule_goes_no_further(
    action: Action, fail_open: bool, kind: str, flags: int
) -> None:
    ruleset = policy(limit(limiting.KINDS[kind], action), fail_open=fail_open)
    rules = Netfilter(rules_text(ruleset, QUEUES)["IPv4"])
    world = World(chance=lambda asked: "1/sec" not in asked)
    world.sets["rstguard-lost4"] = {(Prefix(SOURCE, 32),)}
    effects = list(rules.pass_through(seen(flags), world))
    assert effects[-1].what == "DROP"
    chain = "block" if action is Action.BAN else "over"
    assert effects[-1].rule == f"-A rstguard-{chain}-{kind} -j DROP"


@pytest.mark.parametrize(("kind", "flags"), [("strays", RST), ("flags", 0)])
def test_what_is_shown_to_the_engine_has_no_bypass(kind: str, flags: int) -> None:
    ruleset = policy(limit(limiting.KINDS[kind], Action.BAN))
    world = World(chance=lambda _: True)
    world.sets["rstguard-lost4"] = {(Prefix(SOURCE, 32),)}
    packet = seen(flags)
    effects = list(Netfilter(rules_text(ruleset, QUEUES)["IPv4"]).pass_through(packet, world))
    assert effects[-1].rule == "-A rstguard-sample-strays -j NFQUEUE --queue-num 5640"
    assert packet.mark == 0x24000000


@pytest.mark.parametrize("flags", [RST, 0, ACK])
def test_who_only_observes_drops_nothing(flags: int) -> None:
    for rules in (
        policy(limit(Measure.BAD_FLAGS), limit(Measure.OUT_OF_STATE), enforce=False),
        policy(
            limit(Measure.BAD_FLAGS, Action.OBSERVE), limit(Measure.OUT_OF_STATE, Action.OBSERVE)
        ),
    ):
        assert not [rule for rule in way(rules, seen(flags), True) if rule.endswith("DROP")]


@pytest.mark.parametrize("measure", [Measure.BAD_FLAGS, Measure.OUT_OF_STATE])
@pytest.mark.parametrize("flags", [RST, 0])
def test_the_exempt_are_exempt(measure: Measure, flags: int) -> None:
    trusted = parse_address("10.1.2.3")
    world = World()
    world.sets["rstguard-trusted4"] = {(Prefix(trusted, 32),)}
    assert way(policy(limit(measure)), seen(flags, source=trusted), True, world) == []
    world.sets["rstguard-protected4"] = {(Prefix(SOURCE, 32),)}
    world.sets["rstguard-lost4"] = {(Prefix(SOURCE, 32),)}
    world.chance = lambda _: True
    for action in (Action.RESET, Action.BAN):
        rules = Netfilter(rules_text(policy(limit(measure, action)), QUEUES)["IPv4"])
        effects = list(rules.pass_through(seen(flags), world))
        assert not [effect for effect in effects if effect.what == "DROP"]


def test_ports_of_no_rule_have_no_valve() -> None:
    ruleset = policy(
        limit(Measure.OUT_OF_STATE, ports=frozenset({80})),
        limit(Measure.BAD_FLAGS, ports=frozenset({80})),
    )
    for family in (4, 6):
        mangle = chains.plan(ruleset, family, QUEUES).chains["mangle"]
        for chain in ("rstguard-unfit", "rstguard-flags"):
            valve, otherwise = mangle[chain][-2:]
            assert valve.startswith("-p tcp -m multiport --dports 80 -g rstguard-valve-")
            assert "valve" not in otherwise
    world = World()
    world.sets["rstguard-lost4"] = {(Prefix(SOURCE, 32),)}
    for flags in (RST, 0):
        assert way(ruleset, seen(flags), True, world)[-1].endswith("DROP")
        elsewhere = seen(flags, destination_port=81)
        assert way(ruleset, elsewhere, True, world)[-1].endswith("--queue-bypass")


def test_what_bears_no_mark_of_the_guard_meets_no_more_rules() -> None:
    """Segments of established connections leave as early as without such rules."""
    without = policy(Rule("it", Measure.SYN_RATE, Action.DROP, 5, SECOND, 5))
    with_them = policy(*without.rules, limit(Measure.OUT_OF_STATE), limit(Measure.BAD_FLAGS))
    for family in (4, 6):
        plans = [chains.plan(rules, family, QUEUES).chains for rules in (without, with_them)]
        for table, chain in (
            ("raw", "rstguard-raw"), ("mangle", "rstguard-in"), ("mangle", "rstguard-classify"),
            ("mangle", "rstguard-out"), ("mangle", "rstguard-adopt"),
            ("filter", "rstguard-condemned"),
        ):  # fmt: skip
            assert plans[0][table][chain] == plans[1][table][chain]


def rule_drawn(draw: random.Random) -> Rule:
    period = draw.choice((*PERIODS, 7 * SECOND))
    most = 10_000_000 * period // SECOND
    return limit(
        draw.choice((*limiting.KINDS.values(),)),
        draw.choice(list(Action)),
        limit=int(most ** draw.random()) or 1,
        period=period,
        burst=int(10_000_000 ** draw.random()) or 1,
        ports=draw.choice((None, frozenset(draw.sample(range(1, 65536), draw.choice((1, 40)))))),
        per=draw.choice(list(Per)),
        ipv4_length=draw.choice((8, 24, 32)),
        ipv6_length=draw.choice((32, 48, 64, 128)),
    )


@pytest.mark.netns
def test_the_kernel_takes_every_limit_that_it_is_said_to_count(own_namespace: None) -> None:
    draw = random.Random(1)
    for _ in range(8):
        rules = tuple(replace(rule_drawn(draw), name=f"r{n}") for n in range(12))
        ruleset = policy(*rules, fail_open=draw.random() < 0.5)
        ipset.apply(LINUX, ruleset)
        plans = {f: chains.plan(ruleset, f, QUEUES, USUAL) for f in (4, 6)}
        iptables.apply(LINUX, plans)
        assert iptables.missing(LINUX, plans) == [] or all(r.countable for r in rules) is False
    iptables.remove(LINUX)
    ipset.destroy(LINUX)


def test_what_counts_otherwise_has_a_table_of_its_own() -> None:
    """The kernel goes on with the table of that name, as it was made."""
    one = limit(Measure.RESET_RATE)
    others = (
        replace(one, action=Action.BAN), replace(one, per=Per.SERVICE), replace(one, burst=6),
        replace(one, per=Per.DESTINATION), replace(one, ipv4_length=24), replace(one, limit=6),
        replace(one, period=60 * SECOND), replace(one, name="other"),
        limit(Measure.BAD_FLAGS, name=one.name),
    )  # fmt: skip
    names = {limiting.table_of(rule, 4) for rule in (one, *others)}
    assert len(names) == 1 + len(others)


def test_ports_are_named_in_runs_of_which_each_fits() -> None:
    assert ports_named(None) == ("",)
    (one,) = ports_named(frozenset({80, 443, *range(8000, 8101)}))
    assert one == "-p tcp -m multiport --dports 80,443,8000:8100 "
    several = ports_named(frozenset(range(1, 200, 2)))
    assert all(each.count(",") < 15 for each in several)
    named = {int(p) for each in several for p in each.split()[-1].split(",")}
    assert named == set(range(1, 200, 2))


@pytest.mark.parametrize(("limit_", "burst"), [(1, 1), (20, 20), (100, 10), (7, 5000)])
def test_one_source_alone_can_cross_its_limit(limit_: int, burst: int) -> None:
    """The valve lets more of it pass than its rule."""
    for kind in (limiting.STRAYS, limiting.FLAGS):
        rule = limit(limiting.KINDS[kind], limit=limit_, burst=burst)
        valve = chains.plan(policy(rule), 4, QUEUES).chains["mangle"][f"rstguard-valve-{kind}"]
        words = valve[-2].split()
        assert int(words[words.index("--hashlimit-upto") + 1].partition("/")[0]) > limit_
        assert int(words[words.index("--hashlimit-burst") + 1]) > burst


def test_the_valves_stay_below_one_in_a_hundred_of_a_flood() -> None:
    """Of all families, ways and kinds together at 60,000 a second, the worst being a mixture."""
    each = sum(limiting.OTHERS.values()) + forgotten.most_a_second(USUAL)
    assert 2 * each < 60_000 / 100
    assert set(UNITS) == set(PERIODS)
