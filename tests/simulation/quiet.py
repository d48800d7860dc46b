"""No world is heard outside of itself, and its dead end when they are collected."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LOGGERS: Final = ("rstguard", "asyncio")
_NOWHERE: Final = logging.NullHandler()


@contextmanager
def quiet() -> Iterator[list[logging.Logger]]:
    """Keep the guard's log from the terminal, and the dead from ending before their time.

    A supervisor that was killed leaves tasks behind.  They end when they are collected, and what
    their last lines do has no effect any more, but noise.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(_NOWHERE)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.disable()
    gc.freeze()  # what was there before need not be looked through
    try:
        yield loggers
    finally:
        gc.unfreeze()
        gc.enable()
        sys.unraisablehook = hook
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(_NOWHERE)
            logger.setLevel(level)
            logger.propagate = propagate
