"""Whom rows of columns are counted against, as one number each.  Needs numpy.

The number, a code, is the key of `rstguard.engine.keys` for IPv4.  A key of IPv6 may be longer than
64 bits: its code says which of the keys that are there it is, and so is good for one sweep only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.address import V6, Prefix, source_key
from rstguard.engine.ruleset import Per, Rule

Column = NDArray[Any]

_OF_V6: Final = 1 << 63


class Rows(Protocol):
    """Columns by their names (`rstguard.engine.columns.COLUMNS`)."""

    any_v6: bool

    def __getitem__(self, name: str, /) -> Column: ...


class Keys(NamedTuple):
    """A code for each row, and the keys that those of IPv6 stand for, by their halves."""

    codes: Column
    widths: tuple[int, int] | None
    """Of the addresses; None: the keys are services."""
    high: Column
    low: Column
    ports: Column

    def key(self, code: int) -> int:
        """Return the key that a code stands for."""
        if code < _OF_V6:
            return code
        number = code - _OF_V6
        address = V6 | int(self.high[number]) << 64 | int(self.low[number])
        if self.widths is None:
            return address << 16 | int(self.ports[number])
        return source_key(address, *self.widths)

    def numbered(self, codes: Column, numbers: Column) -> dict[int, int]:
        """Return numbers by the keys for which these ascending codes stand."""
        counts = numbers.tolist()
        four = int(np.searchsorted(codes, np.uint64(_OF_V6)))
        keys = [*codes[:four].tolist(), *map(self.key, codes[four:].tolist())]
        return dict(zip(keys, counts, strict=True))

    def codes_of(self, keys: Iterable[int]) -> Column:
        """Return the codes of those of some keys that have one."""
        found = [key for key in keys if key < _OF_V6]
        if len(self.high):
            wanted = set(keys)
            codes = range(_OF_V6, _OF_V6 + len(self.high))
            found += [code for code in codes if self.key(code) in wanted]
        return np.array(found, "u8")


_NONE: Final = np.empty(0, "u8")


def of_rule(rows: Rows, at: Column, rule: Rule) -> Keys:
    """Return whom a rule counts some rows against."""
    widths = rule.ipv4_length, rule.ipv6_length
    if rule.per is Per.DESTINATION:
        return _prefixes(rows, at, widths, "destination")
    if rule.per is not Per.SERVICE:
        return sources(rows, at, widths)
    return services(rows, at)


def services(rows: Rows, at: Column) -> Keys:
    """Return the services of some rows, by destination and port."""
    ports = rows["destination_port"][at].astype("u8")
    low = rows["destination"][at]
    codes = low << np.uint64(16) | ports
    if not rows.any_v6:
        return Keys(codes, None, _NONE, _NONE, _NONE)
    six = np.flatnonzero(rows["v6"][at])
    high, low, ports = rows["destination_high"][at][six], low[six], ports[six]
    numbers, first = _numbered(high, low, ports)
    codes[six] = numbers + np.uint64(_OF_V6)
    return Keys(codes, None, high[first], low[first], ports[first])


def sources(rows: Rows, at: Column, widths: tuple[int, int]) -> Keys:
    """Return the sources of some rows, by so many bits of an IPv4 and of an IPv6 address."""
    return _prefixes(rows, at, widths, "source")


def _prefixes(rows: Rows, at: Column, widths: tuple[int, int], end: str) -> Keys:
    low = rows[end][at]
    codes = low >> np.uint64(32 - widths[0])
    if not rows.any_v6:
        return Keys(codes, widths, _NONE, _NONE, _NONE)
    six = np.flatnonzero(rows["v6"][at])
    high, low = _cut(rows[f"{end}_high"][at][six], low[six], widths[1])
    numbers, first = _numbered(high, low)
    codes[six] = numbers + np.uint64(_OF_V6)
    return Keys(codes, widths, high[first], low[first], _NONE)


def _cut(high: Column, low: Column, length: int) -> tuple[Column, Column]:
    """Return the halves of IPv6 addresses without their host bits."""
    kept = ((1 << 128) - 1) >> 128 - length << 128 - length
    return high & np.uint64(kept >> 64), low & np.uint64(kept & (1 << 64) - 1)


def covered(rows: Rows, at: Column, end: str, prefixes: Iterable[Prefix]) -> Column:
    """Tell of each row whether one of some prefixes covers its source, or destination."""
    found = np.zeros(len(at), bool)
    low, v6 = rows[end][at], rows["v6"][at]
    for prefix in prefixes:
        network = prefix.network
        if network < V6:
            shift = np.uint64(prefix.shift)
            found |= ~v6 & (low >> shift == np.uint64(network) >> shift)
        elif rows.any_v6:
            upper, lower = _cut(rows[f"{end}_high"][at], low, prefix.length)
            wanted = np.uint64(network >> 64 & (1 << 64) - 1), np.uint64(network & (1 << 64) - 1)
            found |= v6 & (upper == wanted[0]) & (lower == wanted[1])
    return found


def _numbered(first: Column, *more: Column) -> tuple[Column, Column]:
    """Number the different combinations of some columns; return each row's, and where each is."""
    numbers = _ranks(first)
    for column in more:
        ranks = _ranks(column)
        most = ranks.max(initial=np.uint64(0)) + np.uint64(1)
        numbers = _ranks(numbers * most + ranks)  # below the square of the rows
    places = np.empty(int(numbers.max(initial=np.uint64(0))) + 1, "i8")
    places[numbers] = np.arange(len(numbers))
    return numbers, places[: len(numbers)]


def _ranks(column: Column) -> Column:
    return np.unique(column, return_inverse=True)[1].astype("u8")


def numbers_in(codes: Column) -> tuple[Column, Column]:
    """Return the different codes, ascending, and how often each is there."""
    ordered = np.sort(codes)
    begins = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    begins = begins[: len(ordered)]
    return ordered[begins], np.diff(np.append(begins, len(ordered)))


def among(codes: Column, wanted: Column) -> Column:
    """Return where codes are that are wanted."""
    return _found(codes, np.sort(wanted))[0]


def gathered(codes: Column, wanted: Column) -> tuple[Column, Column, Column]:
    """Return where codes are that are wanted, alike ones side by side in the order of `codes`.

    Also returns the different ones, ascending, and how many there are of each.
    """
    ordered = np.sort(wanted)
    found, which = _found(codes, ordered)
    # What fits into 16 bits is sorted by its digits, which is many times as fast.
    order = np.argsort(which.astype(np.min_scalar_type(len(ordered))), kind="stable")
    counts = np.bincount(which, minlength=len(ordered))
    there = counts > 0
    return found[order], ordered[there], counts[there]


def _found(codes: Column, ordered: Column) -> tuple[Column, Column]:
    """Return where codes are that are among some, and which of them each is."""
    if not len(ordered):
        return np.empty(0, "i8"), np.empty(0, "i8")
    place = np.searchsorted(ordered, codes)
    place[place == len(ordered)] = 0
    found = np.flatnonzero(ordered[place] == codes)
    return found, place[found]
