"""Who holds a large share of the connections: where nothing is tracked, or it cannot be read."""

from __future__ import annotations

import pytest

from rstguard.kernel import KernelError, NotPermitted, NotThere
from rstguard.kernel.holders import holders
from tests.support.fake_kernel.kernel import FakeKernel

COUNT = "net.netfilter.nf_conntrack_count"


@pytest.mark.parametrize("loaded", [True, False])
def test_where_nothing_is_tracked_the_table_is_not_asked(loaded: bool) -> None:
    """The question alone would load the tracker."""
    kernel = FakeKernel(lambda: 0)
    kernel.faults.fail("table", KernelError("not asked for"))
    if not loaded:
        kernel.faults.fail("read_sysctl", NotThere("no tracker"), naming=COUNT)
    assert holders(kernel) == ()


def test_what_cannot_be_read_is_told() -> None:
    kernel = FakeKernel(lambda: 0)
    kernel.faults.fail("read_sysctl", NotPermitted("needs root"), naming=COUNT)
    with pytest.raises(NotPermitted):
        holders(kernel)
