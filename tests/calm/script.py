"""What the two ends of a real connection do: drawn once, known to both."""

from __future__ import annotations

import random
from itertools import chain, repeat
from typing import NamedTuple

from tests.calm.conversation import drawn
from tests.calm.kinds import Kind


class Exchange(NamedTuple):
    """One turn, with all drawn: bytes, and seconds."""

    says: int
    answers: int
    pause: float
    wait: float


class Script(NamedTuple):
    """All turns of a connection, and how long it lasts (seconds), however short they are."""

    kind: Kind
    turns: tuple[Exchange, ...]
    lasts: float


def script(kind: Kind, draw: random.Random, longest: float) -> Script:
    """Return what happens on a connection that lasts `longest` seconds at most."""
    lasts = min(drawn(draw, kind.lasts), longest)
    turns, at = [], 0.0
    for number, turn in enumerate(chain(kind.opening, repeat(kind.going) if kind.going else ())):
        assert turn is not None
        pause, wait = drawn(draw, turn.pause), drawn(draw, turn.wait)
        if number >= len(kind.opening) and at + pause + wait >= lasts:
            break
        at += pause + wait
        turns.append(Exchange(int(drawn(draw, turn.says)), int(drawn(draw, turn.answers)),
                              pause, wait))  # fmt: skip
    return Script(kind, tuple(turns), lasts)
