"""A network namespace of its own for a test, entered by the test itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

CLONE_NEWNET = 0x40000000


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@pytest.fixture
def own_namespace() -> Iterator[None]:
    """Run the test in an empty network namespace, which ends with it and all it holds."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    _call("unshare", CLONE_NEWNET)
    try:
        yield
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(home)
