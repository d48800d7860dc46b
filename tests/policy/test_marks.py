"""Which mark bits and labels are the guard's: what may be written, and what comes of it."""

from __future__ import annotations

import pytest

from rstguard.engine.ruleset import DEFAULT_LABELS, DEFAULT_MARKS
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import PolicyError, parse

HEAD = "version: 1\nprotect: {interfaces: [eth0]}\nrules: []\n"


def test_by_default_they_are_the_highest() -> None:
    ruleset = compile_policy(parse(HEAD, "policy.yaml").policy)
    assert (ruleset.marks, ruleset.labels) == (DEFAULT_MARKS, DEFAULT_LABELS)


@pytest.mark.parametrize("shift", range(25))
def test_eight_adjacent_bits_anywhere(shift: int) -> None:
    text = f"{HEAD}marks: {0xFF << shift:#x}\nlabels: {shift}\n"
    ruleset = compile_policy(parse(text, "policy.yaml").policy)
    assert (ruleset.marks, ruleset.labels) == (0xFF << shift, shift)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("marks: 0", "0 is no mask of a mark: write one as 0xff000000"),
        ("marks: 0x1ff", "0x1ff is not eight adjacent bits"),
        ("marks: 0x7f", "0x7f is not eight adjacent bits"),
        ("marks: 0xff0000000", "is no mask of a mark"),
        ("marks: true", "is no mask of a mark"),
        ("marks: high", "is no mask of a mark"),
        ("labels: 121", "write a number from 0 to 120"),
    ],
)
def test_what_is_refused(line: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        parse(f"{HEAD}{line}\n", "policy.yaml")
