"""When a rule bans too many, and when a network holds too many of the banned."""

from __future__ import annotations

import pytest

from rstguard.engine.address import Prefix, parse_prefix
from rstguard.engine.capping import MOST_MEMBERS, BanCap, Members, wide


@pytest.mark.parametrize(
    ("source", "network"),
    [
        ("198.51.100.7", "198.51.100.0/24"),
        ("198.51.100.16/28", "198.51.100.0/24"),
        ("198.51.100.0/24", "198.51.100.0/24"),
        ("198.51.0.0/16", "198.51.0.0/16"),
        ("2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("2001:db8::/32", "2001:db8::/32"),
    ],
)
def test_what_a_source_counts_as(source: str, network: str) -> None:
    assert wide(parse_prefix(source)) == parse_prefix(network)


def test_a_rule_is_over_when_it_bans_in_too_many_networks_of_a_minute() -> None:
    cap = BanCap(60)
    steps = ((0, 1), (30, 2), (31, 2), (70, 3), (80, 4), (81, 4))
    found = [cap.over("rule", parse_prefix(f"198.51.{n}.7"), 2, now) for now, n in steps]
    assert found == [False, False, False, False, True, True]
    assert not cap.over("other", parse_prefix("198.51.1.7"), 2, 81)
    assert (cap.count("rule", 129), cap.count("rule", 200), cap.count("none", 0)) == (2, 0, 0)


def test_what_a_rule_banned_is_remembered_no_longer_than_needed() -> None:
    cap = BanCap(60)
    for number in range(10_000):
        cap.over("rule", Prefix(number << 8, 32), 5, 0)
    assert cap.count("rule", 0) == 6
    cap.forget()
    assert cap.count("rule", 0) == 0


def member(number: int) -> Prefix:
    return parse_prefix(f"198.51.100.{number}")


def test_a_network_is_gated_with_the_ban_that_is_one_too_many() -> None:
    members, network = Members(), parse_prefix("198.51.100.0/24")
    for number in range(MOST_MEMBERS):
        assert members.gate(member(number), 100, 0) is None
        assert members.gate(member(number), 100, 0) is None
    assert members.gate(member(16), 20, 0) == (network, 100)  # the longest of them
    assert members.gate(member(17), 90, 1) is None  # it is gated for longer
    assert members.gate(member(17), 200, 1) == (network, 200)


def test_bans_that_are_over_or_lifted_do_not_count() -> None:
    members = Members()
    for number in range(MOST_MEMBERS):
        members.gate(member(number), 10, 0)
    members.freed(member(3))
    assert members.gate(member(20), 100, 0) is None
    assert members.gate(member(21), 100, 50) is None


def test_a_source_as_wide_as_a_network_is_no_member() -> None:
    members = Members()
    assert not any(members.gate(Prefix(n << 8, 24), 100, 0) for n in range(99))


def test_the_memory_of_networks_is_bounded() -> None:
    members = Members()
    for number in range(70_000):
        members.gate(Prefix(number << 8, 32), 100, 0)
    assert len(members._until) == 65_536
