"""The quantities of the policy language: `10m`, `100/s`, `50 B/s`, `"8000-8100"`, `10.0.0.0/8`.

Each reader takes whatever YAML made of a value and returns a plain number or tuple, or raises
`ValueError` with a sentence that says what is wrong and what would be right.  Times become integer
nanoseconds, sizes bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple

from rstguard.engine.address import V6, Prefix, parse_prefix
from rstguard.engine.ruleset import SECOND

_PERCENT = re.compile(r"(\d{1,3})\s?%")
MILLISECOND = SECOND // 1000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR

TIME_UNITS = MappingProxyType(
    {
        "y": 365 * DAY,
        "w": 7 * DAY,
        "d": DAY,
        "h": HOUR,
        "m": MINUTE,
        "s": SECOND,
        "ms": MILLISECOND,
    }
)
SIZE_UNITS = MappingProxyType(
    {
        "B": 1,
        "kB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
    }
)

# ASCII digits only: \d would let through the digits of every script.
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_TIME = re.compile(rf"({_NUMBER}) ?(ms|[ywdhms])")
_TIMES = re.compile(rf"(?:{_NUMBER} ?(?:ms|[ywdhms]) ?)+")
_RATE = re.compile(r"([+-]?)([0-9]{1,15}(?:\.[0-9]{1,9})?) ?/ ?([smhd])")
_SIZE = re.compile(rf"({_NUMBER}) ?([kMG]?B|[KMG]iB)")
_PORTS = re.compile(r"([0-9]{1,15})(?: ?- ?([0-9]{1,15}))?")


class Rate(NamedTuple):
    """`amount` events in each `period` nanoseconds."""

    amount: int
    period: int

    def __str__(self) -> str:
        return f"{self.amount}/{duration_text(self.period).removeprefix('1')}"


class PortRange(NamedTuple):
    """Ports from `first` to `last`, both included (1-65535)."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def show(value: object) -> str:
    """Return a value as a message quotes it: on one line, and short."""
    text = repr(value) if isinstance(value, str) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 44 else f"{text[:40]}..."


def count(low: int, high: int) -> Callable[[object], int]:
    """Return a reader of whole numbers from `low` to `high`."""

    def read(value: object) -> int:
        if isinstance(value, str) and "/" in value:
            raise ValueError(f"{show(value)} is a rate, but this is a plain number: write 200")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{show(value)} is not a whole number: write one from {low} to {high}")
        if not low <= value <= high:
            raise ValueError(f"{show(value)} is out of range: write a number from {low} to {high}")
        return value

    return read


def mark_bits(value: object) -> int:
    """Read the bits of a mark that are the guard's: eight adjacent ones of 32."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
        raise ValueError(f"{show(value)} is no mask of a mark: write one as 0xff000000")
    lowest = value & -value
    if value != 0xFF * lowest:
        raise ValueError(
            f"0x{value:x} is not eight adjacent bits, which the guard needs: write a mask as "
            "0xff000000 or 0x00ff0000"
        )
    return value


def percent(low: int, high: int) -> Callable[[object], int]:
    """Return a reader of percentages, as `80%`, from `low` to `high`."""

    def read(value: object) -> int:
        match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise ValueError(f"{show(value)} is not a percentage: write one as {low}%")
        if not low <= int(match[1]) <= high:
            raise ValueError(f"{show(value)} is out of range: write {low}% to {high}%")
        return int(match[1])

    return read


def duration(low: int, high: int, advice: str = "") -> Callable[[object], int]:
    """Return a reader of times from `low` to `high` (nanoseconds); `advice` follows "too long"."""

    def read(value: object) -> int:
        nanoseconds = _duration(value)
        if nanoseconds < low:
            raise ValueError(f"{show(value)} is too short: write {duration_text(low)} or more")
        if nanoseconds > high:
            longest = duration_text(high)
            raise ValueError(f"{show(value)} is too long: write {longest} or less{advice}")
        return nanoseconds

    return read


def duration_or_never(low: int, high: int) -> Callable[[object], int | None]:
    """Return a reader of times from `low` to `high` (nanoseconds) or `never`, which is None."""
    timed = duration(low, high, ", or never")

    def read(value: object) -> int | None:
        return None if value == "never" else timed(value)

    return read


def _duration(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{show(value)} has no unit: write {show(f'{value}s')[1:-1]} for seconds")
    if not isinstance(value, str) or not _TIMES.fullmatch(value):
        raise ValueError(
            f"{show(value)} is not a duration: write a number and a unit, as 500ms, 10s, 15m, 2h, "
            "7d or 1h30m"
        )
    parts = [(Decimal(number), TIME_UNITS[unit]) for number, unit in _TIME.findall(value)]
    units = [unit for _, unit in parts]
    if sorted(set(units), reverse=True) != units:
        raise ValueError(f"{show(value)} is not a duration: write each unit once, largest first")
    return int(sum(number * unit for number, unit in parts))


def rate(value: object) -> Rate:
    """Read `100/s`, `10/m`, `500/h` or `2000/d`.

    Raises:
        ValueError: another form, an amount below 1, or more than 10,000,000 a second.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{show(value)} has no period: write {show(f'{value}/s')[1:-1]}")
    match = _RATE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{show(value)} is not a rate: write an amount a time, as 100/s or 10/m")
    sign, number, unit = match.groups()
    if sign == "-":
        raise ValueError(f"{show(value)} is negative: write a rate of at least 1, as 100/s or 10/m")
    if not Decimal(number):
        raise ValueError(
            f"{show(value)} would object to every packet: write at least 1/{unit}, or remove it"
        )
    if "." in number:
        raise ValueError(f"{show(value)} is not whole: write it over a longer time, as 30/m")
    result = Rate(int(number), TIME_UNITS[unit])
    if result.amount * SECOND > 10_000_000 * result.period:
        raise ValueError(f"{show(value)} is never reached: write at most 10000000/s")
    return result


