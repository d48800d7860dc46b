"""Network namespaces as a thread enters them (setns(2), unshare(2)).

Python has these calls from 3.12 on; until then they are the C library's.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMED = Path("/run/netns")
"""Where ``ip netns`` keeps the namespaces that have names."""

_CLONE_NEWNET = 0x40000000


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Move the calling thread into a named namespace, and afterwards back to where it was.

    A socket stays in the namespace in which it was made.

    Raises:
        OSError: there is no such namespace, or this process may not enter it.
    """
    with _back_again(), (NAMED / name).open() as there:
        _call("setns", there.fileno(), _CLONE_NEWNET)
        yield


@contextmanager
def own_network() -> Iterator[None]:
    """Move the calling thread into an empty namespace, which ends with the block.

    Raises:
        OSError: this process may not make one.
    """
    with _back_again():
        _call("unshare", _CLONE_NEWNET)
        yield


@contextmanager
def _back_again() -> Iterator[None]:
    with Path("/proc/thread-self/ns/net").open() as before:
        try:
            yield
        finally:
            _call("setns", before.fileno(), _CLONE_NEWNET)


def _call(name: str, *arguments: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
