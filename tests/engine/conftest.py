"""Sweeps are tested with both kinds of tables."""

from __future__ import annotations

import pytest

from tests.support.tables import KINDS, AsTable


@pytest.fixture(params=KINDS)
def as_table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsTable:
    """Return what makes a table of one kind, then of the other; lists are judged as it, too."""
    kind = KINDS[request.param]
    monkeypatch.setattr("rstguard.engine.sweep.Listed", kind)
    return kind
