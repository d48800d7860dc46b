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

from rstguard.kernel.links import Link
from rstguard.kernel.place import Place
from rstguard.kernel.standing import amiss
from rstguard.policy.compile import compile_policy, describe
from rstguard.policy.explain import Finding
from rstguard.policy.load import PolicyError, parse
from rstguard.policy.model import Policy

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).parent.parent.parent / "policies"
FILES = sorted(GOLDEN.glob("*.yaml")) + sorted(SAMPLES.glob("*.yaml"))


def around(policy: Policy) -> list[Finding]:
    """Look around on a machine that has these interfaces; all that is protected is behind it."""
    links = tuple(Link(name, True) for name in ("eth0", "wan0", "ppp1", "lo"))
    scope = compile_policy(policy).scope
    here = Place(links, reached=frozenset(scope.destinations))
    return [Finding(one.path, one.sentence) for one in amiss(scope, here)]


def outcome(path: Path) -> tuple[str, str]:
    """Return the suffix and text of what a policy file comes to, with eth0 and wan0 existing."""
    try:
        loaded = parse(path.read_bytes(), path.name, around)
    except PolicyError as error:
        return ".err", f"{error}\n"
    told = "".join(f"{problem}\n" for problem in loaded.told)
    return ".ok", told + describe(compile_policy(loaded.policy))


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