def rate_per_second(value: object) -> int:
    """Read a rate a second and return its amount.

    Raises:
        ValueError: not a rate, or one over a longer time.
    """
    result = rate(value)
    if result.period != SECOND:
        raise ValueError(f"{show(value)} is not per second: write an amount a second, as 20000/s")
    return result.amount


def size(value: object) -> int:
    """Read `64 B`, `20 MB` or `4 MiB` and return bytes, at least 1.

    Raises:
        ValueError: another form or unit, or less than a byte.
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        units = ", ".join(SIZE_UNITS)
        raise ValueError(f"{show(value)} is not a size: write a number and one of {units}")
    result = int(Decimal(match[1]) * SIZE_UNITS[match[2]])
    if result < 1:
        raise ValueError(f"{show(value)} is less than one byte: write at least 1 B")
    return result


def byte_rate(value: object) -> int:
    """Read `50 B/s` or `10 MB/s` and return bytes a second, at least 1.

    Raises:
        ValueError: another form or unit, or less than a byte a second.
    """
    text = value.strip() if isinstance(value, str) else ""
    match = _SIZE.fullmatch(text.removesuffix("/s").rstrip()) if text.endswith("/s") else None
    if match is None:
        raise ValueError(
            f"{show(value)} is not a byte rate: write bytes a second, as 50 B/s, 200 kB/s or "
            f"10 MiB/s"
        )
    result = int(Decimal(match[1]) * SIZE_UNITS[match[2]])
    if result < 1:
        raise ValueError(f"{show(value)} is less than one byte a second: write at least 1 B/s")
    return result


def ports(value: object) -> PortRange:
    """Read a port, or a range such as `"8000-8100"`.

    Raises:
        ValueError: another form, a port outside 1-65535, or an inverted range.
    """
    match = None
    if not isinstance(value, bool) and isinstance(value, int | str):
        match = _PORTS.fullmatch(str(value)) if len(str(value)) < 40 else None
    if match is None and isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"port {show(value)} does not exist: ports are 1 to 65535")
    if match is None:
        raise ValueError(f'{show(value)} is not a port: write a number, or a range as "8000-8100"')
    first, last = int(match[1]), int(match[2] or match[1])
    for port in (first, last):
        if not 1 <= port <= 65535:
            raise ValueError(f"port {port} does not exist: ports are 1 to 65535")
    if last < first:
        raise ValueError(f'the range {first}-{last} is upside down: write "{last}-{first}"')
    return PortRange(first, last)


def port(value: object) -> int:
    """Read a key that is one port; the document gives keys as text."""
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if type(number) is int and 1 <= number <= 65535:
        return number
    raise ValueError(f"{show(value)} is not a port: write one number from 1 to 65535")


def network(value: object) -> Prefix:
    """Read an address or a network of either family.

    Raises:
        ValueError: another form, or bits set beyond the prefix length.
    """
    if not isinstance(value, str):
        raise ValueError(f'{show(value)} is not an address: write it in quotes, as "192.0.2.0/24"')
    address, slash, length = value.partition("/")
    if "%" in address:
        raise ValueError(f"{show(value)} has a zone: write it without, as {address.split('%')[0]}")
    if slash and not re.fullmatch("[0-9]{1,3}", length):
        raise ValueError(f"{show(value)} has no prefix length: write as 192.0.2.0/24")
    try:
        whole = parse_prefix(address)
    except ValueError:
        wanted = "write one as 192.0.2.1, 192.0.2.0/24 or 2001:db8::/48"
        raise ValueError(f"{show(value)} is not an address or a network: {wanted}") from None
    if not slash:
        return whole
    bits, most = int(length), whole.length
    if bits > most:
        family = "IPv6" if whole.network >= V6 else "IPv4"
        raise ValueError(f"{show(value)} is too long a prefix: {family} has at most /{most}")
    open_bits = most - bits
    found = Prefix(whole.network >> open_bits << open_bits, bits)
    if found.network != whole.network:
        raise ValueError(
            f"{show(value)} has bits set beyond /{bits}: write {found} for the network, or "
            f"{address} for the one address"
        )
    return found


def expand(ranges: Iterable[PortRange]) -> frozenset[int]:
    """Return every port of some ranges, which may overlap."""
    found: set[int] = set()
    done = 0
    for first, last in sorted(ranges):
        found.update(range(max(first, done + 1), last + 1))
        done = max(done, last)
    return frozenset(found)


def duration_text(nanoseconds: int) -> str:
    """Return a time as a policy file writes it: `10m`, `1h30m`, `500ms`."""
    if not nanoseconds:
        return "0s"
    text = ""
    for unit, length in TIME_UNITS.items():
        if unit in "yw":  # days are easier to compare with each other
            continue
        amount, nanoseconds = divmod(nanoseconds, length)
        if amount:
            text += f"{amount}{unit}"
    return text or "less than 1ms"


def ports_text(numbers: frozenset[int]) -> str:
    """Return ports as a policy file writes them, runs of them as ranges: `22, 8000-8100`."""
    runs: list[PortRange] = []
    for port in sorted(numbers):
        if runs and runs[-1].last == port - 1:
            runs[-1] = PortRange(runs[-1].first, port)
        else:
            runs.append(PortRange(port, port))
    return ", ".join(map(str, runs))
