"""The sets: which a policy needs (pure), and what the real kernel makes of them."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from rstguard.engine.address import Prefix, parse_address, parse_prefix
from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet, Scope
from rstguard.engine.verdict import Action, Ban, Reason, Shun
from rstguard.kernel import Full, InUse, KernelError, NotThere, ipset
from rstguard.kernel.elements import MAX_SECONDS, Element, element_of
from rstguard.kernel.filled import SetSpec
from rstguard.kernel.linux import Linux
from rstguard.kernel.names import BLOCK_SETS
from rstguard.kernel.netlink import PATIENCE
from rstguard.kernel.sets import Sets
from tests.support.network import ThreeHosts

LINUX = Linux()
RULESET = RuleSet(
    name="test",
    enforce=True,
    fail_open=True,
    scope=Scope(
        interfaces=("eth0",),
        destinations=(parse_prefix("203.0.113.10"), parse_prefix("2001:db8::/48")),
        ports=frozenset({22, 80, 443, *range(8000, 8101)}),
        trusted=(parse_prefix("10.0.0.0/8"), parse_prefix("fd00::/8")),
    ),
    rules=(),
)
CONFIG = ("ban4", "ban6", "shun4", "shun6", "proven4", "proven6", "trusted4", "trusted6")
THIN = ("thin4-0", "thin6-0")
PROTECTED = ("protected4", "protected6")
SUSPECT = ("suspect4", "suspect6", "challenged4", "challenged6", "admitted4", "admitted6")
INSIDE = (
    "inside4",
    "inside6",
    "translated4",
    "translated6",
    "doubt4",
    "doubt6",
    "replaced4",
    "replaced6",
    "serving4",
    "serving6",
)
ONEWAY = ("asked4", "asked6", "answers4", "answers6", "oneway4", "oneway6")
MORE = ("gate4", "gate6", "dst4", "dst6", *PROTECTED, *THIN)
COOKIES = ("acked4", "reminded6")
ALWAYS = {f"rstguard-{name}" for name in (*CONFIG, *SUSPECT, *INSIDE, *ONEWAY, *MORE, *COOKIES)}


def with_scope(**changes: object) -> RuleSet:
    return replace(RULESET, scope=replace(RULESET.scope, **changes))  # type: ignore[arg-type]


def ban(source: str, seconds: int | None = 60, rule: str = "syn-rate") -> Element:
    return Element(parse_prefix(source), "ban", rule, seconds)


def shun(source: str, seconds: int | None = 60, rule: str = "syn-rate") -> Element:
    return Element(parse_prefix(source), "shun", rule, seconds)


def shell(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout


def names() -> set[str]:
    return set(shell("ipset", "list", "-name").split())


def members(name: str) -> set[str]:
    return {line.split()[2] for line in shell("ipset", "save", name).splitlines()[1:]}


def spec(ruleset: RuleSet, name: str) -> SetSpec:
    return next(spec for spec in ipset.plan(ruleset) if spec.name == f"rstguard-{name}")


# The plan


def test_plan_holds_every_set_that_the_chains_name() -> None:
    assert {s.name for s in ipset.plan(RULESET)} == ALWAYS | {
        "rstguard-ports",
        "rstguard-close-ports",
    }


@pytest.mark.netns
def test_only_what_was_made_can_be_lost() -> None:
    """A set that a policy leaves empty is not one that somebody emptied."""
    with ThreeHosts() as lab, lab.inside("gateway"):
        ruleset = with_scope(ports=frozenset(range(1, 2000)))
        ipset.apply(LINUX, ruleset)
        assert ipset.lost(LINUX, ruleset) == []
        lab.run("gateway", "ipset", "flush", "rstguard-ports")
        lab.run("gateway", "ipset", "destroy", "rstguard-shun6")
        lost = ["the set rstguard-shun6", "what the set rstguard-ports holds"]
        assert sorted(ipset.lost(LINUX, ruleset)) == lost


def test_port_sets_that_mean_all_are_not_made() -> None:
    any_close = Rule("short", Measure.SHORT_CONNECTIONS, Action.BAN, 10)
    ruleset = replace(with_scope(ports=None), rules=(any_close,))
    assert {s.name for s in ipset.plan(ruleset)} == ALWAYS


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ({22, 80, 443, *range(8000, 8101)}, ("22", "80", "443", "8000-8100")),
        ({0, 65535}, ("0", "65535")),
        (set(range(65536)), ("0-65535",)),
        ({1, 2}, ("1-2",)),
        (set(), ()),
    ],
)
def test_ports_are_planned_as_ranges(ports: set[int], expected: tuple[str, ...]) -> None:
    assert spec(with_scope(ports=frozenset(ports)), "ports").members == expected


def test_close_ports_are_those_of_the_rules_that_need_them() -> None:
    rule = Rule("ssh", Measure.SHORT_CONNECTIONS, Action.BAN, 10, ports=frozenset({22}))
    assert spec(replace(RULESET, rules=(rule,)), "close-ports").members == ("22",)


@pytest.mark.parametrize(
    ("destinations", "four", "six"),
    [
        ((), ("0.0.0.0/1", "128.0.0.0/1"), ("::/1", "8000::/1")),
        (("0.0.0.0/0",), ("0.0.0.0/1", "128.0.0.0/1"), ()),
        (("::/0",), (), ("::/1", "8000::/1")),
        (("192.0.2.1", "2001:db8::1"), ("192.0.2.1",), ("2001:db8::1",)),
        (("192.0.2.0/24", "192.0.2.0/24"), ("192.0.2.0/24",), ()),
    ],
)
def test_destinations(
    destinations: tuple[str, ...], four: tuple[str, ...], six: tuple[str, ...]
) -> None:
    ruleset = with_scope(destinations=tuple(parse_prefix(text) for text in destinations))
    assert spec(ruleset, "dst4").members == four
    assert spec(ruleset, "dst6").members == six


def test_a_source_is_as_wide_as_the_policy_says() -> None:
    assert "netmask" not in spec(RULESET, "proven4").options
    assert "netmask 64" in spec(RULESET, "proven6").options
    narrow = replace(RULESET, source_ipv4=24, source_ipv6=128)
    assert "netmask 24" in spec(narrow, "proven4").options
    assert "netmask" not in spec(narrow, "proven6").options


# Elements


@pytest.mark.parametrize("rule", ["", "a b", 'a"b', "-a", "x" * 49, "a;b", "a\n"])
def test_a_comment_holds_no_odd_rule_name(rule: str) -> None:
    with pytest.raises(ValueError, match="rule name"):
        _ = ban("192.0.2.1", rule=rule).comment


@pytest.mark.parametrize(
    ("nanoseconds", "seconds"),
    [(1, 1), (SECOND, 1), (SECOND + 1, 2), (600 * SECOND, 600), (10**20, MAX_SECONDS)],
)
def test_an_effect_lasts_whole_seconds_rounded_up(nanoseconds: int, seconds: int) -> None:
    effect = Shun(parse_prefix("192.0.2.1"), nanoseconds, "syn-rate", Reason.SYN_RATE)
    assert element_of(effect) == shun("192.0.2.1", seconds)


@pytest.mark.parametrize(("keep", "name"), [(False, "rstguard-ban4"), (True, "rstguard-gate4")])
def test_a_ban_that_keeps_connections_only_drops_syns(keep: bool, name: str) -> None:
    source = parse_prefix("192.0.2.1")
    element = element_of(Ban(source, SECOND, "syn-rate", Reason.SYN_RATE, keep))
    assert element.set_name == name
    assert element.comment == "ban syn-rate"


# The real kernel


@pytest.fixture
def sets(own_namespace: None) -> Sets:
    ipset.apply(LINUX, RULESET)
    return Sets()


@pytest.mark.netns
def test_apply_makes_what_is_planned(own_namespace: None) -> None:
    ipset.apply(LINUX, RULESET)
    assert names() == {s.name for s in ipset.plan(RULESET)}
    assert members("rstguard-trusted4") == {"10.0.0.0/8"}
    assert members("rstguard-dst6") == {"2001:db8::/48"}
    assert len(members("rstguard-ports")) == 104
    ipset.apply(LINUX, RULESET)
    assert names() == {s.name for s in ipset.plan(RULESET)}


@pytest.mark.netns
def test_apply_replaces_members_and_keeps_bans_and_proofs(sets: Sets) -> None:
    sets.add([ban("192.0.2.1"), shun("2001:db8:1::/64")])
    shell("ipset", "add", "rstguard-proven4", "192.0.2.9")
    ipset.apply(LINUX, with_scope(trusted=(parse_prefix("172.16.0.0/12"),), ports=frozenset({25})))
    assert members("rstguard-trusted4") == {"172.16.0.0/12"}
    assert members("rstguard-trusted6") == set()
    assert members("rstguard-ports") == {"25"}
    assert [(e.source, e.kind) for e in sets.list()] == [
        (parse_prefix("192.0.2.1"), "ban"),
        (parse_prefix("2001:db8:1::/64"), "shun"),
    ]
    assert sets.proven(parse_address("192.0.2.9"))


@pytest.mark.netns
def test_members_never_lack_while_a_policy_is_applied(sets: Sets) -> None:
    """A set is swapped, not emptied: an address in the old and the new policy is always in it."""
    missed: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not Sets._holds(sets, "rstguard-trusted4", parse_address("10.1.2.3")):
                missed.append("gone")

    thread = threading.Thread(target=watch)
    thread.start()
    for octet in range(20):
        ipset.apply(
            LINUX,
            with_scope(trusted=(parse_prefix("10.0.0.0/8"), parse_prefix(f"172.16.{octet}.0/24"))),
        )
    done.set()
    thread.join()
    assert not missed


@pytest.mark.netns
def test_apply_carries_bans_over_from_a_set_with_other_parameters(own_namespace: None) -> None:
    shell(
        "ipset",
        "restore",
        text="create rstguard-ban4 hash:net timeout 60 comment maxelem 1000\n"
        'add rstguard-ban4 192.0.2.0/24 timeout 500 comment "ban old-rule"\n'
        "create rstguard-ban4-new hash:ip\n"
        "create rstguard-shun4 hash:ip\n"
        "create rstguard-proven4 hash:ip timeout 600 netmask 24\n"
        "add rstguard-proven4 192.0.2.1\n",
    )
    ipset.apply(LINUX, RULESET)
    (kept,) = Sets().list()
    assert kept._replace(remaining=None) == ban("192.0.2.0/24", None, "old-rule")
    assert 490 <= (kept.remaining or 0) <= 500
    assert "maxelem 1048576" in shell("ipset", "list", "rstguard-ban4")
    assert "Type: hash:net" in shell("ipset", "list", "rstguard-shun4")
    assert members("rstguard-proven4") == set()


@pytest.mark.netns
def test_prune_takes_what_the_policy_no_longer_needs(sets: Sets) -> None:
    fewer = with_scope(ports=None)
    ipset.apply(LINUX, fewer)
    assert "rstguard-ports" in names()
    ipset.prune(LINUX, fewer)
    assert names() == {s.name for s in ipset.plan(fewer)}


@pytest.mark.netns
def test_destroy_takes_all_of_ours_and_nothing_else(sets: Sets) -> None:
    shell("ipset", "create", "other", "hash:ip")
    shell("ipset", "create", "rstguard-of-another-version", "hash:ip")
    sets.add([ban("192.0.2.1")])
    ipset.destroy(LINUX, keep_bans=True)
    assert names() == {"other", *BLOCK_SETS}
    assert sets.contains(parse_address("192.0.2.1"))
    ipset.destroy(LINUX)
    assert names() == {"other"}
    ipset.destroy(LINUX)


@pytest.mark.netns
def test_a_set_that_a_rule_still_matches_on_is_named(sets: Sets) -> None:
    rule = ("INPUT", "-m", "set", "--match-set", "rstguard-ban4", "src", "-j", "DROP")
    shell("iptables", "-w", "-A", *rule)
    with pytest.raises(KernelError, match=r"rstguard-ban4 is still matched on.*iptables-save"):
        ipset.destroy(LINUX)
    shell("iptables", "-w", "-D", *rule)
    ipset.destroy(LINUX)
    assert names() == set()


@pytest.mark.netns
def test_elements_come_back_as_they_went_in(sets: Sets) -> None:
    elements = [
        ban("192.0.2.1", None),
        ban("198.51.100.0/24", MAX_SECONDS, "x" * 40),
        ban("2001:db8::/64"),
        shun("192.0.2.2"),
        ban("192.0.2.3")._replace(keep_existing=True),
        shun("2001:db8:0:1::1"),
    ]
    sets.add(elements)
    held = {e.source: e for e in sets.list()}
    assert held.keys() == {e.source for e in elements}
    for element in elements:
        found = held[element.source]
        assert found._replace(remaining=element.remaining) == element
        assert element.lasts - 2 <= found.lasts <= element.lasts


@pytest.mark.netns
def test_an_element_is_renewed_but_never_shortened_unless_asked(sets: Sets) -> None:
    source = parse_prefix("192.0.2.1")

    def held() -> Element:
        return next(e for e in sets.list() if e.source == source)

    sets.add([ban("192.0.2.1", 100, "first")])
    sets.add([ban("192.0.2.1", 50, "second"), ban("192.0.2.7", 50)])
    assert held().rule == "first"
    assert held().lasts > 90
    assert sets.contains(parse_address("192.0.2.7"))
    sets.add([ban("192.0.2.1", 500, "third"), ban("192.0.2.1", 400, "fourth")])
    assert held().rule == "third"
    assert held().lasts > 450
    sets.add([ban("192.0.2.1", None, "for-ever")])
    sets.add([ban("192.0.2.1", 500, "third")])
    assert held().remaining is None
    sets.add([ban("192.0.2.1", 20, "shorter")], shorten=True)
    assert held().rule == "shorter"
    assert held().lasts <= 20


@pytest.mark.netns
def test_contains_knows_prefixes_and_families(sets: Sets) -> None:
    sets.add([ban("198.51.100.0/24"), shun("2001:db8:0:1::/64")])
    assert sets.contains(parse_address("198.51.100.77"))
    assert not sets.contains(parse_address("198.51.101.77"))
    assert sets.contains(parse_address("2001:db8:0:1:ffff::"))
    assert not sets.contains(parse_address("2001:db8:0:2::"))


@pytest.mark.netns
def test_proof_is_as_wide_as_a_source(sets: Sets) -> None:
    shell("ipset", "add", "rstguard-proven6", "2001:db8::5")
    assert sets.proven(parse_address("2001:db8::77"))
    assert not sets.proven(parse_address("2001:db8:0:1::5"))


@pytest.mark.netns
def test_remove_says_whether_it_was_there(sets: Sets) -> None:
    sets.add([ban("192.0.2.1"), shun("2001:db8::/64"), shun("192.0.2.1")])
    assert sets.remove(parse_prefix("192.0.2.1"))
    assert not sets.contains(parse_address("192.0.2.1"))
    assert not sets.remove(parse_prefix("192.0.2.1"))
    assert not sets.remove(parse_prefix("2001:db8::1"))
    assert sets.remove(parse_prefix("2001:db8::/64"))


@pytest.mark.netns
def test_an_element_expires(sets: Sets) -> None:
    sets.add([ban("192.0.2.1", 1)])
    assert sets.contains(parse_address("192.0.2.1"))
    give_up = time.monotonic() + 5
    while sets.contains(parse_address("192.0.2.1")):
        assert time.monotonic() < give_up


@pytest.mark.netns
def test_an_element_that_somebody_added_by_hand_is_listed(sets: Sets) -> None:
    shell("ipset", "add", "rstguard-ban4", "192.0.2.1", "comment", "from the old firewall")
    assert sets.list() == [Element(parse_prefix("192.0.2.1"), "ban", "", None)]


@pytest.mark.netns
def test_a_listing_is_that_of_the_command(sets: Sets) -> None:
    """Of many elements, so that the kernel's answer comes in many parts."""
    sources = [f"10.{i >> 8}.{i & 255}.0/24" for i in range(9000)]
    sources += [f"192.0.2.{i}" for i in range(200)] + [
        f"2001:db8:{i:x}::/48" for i in range(1, 999)
    ]
    sets.add([(ban if i % 2 else shun)(source, 600 + i) for i, source in enumerate(sources)])
    found = sets.list()
    assert sorted(str(one.source) for one in found) == sorted(sources)
    sets_of = ("ban4", "ban6", "shun4", "shun6")
    printed = [
        line for name in sets_of for line in shell("ipset", "save", f"rstguard-{name}").splitlines()
    ]
    assert sorted(f"{one.source} {one.comment}" for one in found) == sorted(
        re.sub(r'^add \S+ (\S+) timeout \d+ comment "(.*)"$', r"\1 \2", line)
        for line in printed
        if line.startswith("add ")
    )
    times = {str(one.source): one.remaining for one in found}
    assert all(590 + i <= (times[one] or 0) <= 600 + i for i, one in enumerate(sources))


