"""Tables of nf_tables while other programs change theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rstguard.kernel import Changed, KernelError, nftables, tables
from rstguard.kernel.command import run
from rstguard.kernel.dnat import TABLE, Translation, chains
from rstguard.kernel.linux import Linux
from rstguard.kernel.marks import Marks
from tests.kernel.test_half_open import BEHIND, KNOWN
from tests.support.fake_kernel import FakeKernel

MADE = chains(Marks(), KNOWN)
OTHER = "table ip other {\n chain rules {\n }\n}\n"


@pytest.fixture
def busy(own_namespace: None) -> Iterator[None]:
    """Another program that changes a table of its own all the time."""
    run(["nft", "-f", "-"], OTHER)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            run(["nft", "-f", "-"], "add rule ip other rules accept\n")

    other = threading.Thread(target=change)
    other.start()
    yield
    done.set()
    other.join()


@pytest.mark.netns
def test_they_are_read_and_kept_all_the_same(busy: None) -> None:
    for _ in range(300):
        tables.keep(Linux(), TABLE, MADE)
        assert nftables.comments(TABLE).keys() == {"prerouting", "output"}


def test_what_cannot_be_compared_is_put_in_place_anew() -> None:
    kernel = FakeKernel()
    translation = Translation(kernel)
    translation.apply(Marks(), KNOWN)
    kernel.faults.fail("table_comments", Changed("it changed"))
    translation.apply(Marks(), KNOWN)
    assert translation.problem == ""
    assert BEHIND in translation.usable(KNOWN)


def test_what_the_kernel_refuses_is_told_and_tried_again() -> None:
    kernel = FakeKernel()
    translation = Translation(kernel)
    kernel.faults.fail("replace_table", KernelError("it has no nf_tables"))
    translation.apply(Marks(), KNOWN)
    assert translation.problem == "it has no nf_tables"
    assert BEHIND not in translation.usable(KNOWN)
    translation.apply(Marks(), KNOWN)
    assert translation.problem == ""
