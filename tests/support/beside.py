"""Something that goes on beside a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


@contextmanager
def beside(work: Callable[[], object], every: float = 0) -> Iterator[None]:
    """Do something again and again, so many seconds apart, while the context lasts."""
    over = Event()

    def again() -> None:
        while not over.wait(every):
            work()

    thread = Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