@pytest.mark.netns
@pytest.mark.parametrize("digit", [4, 6])
def test_what_a_set_holds_is_counted_whatever_its_type(own_namespace: None, digit: int) -> None:
    ipset.apply(LINUX, replace(RULESET, enforce=True))
    name = f"rstguard-replaced{digit}"
    address = "192.0.2.1" if digit == 4 else "2001:db8::1"
    with Sets() as sets:
        assert sets.entries(name) == 0
        for port in (1, 2):
            shell("ipset", "add", name, f"{address},{port},{address}", "timeout", "600")
        assert (sets.entries(name), sets.entries("rstguard-ports")) == (2, 104)
        with pytest.raises(NotThere):
            sets.entries("rstguard-none")


@pytest.mark.netns
def test_what_the_kernel_refuses_is_said_in_a_sentence(sets: Sets) -> None:
    with pytest.raises(KernelError, match="would ban everybody"):
        sets.add([ban("0.0.0.0/0")])
    with pytest.raises(ValueError, match="lasts 1 to"):
        sets.add([ban("192.0.2.1", MAX_SECONDS + 1)])
    ipset.destroy(LINUX)
    with pytest.raises(KernelError, match=r"rstguard-ban4 .* does not exist"):
        sets.add([ban("192.0.2.1")])
    with pytest.raises(KernelError, match="rstguard-ban4"):
        sets.list()


