"""Replay a capture from its first packet to its last, by one policy or several at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from rstguard.engine.ruleset import RuleSet
from rstguard.replay.capture import Capture, open_capture
from rstguard.replay.play import Replay
from rstguard.replay.report import Report, report_of

Progress = Callable[[float], None]
"""Is told what part of a capture has been read, from 0 to 1."""


def replay(ruleset: RuleSet, file: Path) -> Report:
    """Return what a policy would have done to a capture file ("-": standard input).

    Raises:
        CaptureError: the file is no capture, or cannot be read.
    """
    played = Replay(ruleset)
    with open_capture(file) as capture:
        play(capture, [played])
        return report_of(played, capture)


def play(capture: Capture, replays: Sequence[Replay], progress: Progress | None = None) -> None:
    """Feed a whole capture to replays, all in one pass.

    Raises:
        CaptureError: the capture's first interface is of a kind that cannot be read.
    """
    # As in the worker: the packet path makes no reference cycles, and its tables are large.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for batch in capture.batches():
            for one in replays:
                one.feed(batch)
            if progress is not None:
                progress(capture.done())
    finally:
        if collecting:
            gc.enable()
