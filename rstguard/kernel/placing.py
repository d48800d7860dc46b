"""Elements placed as far as the kernel lets them: what is in force must be known to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from rstguard.kernel import KernelError
from rstguard.kernel.elements import Element
from rstguard.kernel.seam import ElementSets

_MOST_REFUSED: Final = 16
"""Refusals in a row after which nobody asks any more: the set is full, or gone."""


class Placed(NamedTuple):
    """For each element whether it is in its set, and what the kernel said of the first that is not.

    `error` is "" if all are.
    """

    there: tuple[bool, ...]
    error: str


def place(sets: ElementSets, elements: Sequence[Element]) -> Placed:
    """Put elements into their sets, all at once if that is possible.

    Of several that are added at once those before the one that is refused stay in their sets, and
    an answer may be lost: after a refusal each is tried alone, to know of each.
    """
    try:
        sets.add(elements)
    except KernelError:
        pass
    else:
        return Placed((True,) * len(elements), "")
    there: list[bool] = []
    error, refused = "", 0
    for element in elements:
        if refused < _MOST_REFUSED:
            try:
                sets.add([element])
            except KernelError as problem:
                error, refused = error or str(problem), refused + 1
            else:
                there.append(True)
                refused = 0
                continue
        there.append(False)
    return Placed(tuple(there), error)
