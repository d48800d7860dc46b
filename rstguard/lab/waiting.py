"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE = 0.002


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition, which is looked at every few milliseconds.

    Raises:
        TimeoutError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {seconds} s: {condition}")
        time.sleep(_PAUSE)
