"""Names of connections that stand in columns, made only when somebody asks for them.  Needs numpy.

To make an object of each connection takes longer than all else that a sweep does with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rstguard.engine.address import V6
from rstguard.engine.flow import Tuple
from rstguard.engine.grouping import Rows

Column = NDArray[Any]

_NAMES: Final = ("source", "destination", "source_port", "destination_port")
_OF_V6: Final = ("v6", "source_high", "destination_high")
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
"""An odd number with bits all over: what is multiplied by it differs in its upper bits as well."""


class Named:
    """The names of some rows of a table, without their zones."""

    def __init__(self, table: Rows, rows: Column) -> None:
        names = _NAMES + _OF_V6 if table.any_v6 else _NAMES
        self._columns = {name: table[name][rows] for name in names}

    def between(self, begin: int, end: int) -> Paths:
        """Return those of some rows that follow each other."""
        return Paths(self, begin, end)

    def repeat(self) -> bool:
        """Tell whether two may have one name: surely, if so; hardly ever, if not."""
        mixed = np.zeros(len(self._columns["source"]), "u8")
        for column in self._columns.values():
            mixed = (mixed ^ mixed >> np.uint64(32) ^ column.astype("u8")) * _SPREAD
        mixed.sort()
        return bool((mixed[1:] == mixed[:-1]).any())

    def made(self, begin: int, end: int) -> list[Tuple]:
        """Make the names of some rows that follow each other."""
        columns = [column[begin:end].tolist() for column in self._columns.values()]
        if len(columns) == len(_NAMES):
            return [Tuple(*row) for row in zip(*columns, strict=True)]
        return [_name(*row) for row in zip(*columns, strict=True)]


class Paths:
    """Names of connections, each once: how many there are, and they themselves."""

    __slots__ = ("_begin", "_end", "_named")

    def __init__(self, named: Named, begin: int, end: int) -> None:
        self._named, self._begin, self._end = named, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    def __iter__(self) -> Iterator[Tuple]:
        return iter(self._named.made(self._begin, self._end))


def _name(
    source: int, destination: int, source_port: int, destination_port: int,
    v6: bool, source_high: int, destination_high: int,
) -> Tuple:  # fmt: skip
    if v6:
        source |= V6 | source_high << 64
        destination |= V6 | destination_high << 64
    return Tuple(source, destination, source_port, destination_port)
