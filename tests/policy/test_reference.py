"""The reference of the policy language is that of its models."""

from __future__ import annotations

import os
from pathlib import Path

from rstguard.policy.reference import reference
from rstguard.policy.rules import MEASURES

FILE = Path(__file__).parent.parent.parent / "docs" / "policy.md"


def test_it_is_current() -> None:
    if os.environ.get("GOLDEN") == "write":
        head = FILE.read_text().partition("## Keys of the file")[0]
        FILE.write_text(head + reference())
    assert FILE.read_text().endswith(reference())


def test_it_has_every_measure() -> None:
    for measure in MEASURES:
        assert f"`{measure}`" in reference()
