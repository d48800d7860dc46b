"""What doctor says of the NFLOG groups that the guard reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from rstguard.kernel import surroundings
from rstguard.kernel.check import Check, Outcome
from tests.support.fake_kernel import FakeKernel

NAME = "log groups 5640 to 5643"


def told(monkeypatch: pytest.MonkeyPatch, listed: Path) -> Check:
    monkeypatch.setattr(surroundings, "_LOG", listed)
    return next(check for check in surroundings.checks(FakeKernel()) if check.name == NAME)


def test_groups_that_others_read_are_named_with_what_they_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed = tmp_path / "nfnetlink_log"
    listed.write_text(
        "    7   911 2 65535 100  1\n 5641   912 2 160 100  1\n 5643   9 2 128 100  1\n"
    )
    check = told(monkeypatch, listed)
    assert check.outcome is Outcome.WARNING
    assert "where forwarded ports lead and refusing connections" in check.sentence
    assert check.sentence.endswith(": 5641, 5643")


@pytest.mark.parametrize("text", [None, "", "    7   911 2 65535 100  1\n"])
def test_groups_that_nobody_reads_are_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None
) -> None:
    listed = tmp_path / "nfnetlink_log"
    if text is not None:
        listed.write_text(text)
    assert told(monkeypatch, listed) == Check(NAME, Outcome.OK, f"nobody reads {NAME}")
