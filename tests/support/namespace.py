"""A network namespace of its own, entered by the thread that asks for it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


@contextmanager
def own_network() -> Iterator[None]:
    """Move the calling thread into an empty network namespace, which ends with the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    _call("unshare", CLONE_NEWNET)
    try:
        yield
    finally:
        _call("setns", home, CLONE_NEWNET)
        os.close(home)
