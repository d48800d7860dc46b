"""Who is nearest to which limit: asked of workers, sweeper and kernel when somebody looks."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from rstguard.engine.nearest import merged
from rstguard.ipc.messages import Nearest, NearestAre
from rstguard.ipc.requests import Request
from rstguard.kernel.seam import Kernel
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.inquiry import ANSWER_SECONDS, Inquiry

MOST: Final = 5
"""Sources told of each rule."""
_LEAST: Final = 0.01
"""Who has used less than this share of a limit is not near it."""
_FRESH: Final = 1.0
"""Seconds for which an answer serves all who ask."""


class Closest:
    """Answers who is nearest, from the tables of all processes, once a second at most."""

    def __init__(self, kernel: Kernel, guard: Guard, nearest: Inquiry[NearestAre]) -> None:
        self._kernel = kernel
        self._guard = guard
        self._nearest = nearest
        self._asking = asyncio.Lock()
        self._answer: list[dict[str, object]] = []
        self._taken = -_FRESH

    async def answer(self, _request: Request) -> object:
        """Answer the request: the nearest first, each with its rule and percent of the limit."""
        async with self._asking:
            if asyncio.get_running_loop().time() - self._taken >= _FRESH:
                self._answer = await self._look()
                self._taken = asyncio.get_running_loop().time()
            return self._answer

    async def _look(self) -> list[dict[str, object]]:
        guard = self._guard
        question = partial(Nearest, most=MOST)
        answers = await self._nearest.ask(question, guard.judges, ANSWER_SECONDS)
        in_kernel = await asyncio.to_thread(self._kernel.nearest, guard.ruleset, MOST)
        found = [near for answer in answers for near in answer.nearest]
        return [
            {
                "source": near.subject,
                "rule": near.rule,
                "used_percent": round(100 * near.used, 1),
            }
            for near in merged([*found, *in_kernel], MOST)
            if near.used >= _LEAST
        ]
