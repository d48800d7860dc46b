"""Whether the connection table has room, how large it should be, and that it can be undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rstguard.kernel import KernelError, sizing
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.linux import Linux
from rstguard.kernel.seam import Lost
from rstguard.kernel.sizing import BUCKETS, MOST, Sizes, enlarge, give_back, sizes_for
from rstguard.kernel.tracker import Room
from tests.support.fake_kernel import FakeKernel

GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "now", "wanted"),
    [
        (512 << 20, Sizes(65536, 65536), Sizes(65536, 65536)),
        (GIB, Sizes(65536, 16384), Sizes(65536, 65536)),
        (4 * GIB, Sizes(262144, 65536), Sizes(262144, 262144)),
        (24 * GIB, Sizes(262144, 262144), Sizes(1 << 20, 1 << 20)),
        (1024 * GIB, Sizes(262144, 262144), Sizes(1 << 21, 1 << 21)),
        # Never smaller, whoever made it larger.
        (GIB, Sizes(1 << 20, 1 << 19), Sizes(1 << 20, 1 << 19)),
        (0, Sizes(1, 1), Sizes(65536, 65536)),
    ],
)
def test_sizes(memory: int, now: Sizes, wanted: Sizes) -> None:
    assert sizes_for(memory, now) == wanted
    assert sizes_for(memory, wanted) == wanted


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.sysctls |= {MOST: "262144", BUCKETS: "65536"}
    return kernel


BEFORE, WANTED = Sizes(262144, 65536), Sizes(1 << 20, 1 << 20)


def test_it_is_made_larger_and_given_back(kernel: FakeKernel, tmp_path: Path) -> None:
    record = tmp_path / "state" / sizing.RECORD
    enlarge(kernel, WANTED, record)
    assert sizing.present(kernel) == WANTED
    enlarge(kernel, Sizes(1 << 21, 1 << 21), record)  # with more memory, later
    done = give_back(kernel, record)
    assert sizing.present(kernel) == BEFORE
    assert len(done) == 2
    assert not record.exists()
    assert give_back(kernel, record) == []


def test_what_somebody_else_has_set_stays(kernel: FakeKernel, tmp_path: Path) -> None:
    record = tmp_path / sizing.RECORD
    enlarge(kernel, WANTED, record)
    kernel.sysctls[MOST] = "500000"
    done = give_back(kernel, record)
    assert sizing.present(kernel) == Sizes(500000, 65536)
    assert "somebody else has changed it" in done[0]


def test_what_is_not_taken_changes_nothing(kernel: FakeKernel, tmp_path: Path) -> None:
    record = tmp_path / sizing.RECORD
    kernel.stubborn[BUCKETS] = "65536"
    with pytest.raises(KernelError, match="did not take the value 1048576"):
        enlarge(kernel, WANTED, record)
    assert sizing.present(kernel) == BEFORE
    assert not record.exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"before": 1}', json.dumps({"before": {"kernel.core_pattern": "1"}}),
     json.dumps({"before": {MOST: "-1"}}), json.dumps({"before": {MOST: 7}}),
     json.dumps({"before": {MOST: "9" * 40}})],
)  # fmt: skip
def test_a_record_that_is_not_of_our_making(kernel: FakeKernel, tmp_path: Path, text: str) -> None:
    record = tmp_path / sizing.RECORD
    record.write_text(text)
    with pytest.raises(KernelError, match="is damaged"):
        give_back(kernel, record)
    assert sizing.present(kernel) == BEFORE


@pytest.mark.netns
@pytest.mark.usefixtures("own_namespace")
def test_in_a_namespace_of_its_own_it_says_why_not(tmp_path: Path) -> None:
    linux, record = Linux(), tmp_path / sizing.RECORD
    before = sizing.present(linux)
    with pytest.raises(KernelError, match="nf_conntrack_max"):
        enlarge(linux, Sizes(before.most + 4096, before.buckets), record)
    assert sizing.present(linux) == before
    assert not record.exists()


@pytest.mark.netns
@pytest.mark.usefixtures("own_namespace")
def test_the_kernel_says_what_it_could_not_take_in() -> None:
    with Conntrack() as table:
        assert table.lost() == Lost()


NO, SOME = Lost(insert_failed=5, drop=3), Lost(insert_failed=7, drop=4)
LOOKS = [
    ((100, NO), (100, NO), ""),
    ((100, NO), (950, NO), "the connection table is full: 950 of 1000 entries (95 %)"),
    ((950, NO), (949, NO), ""),
    # Two first packets of one connection count as dropped, too.
    ((100, NO), (100, SOME), ""),
    ((800, NO), (800, SOME), "the connection table was full: 3 connections were dropped"),
    ((100, NO), (100, NO._replace(early_drop=2)), "the connection table was full: 2 connections"),
    ((100, NO), (100, NO._replace(chain_too_long=2)), "2 connections were dropped, as the "),
    ((100, SOME), (100, NO), ""),  # another namespace, or it wraps
]


@pytest.mark.parametrize(("first", "second", "says"), LOOKS)
def test_room(first: tuple[int, Lost], second: tuple[int, Lost], says: str) -> None:
    room = Room()
    room.look(first[0], 1000, first[1])
    said = room.look(second[0], 1000, second[1])
    assert said.startswith(says)
    assert bool(said) == bool(says)
    if said:
        assert "sysctl -w net.netfilter.nf_conntrack_" in said


def test_what_was_lost_before_the_first_look_is_not_told() -> None:
    assert Room().look(10, 1000, Lost(9, 9, 9, 9)) == ""
    assert Room().look(10, 0, Lost()) == ""
