"""What a worker's messages cost on their way to the supervisor, against pickles of the same."""

from __future__ import annotations

import gc
import pickle
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from typing import Any

from rstguard.ipc.codec import decoded, encoded
from rstguard.ipc.messages import FromChild
from tests.bench.figures import Figure, at_most, ratios, seen
from tests.ipc.examples import batch

GOAL = 1.0
ROUNDS = 15


def messages() -> Iterator[Figure]:
    """A batch of 1,000 messages, encoded and decoded."""
    ours, theirs = costs(ROUNDS)
    note = "blocks, resets, observations, counts, kills and two of 1,000 sources; processor time"
    yield at_most(GOAL, "messages: checked JSON / pickle", ratios(ours, theirs), "", note)
    yield seen("messages: 1,000 of them", [1000 * one for one in ours], "ms", note)


def costs(rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds that a batch takes, and that the same takes as pickled dataclasses.

    Each round measures one right after the other.
    """
    made = batch(random.Random(1))
    twins = [_twin(message) for message in made]
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_seconds(made, encoded, decoded))
        theirs.append(_seconds(twins, pickle.dumps, pickle.loads))
    return ours, theirs


def _seconds(
    made: list[Any], encode: Callable[[Any], bytes], decode: Callable[[bytes], Any]
) -> float:
    gc.collect()
    gc.disable()
    began = time.process_time()
    back = [decode(encode(message)) for message in made]
    spent = time.process_time() - began
    gc.enable()
    assert back[0] == made[0]
    return spent


def _twin(message: FromChild) -> Any:
    """Return a frozen dataclass with slots of the same values, as messages once were."""
    kind = type(message)
    values = {name: getattr(message, name) for name in kind.__struct_fields__}
    name = f"{kind.__name__}Twin"
    if name not in globals():
        made = make_dataclass(name, list(values), frozen=True, slots=True)
        made.__module__ = __name__
        globals()[name] = made  # where pickle looks for it
    return globals()[name](**values)
