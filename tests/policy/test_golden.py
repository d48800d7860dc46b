"""Whole policy files and what comes of them.

For each golden/*.yaml, the compiled form with its warnings stands in *.ok, or, for a file that must
fail, its messages in *.err.  After a change that is meant, write them anew with

    GOLDEN=write pytest tests/policy/test_golden.py

and read the difference before it is committed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rstguard.policy.compile import compile_policy, describe
from rstguard.policy.load import PolicyError, parse

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).parent.parent.parent / "policies"
FILES = sorted(GOLDEN.glob("*.yaml")) + sorted(SAMPLES.glob("*.yaml"))


def outcome(path: Path) -> tuple[str, str]:
    """Return the suffix and text of what a policy file comes to, with eth0 and wan0 existing."""
    try:
        loaded = parse(path.read_bytes(), path.name, interfaces=["eth0", "wan0", "ppp1", "lo"])
    except PolicyError as error:
        return ".err", f"{error}\n"
    warnings = "".join(f"{warning}\n" for warning in loaded.warnings)
    return ".ok", warnings + describe(compile_policy(loaded.policy))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    suffix, text = outcome(path)
    assert (suffix == ".err") == path.name.startswith("bad-"), text
    expected = (GOLDEN / path.name).with_suffix(suffix)
    if os.environ.get("GOLDEN") == "write":
        expected.write_text(text)
    assert text == expected.read_text()


def test_there_are_files_that_load_and_files_that_fail() -> None:
    results = {path.suffix for path in GOLDEN.iterdir()}
    assert results == {".yaml", ".ok", ".err"}


def test_no_result_without_its_file() -> None:
    names = {path.stem for path in FILES}
    assert {path.stem for path in GOLDEN.iterdir()} <= names
