"""The plan of the bits: what it promises, and that the documentation shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rstguard.engine import wire
from rstguard.engine.ruleset import DEFAULT_LABELS, DEFAULT_MARKS
from rstguard.kernel.marks import PLAN, Bits, Labels, Marks

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-it-works.md"
BEGIN, END = "<!-- marks: the plan of rstguard/kernel/marks.py -->\n", "<!-- end of marks -->\n"

every_base = pytest.mark.parametrize("base", range(25))


def table() -> str:
    lines = ["| where | bit or number | name | meaning |", "|---|---|---|---|"]
    for line in PLAN:
        number = f"`+{line.value}`" if line.place.startswith("label") else f"`0x{line.value:02x}`"
        lines.append(f"| {line.place} | {number} | {line.name} | {line.says} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_plan() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if os.environ.get("GOLDEN") == "write":
        PAGE.write_text(before + BEGIN + table() + END + after)
        return
    assert shown == table()


@every_base
def test_all_bits_are_inside_the_mask(base: int) -> None:
    marks = Marks(0xFF << base)
    found = [value for value in vars(marks).values() if isinstance(value, Bits)]
    assert len(found) > 15
    for bits in found:
        assert not bits.mask & ~marks.mask
        assert not bits.value & ~bits.mask
    assert marks.base == base
    assert not marks.outbound & ~marks.mask
    bound = {*marks.condemned_for.values(), *marks.rst_sent_for.values()}
    assert all(not value & ~marks.mask for value in bound)


@pytest.mark.parametrize("mask", [0, 0x7F, 0x1FF, 0xFF00FF, 0xF0F0, 0xFF0000000, -256])
def test_another_mask_is_refused(mask: int) -> None:
    with pytest.raises(ValueError, match="is not eight adjacent bits"):
        Marks(mask)


def test_what_goes_into_the_queue_is_no_verdict() -> None:
    """A packet that passes because nobody reads must neither condemn nor trust."""
    marks = Marks()
    into = marks.to_queue_known.value | marks.to_queue_stray.value
    into |= marks.to_queue_proven.value | marks.to_queue_over.value
    back = marks.trust.value | marks.condemned.value
    assert not into & back


def test_a_whole_mark_of_a_connection_on_its_packets_is_no_new_verdict() -> None:
    """Other programs restore marks without a mask: every bit must be harmless as a verdict."""
    marks = Marks()
    assert marks.trust.mask == marks.rst_sent_source.mask
    alive = marks.stage_mask | marks.held.mask | marks.closing.mask
    assert not alive & (marks.trust.mask | marks.condemned.mask)


def test_stages_rise() -> None:
    marks = Marks()
    stages = (marks.unguarded, marks.guarded, marks.proven, marks.trusted)
    assert [bits.value for bits in stages] == sorted({bits.value for bits in stages})
    assert {bits.mask for bits in stages} == {marks.stage_mask}
    at_least = [bits for bits in stages if bits.value & marks.established.mask]
    assert at_least == [marks.proven, marks.trusted]


@pytest.mark.parametrize(
    ("bits", "state"),
    [
        (0, 0),
        (Marks().to_queue_known.value, wire.KNOWN | wire.PROVEN),
        (Marks().to_queue_proven.value, wire.PROVEN),
        (Marks().to_queue_over.value, wire.OVER),
        (Marks().to_queue_stray.value, wire.STRAY),
        (Marks().to_queue_stray.value | Marks().to_queue_proven.value, wire.STRAY | wire.PROVEN),
        (Marks().outbound, wire.OUTBOUND | wire.KNOWN | wire.PROVEN),
    ],
)
def test_states(bits: int, state: int) -> None:
    marks = Marks()
    assert marks.states[bits >> marks.base] == state
    assert len(marks.states) == 256


def test_labels_have_numbers_of_their_own() -> None:
    labels = Labels(DEFAULT_LABELS)
    numbers = (
        labels.likely,
        labels.confirmed,
        labels.adopted,
        labels.begun,
        labels.condemned,
        labels.mptcp,
        labels.reused,
        labels.anew,
    )
    assert len(set(numbers)) == 8
    assert all(DEFAULT_LABELS <= number <= 127 for number in numbers)
    assert Marks().mask == DEFAULT_MARKS