@pytest.mark.netns
def test_a_full_set_is_said_to_be_full(own_namespace: None) -> None:
    shell("ipset", "create", "rstguard-ban4", "hash:net", "timeout", "0", "comment", "maxelem", "4")
    with pytest.raises(KernelError, match=r"rstguard-ban4 .* full"):
        Sets().add([ban(f"192.0.2.{n}") for n in range(10)])


@pytest.mark.netns
def test_thousands_at_once(sets: Sets) -> None:
    four = [Element(Prefix(0x0B000000 + n, 32), "ban", "syn-rate", 600) for n in range(2500)]
    base = parse_address("2001:db8::")
    six = [Element(Prefix(base + (n << 64), 64), "ban", "x" * 40, 600) for n in range(2500)]
    sets.add(four + six)
    assert {e.source for e in sets.list()} == {e.source for e in four + six}
    sets.add([e._replace(remaining=900) for e in four + six] + [ban("192.0.2.1")])
    assert len(sets.list()) == 5001
    assert all(e.lasts > 700 for e in sets.list() if e.source != parse_prefix("192.0.2.1"))


@pytest.mark.netns
def test_rules_can_prove_far_more_sources_than_a_small_table_holds(sets: Sets) -> None:
    """Rules cannot make a set grow: with a small table proofs would end at a few hundred."""
    shell("ip", "link", "set", "lo", "up")
    shell("ip", "addr", "add", "10.99.0.0/16", "dev", "lo")
    table = "-t", "raw", "-A", "PREROUTING", "-p", "udp"
    shell("iptables", "-w", *table, "-j", "SET", "--add-set", "rstguard-proven4", "src", "--exist")
    count = 20_000
    for number in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((f"10.99.{number >> 8}.{number & 255}", 0))
            sender.sendto(b"x", ("127.0.0.1", 9))
    found = re.search(r"entries: (\d+)", shell("ipset", "list", "-terse", "rstguard-proven4"))
    assert found is not None
    # The answers (port unreachable) are ICMP, so nothing but the senders is in the set.
    assert int(found[1]) == count


@pytest.mark.netns
def test_a_kernel_that_never_answers_is_not_waited_for(sets: Sets) -> None:
    deaf, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with other, deaf, sets:
        sets._socket.close()
        sets._socket = deaf
        deaf.settimeout(0.05)
        with pytest.raises(KernelError, match=r"rstguard-ban4 .* no answer within 0\.05 s"):
            sets.add([ban("192.0.2.1")])


@pytest.mark.netns
def test_what_was_wrong_can_be_told_without_reading_the_sentence(sets: Sets) -> None:
    with sets:
        assert sets._socket.gettimeout() == PATIENCE
        shell("iptables", "-w", "-A", "INPUT", "-m", "set", "--match-set", "rstguard-ban4", "src")
        with pytest.raises(InUse):
            ipset.destroy(LINUX)
        shell("iptables", "-w", "-F", "INPUT")
        ipset.destroy(LINUX)
        with pytest.raises(NotThere):
            sets.add([ban("192.0.2.1")])
        with pytest.raises(NotThere):
            sets.list()
        shell(
            "ipset", "restore", text="create rstguard-ban4 hash:net timeout 0 comment maxelem 1\n"
        )
        with pytest.raises(Full):
            sets.add([ban("192.0.2.1"), ban("192.0.2.2")])
