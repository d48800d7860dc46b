"""Connection tables as a sweep judges them: objects, and columns where numpy is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import pytest

from rstguard.engine.flow import Flow
from rstguard.engine.listed import Listed
from rstguard.engine.table import Table

AsTable = Callable[[Iterable[Flow]], Table]


def as_columns(flows: Iterable[Flow]) -> Table:
    """Return connections as columns; the test is skipped where numpy is missing."""
    made: Table = pytest.importorskip("rstguard.engine.columns").Columns.of(flows)
    return made


KINDS: dict[str, AsTable] = {"objects": Listed, "columns": as_columns}


def best_table(flows: Iterable[Flow]) -> Table:
    """Return connections as the guard's own kernel would give them to a sweep here."""
    return as_columns(flows) if importlib.util.find_spec("numpy") else Listed(flows)
