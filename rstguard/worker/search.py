"""A worker's search for who is nearest to which limit: a step at a time, between its packets."""

from __future__ import annotations

from collections.abc import Iterator

from rstguard.engine.nearest import Near, merged
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.messages import Nearest, NearestAre


class Looking:
    """One search at a time; who asks meanwhile is given its outcome too."""

    def __init__(self) -> None:
        self._search: Iterator[list[Near]] | None = None
        self._found: list[Near] = []
        self._asked: list[Nearest] = []

    @property
    def active(self) -> bool:
        """Whether there is a step to be done."""
        return self._search is not None

    def ask(self, question: Nearest) -> bool:
        """Note a question; True if a search must be begun for it."""
        self._asked.append(question)
        return self._search is None

    def begin(self, search: Iterator[list[Near]]) -> None:
        """Take up a search (`rstguard.engine.engine.Engine.nearest`)."""
        self._search = search

    def step(self, channel: ChildEnd) -> None:
        """Go one step on, and answer all questions when it was the last."""
        if self._search is None:
            return
        try:
            self._found += next(self._search)
        except StopIteration:
            nearest = merged(self._found, max(asked.most for asked in self._asked))
            for asked in self._asked:
                channel.send(NearestAre(asked.number, nearest))
            self._search, self._found, self._asked = None, [], []
