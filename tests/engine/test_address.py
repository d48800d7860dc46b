"""Addresses as tagged integers: text in, text out, and never one family for the other."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import (
    LEAST_IPV6,
    V6,
    Networks,
    Prefix,
    address_text,
    is_v6,
    packed,
    parse_address,
    parse_prefix,
    prefix_of,
    source_key,
    source_of_key,
)
from rstguard.policy.base import DestinationWidths, Widths

addresses = st.ip_addresses().map(str)


@given(addresses)
def test_text_and_bytes_round_trip(text: str) -> None:
    tagged = parse_address(text)
    assert address_text(tagged) == text
    assert packed(tagged) == ipaddress.ip_address(text).packed
    assert is_v6(tagged) is (":" in text)


@given(addresses, st.integers(0, 32), st.integers(0, 128))
def test_a_prefix_is_what_ipaddress_says(text: str, ipv4: int, ipv6: int) -> None:
    tagged = parse_address(text)
    prefix = prefix_of(tagged, ipv4, ipv6)
    network = ipaddress.ip_network((text, ipv6 if ":" in text else ipv4), strict=False)
    assert prefix == parse_prefix(str(network))
    assert prefix.covers(tagged)


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 32), st.integers(0, 128))
def test_no_prefix_covers_the_other_family(number: int, ipv4: int, ipv6: int) -> None:
    assert not prefix_of(number, ipv4, ipv6).covers(number | V6)
    assert not prefix_of(number | V6, ipv4, ipv6).covers(number)


@given(st.integers(0, 0xFFFFFFFF), st.integers(8, 32), st.integers(LEAST_IPV6, 128))
def test_no_key_is_that_of_the_other_family(number: int, ipv4: int, ipv6: int) -> None:
    """The IPv6 address is the one whose key comes nearest."""
    key = source_key(number, ipv4, ipv6)
    address = V6 | key << 128 - ipv6 & V6 - 1
    assert source_key(address, ipv4, ipv6) != key
    assert source_of_key(key, ipv4, ipv6) == prefix_of(number, ipv4, ipv6)
    of_v6 = source_of_key(source_key(address, ipv4, ipv6), ipv4, ipv6)
    assert of_v6 == prefix_of(address, ipv4, ipv6)


@pytest.mark.parametrize(
    "widths", [lambda n: Widths(ipv6=n), lambda n: DestinationWidths(destination_ipv6=n)]
)
def test_no_policy_counts_by_keys_that_would_be(widths: Callable[[int], object]) -> None:
    ours, theirs = V6 | 1 << 104, parse_address("1.0.0.1")
    assert source_key(ours, 32, 24) == source_key(theirs, 32, 24)
    assert widths(LEAST_IPV6)
    with pytest.raises(ValueError, match="write a number from 32 to 128"):
        widths(LEAST_IPV6 - 1)


def test_everything_is_covered_by_a_prefix_of_length_0() -> None:
    assert parse_prefix("0.0.0.0/0").covers(0xFFFFFFFF)
    assert parse_prefix("::/0").covers((1 << 128) - 1 | V6)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1/32", "192.0.2.1"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("2001:db8::/64", "2001:db8::/64"),
        ("2001:db8::1/128", "2001:db8::1"),
    ],
)
def test_prefix_text(text: str, shown: str) -> None:
    assert str(parse_prefix(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "192.0.2.256", "192.0.2.1/33", "192.0.2.1/24", "::1/129", "x"]
)
def test_what_is_no_prefix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_prefix(text)


def test_prefix_shift_counts_host_bits() -> None:
    assert Prefix(0, 24).shift == 8
    assert Prefix(V6, 64).shift == 64


few = st.sampled_from([0, 1, 8, 9, 24, 31, 32, 64, 128])


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    v6 = draw(st.booleans())
    length = min(draw(few), 128 if v6 else 32)
    bits = draw(st.integers(0, 3)) << (126 if v6 else 30) | draw(st.integers(0, 3))
    return prefix_of(bits | V6 if v6 else bits, length, length)


@given(st.lists(prefixes(), max_size=6), st.lists(prefixes(), min_size=1, max_size=6))
def test_many_networks_are_met_as_each_would_be(many: list[Prefix], asked: list[Prefix]) -> None:
    networks = Networks(many)
    for prefix in asked:
        meeting = [o for o in many if o.covers(prefix.network) or prefix.covers(o.network)]
        found = networks.meets(prefix)
        assert (found in meeting) if meeting else found is None
