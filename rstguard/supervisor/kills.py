"""Connections that an administrator ends: asked of the sweeper, and its answer waited for."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from rstguard.ipc.messages import Kill, Killed
from rstguard.ipc.requests import ControlError
from rstguard.supervisor.inquiry import Inquiry

if TYPE_CHECKING:
    from rstguard.supervisor.supervisor import Supervisor

_ANSWER_SECONDS = 12.0


class Kills:
    """Hands requests to the sweeper of a supervisor."""

    def __init__(self, guard: Supervisor) -> None:
        self._guard = guard
        self._inquiry: Inquiry[Killed] = Inquiry()
        self.heard = self._inquiry.heard

    async def kill(self, **conditions: Any) -> Killed:
        """End the connections that fit all conditions (see `Kill`), and wait for the outcome.

        Raises:
            ControlError: the sweeper gave no answer in time.
        """
        question = partial(Kill, **conditions)
        answers = await self._inquiry.ask(question, [self._guard.sweeper], _ANSWER_SECONDS)
        if not answers:
            raise ControlError("the sweeper gave no answer; `rstguard status` says more")
        return answers[0]
