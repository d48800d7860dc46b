"""What is asked of workers and sweeper, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import count
from typing import Generic, TypeVar

from rstguard.ipc.messages import Explained, Killed, NearestAre, Question
from rstguard.supervisor.child import Child

Answered = TypeVar("Answered", Explained, Killed, NearestAre)
ANSWER_SECONDS = 3.0
"""How long what is told from memory may take: a worker may have packets to judge first."""


class Inquiry(Generic[Answered]):
    """One kind of question, which each process answers with one message of its number."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._waiting: dict[int, tuple[asyncio.Event, list[Answered], int]] = {}

    def heard(self, message: Answered) -> None:
        """Take one process's answer."""
        if message.number in self._waiting:
            done, answers, wanted = self._waiting[message.number]
            answers.append(message)
            if len(answers) == wanted:
                done.set()

    async def ask(
        self,
        question: Callable[[int], Question],
        whom: Iterable[Child],
        seconds: float,
    ) -> list[Answered]:
        """Ask those of the processes that serve, and return what came in time.

        `question` makes the message of a number.
        """
        number, done, answers = next(self._numbers), asyncio.Event(), list[Answered]()
        asked = [child for child in whom if child.serves]
        self._waiting[number] = done, answers, len(asked)
        for child in asked:
            child.send(question(number))
        try:
            await asyncio.wait_for(done.wait(), seconds if asked else 0)
        except TimeoutError:
            pass
        finally:
            del self._waiting[number]
        return answers
