"""A kernel that only remembers: pure, deterministic, needs no root, and can be asked.

Its parts stand for themselves; `FakeKernel` joins them into a `rstguard.kernel.seam.Kernel`.  What
the real kernel does with the same operations is tried in tests/kernel/test_fake_kernel.py.
"""

from tests.support.fake_kernel.kernel import FakeKernel, Host

__all__ = ["FakeKernel", "Host"]
