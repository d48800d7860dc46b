"""Tables: what a person writes, and what it means or why it means nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import V6, Prefix
from rstguard.engine.ruleset import SECOND
from rstguard.policy.quantities import (
    DAY,
    HOUR,
    MILLISECOND,
    MINUTE,
    PortRange,
    Rate,
    byte_rate,
    count,
    duration,
    duration_text,
    expand,
    network,
    ports,
    ports_text,
    rate,
    rate_per_second,
    show,
    size,
)

any_time = duration(0, 10**6 * DAY)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("10s", 10 * SECOND),
        ("10 s", 10 * SECOND),
        ("10m", 10 * MINUTE),
        ("24h", DAY),
        ("7d", 7 * DAY),
        ("2w", 14 * DAY),
        ("1y", 365 * DAY),
        ("250ms", 250 * MILLISECOND),
        ("0.5s", 500 * MILLISECOND),
        ("1h30m", HOUR + 30 * MINUTE),
        ("1h 30m 5s", HOUR + 30 * MINUTE + 5 * SECOND),
        ("1m1ms", MINUTE + MILLISECOND),
        ("0s", 0),
    ],
)
def test_durations(written: str, meant: int) -> None:
    assert any_time(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("100/s", Rate(100, SECOND)),
        ("100 / s", Rate(100, SECOND)),
        ("+5/s", Rate(5, SECOND)),
        ("10/m", Rate(10, MINUTE)),
        ("500/h", Rate(500, HOUR)),
        ("2000/d", Rate(2000, DAY)),
        ("10000000/s", Rate(10_000_000, SECOND)),
    ],
)
def test_rates(written: str, meant: Rate) -> None:
    assert rate(written) == meant


@pytest.mark.parametrize(
    ("read", "written", "meant"),
    [
        (byte_rate, "50 B/s", 50),
        (byte_rate, "50B/s", 50),
        (byte_rate, "1.5 kB/s", 1500),
        (byte_rate, "10 MB/s", 10_000_000),
        (byte_rate, "10 MiB/s", 10 << 20),
        (byte_rate, "1 GiB /s", 1 << 30),
        (size, "64 B", 64),
        (size, "2 KiB", 2048),
        (size, "1 GB", 10**9),
        (rate_per_second, "20000/s", 20000),
        (count(1, 10), 10, 10),
    ],
)
def test_plain_numbers(read: Callable[[object], int], written: object, meant: int) -> None:
    assert read(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (22, PortRange(22, 22)),
        ("22", PortRange(22, 22)),
        (1, PortRange(1, 1)),
        (65535, PortRange(65535, 65535)),
        ("8000-8100", PortRange(8000, 8100)),
        ("8000 - 8100", PortRange(8000, 8100)),
        ("80-80", PortRange(80, 80)),
    ],
)
def test_ports(written: object, meant: PortRange) -> None:
    assert ports(written) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("192.0.2.1", Prefix(0xC0000201, 32)),
        ("10.0.0.0/8", Prefix(0x0A000000, 8)),
        ("0.0.0.0/0", Prefix(0, 0)),
        ("2001:db8::/48", Prefix(V6 | 0x20010DB8 << 96, 48)),
        ("::1", Prefix(V6 | 1, 128)),
        ("::/0", Prefix(V6, 0)),
    ],
)
def test_networks(written: str, meant: Prefix) -> None:
    assert network(written) == meant


@pytest.mark.parametrize(
    ("read", "written", "said"),
    [
        (any_time, 600, "has no unit: write 600s"),
        (any_time, "600", "not a duration"),
        (any_time, "ten minutes", "not a duration"),
        (any_time, "-5s", "not a duration"),
        (any_time, "5m1h", "largest first"),
        (any_time, "5m5m", "each unit once"),
        (any_time, "\u0661s", "not a duration"),
        (any_time, "9" * 40 + "s", "not a duration"),
        (any_time, None, "not a duration"),
        (any_time, ["10s"], "not a duration"),
        (any_time, True, "not a duration"),
        (duration(SECOND, MINUTE), "1ms", "too short: write 1s or more"),
        (duration(SECOND, MINUTE), "61s", "too long: write 1m or less"),
        (duration(SECOND, MINUTE, ", or rest"), "61s", "1m or less, or rest"),
        (rate, "0/s", "at least 1/s"),
        (rate, "0.0/m", "at least 1/m"),
        (rate, "-1/s", "negative"),
        (rate, "0.5/s", "30/m"),
        (rate, 100, "has no period: write 100/s"),
        (rate, "100", "not a rate"),
        (rate, "100/fortnight", "not a rate"),
        (rate, "100/ms", "not a rate"),
        (rate, "10000001/s", "at most 10000000/s"),
        (rate, {}, "not a rate"),
        (rate_per_second, "100/m", "not per second"),
        (byte_rate, 50, "not a byte rate"),
        (byte_rate, "50 B", "not a byte rate"),
        (byte_rate, "50/s", "not a byte rate"),
        (byte_rate, "10 Mbit/s", "not a byte rate"),
        (byte_rate, "10 KB/s", "not a byte rate"),
        (byte_rate, "0 B/s", "less than one byte"),
        (byte_rate, "-5 B/s", "not a byte rate"),
        (size, "20", "not a size"),
        (size, "0.1 B", "less than one byte"),
        (count(1, 10), 0, "from 1 to 10"),
        (count(1, 10), 11, "from 1 to 10"),
        (count(1, 10), "5/s", "is a rate"),
        (count(1, 10), "5", "not a whole number"),
        (count(1, 10), 5.0, "not a whole number"),
        (count(1, 10), True, "not a whole number"),
        (ports, 0, "ports are 1 to 65535"),
        (ports, 65536, "ports are 1 to 65535"),
        (ports, -22, "ports are 1 to 65535"),
        (ports, 10**30, "ports are 1 to 65535"),
        (ports, "8100-8000", 'write "8000-8100"'),
        (ports, "1-65536", "65536 does not exist"),
        (ports, "http", "not a port"),
        (ports, "1-2-3", "not a port"),
        (ports, 80.0, "not a port"),
        (ports, True, "not a port"),
        (network, "10.1.2.3/8", "write 10.0.0.0/8 for the network, or 10.1.2.3"),
        (network, "2001:db8::1/48", "write 2001:db8::/48"),
        (network, "10.0.0.0/33", "at most /32"),
        (network, "::/129", "at most /128"),
        (network, "10.0.0.0/255.0.0.0", "no prefix length"),
        (network, "10.0.0.0/", "no prefix length"),
        (network, "example.org", "not an address"),
        (network, "010.0.0.1", "not an address"),
        (network, "", "not an address"),
        (network, "fe80::1%eth0", "has a zone: write it without, as fe80::1"),
        (network, 10, "in quotes"),
    ],
)
def test_what_is_wrong_is_said(
    read: Callable[[object], object], written: object, said: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(written)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(min_value=0, max_value=10**7))
def test_a_duration_is_written_as_it_is_read(milliseconds: int) -> None:
    assert any_time(duration_text(milliseconds * MILLISECOND)) == milliseconds * MILLISECOND


@given(st.sets(st.integers(min_value=1, max_value=65535)))
def test_ports_are_written_as_they_are_read(numbers: set[int]) -> None:
    text = ports_text(frozenset(numbers))
    assert expand(ports(part) for part in text.split(", ") if part) == numbers


def test_ranges_may_overlap() -> None:
    assert expand([PortRange(5, 9), PortRange(1, 6), PortRange(2, 3)]) == set(range(1, 10))


def test_text_of_rates_and_ranges() -> None:
    assert str(Rate(100, SECOND)) == "100/s"
    assert str(Rate(10, MINUTE)) == "10/m"
    assert str(PortRange(22, 22)) == "22"
    assert str(PortRange(1, 9)) == "1-9"
    assert duration_text(5) == "less than 1ms"


@given(st.text() | st.integers() | st.booleans())
def test_a_quoted_value_stays_on_one_short_line(value: object) -> None:
    text = show(value)
    assert text.isprintable()
    assert len(text) <= 44
