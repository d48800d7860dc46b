"""Elements placed as far as the kernel lets them, and what is known of it."""

from __future__ import annotations

import pytest

from rstguard.engine.address import parse_prefix
from rstguard.kernel.elements import Element
from rstguard.kernel.placing import Placed, place
from tests.support.fake_kernel import FakeKernel

ELEMENTS = [Element(parse_prefix(f"198.51.100.{n}"), "ban", "syn-rate", 60) for n in range(40)]


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    create = "create rstguard-ban4 hash:net family inet maxelem 3 timeout 0 comment"
    kernel.run(["ipset", *create.split()])
    return kernel


def test_all_are_placed_at_once(kernel: FakeKernel) -> None:
    with kernel.sets() as sets:
        assert place(sets, ELEMENTS[:3]) == Placed((True, True, True), "")


def test_those_before_a_full_set_are_known_to_be_there(kernel: FakeKernel) -> None:
    with kernel.sets() as sets:
        there, error = place(sets, ELEMENTS)
    assert there == (True,) * 3 + (False,) * 37
    assert "full" in error


def test_a_lost_answer_is_no_refusal(kernel: FakeKernel) -> None:
    kernel.faults.fail("sets.add", after=True)
    with kernel.sets() as sets:
        assert place(sets, ELEMENTS[:2]) == Placed((True, True), "")
