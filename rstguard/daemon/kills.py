"""Connections that an administrator ends: asked of the sweeper, and its answer waited for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from rstguard.daemon.control import ControlError
from rstguard.daemon.messages import Kill, Killed

if TYPE_CHECKING:
    from rstguard.daemon.supervisor import Supervisor

_ANSWER_SECONDS = 12.0


class Kills:
    """Hands requests to the sweeper of a supervisor."""

    def __init__(self, guard: Supervisor) -> None:
        self._guard = guard
        self._waiting: dict[int, asyncio.Future[Killed]] = {}

    def heard(self, message: Killed) -> None:
        """Take the sweeper's answer."""
        if future := self._waiting.get(message.number):
            future.set_result(message)

    async def kill(self, **conditions: Any) -> Killed:
        """End the connections that fit all conditions (see `Kill`), and wait for the outcome.

        Raises:
            ControlError: the sweeper gave no answer in time.
        """
        number = max(self._waiting, default=0) + 1
        answer: asyncio.Future[Killed] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._guard.sweeper.send(Kill(number, **conditions))
        try:
            return await asyncio.wait_for(answer, _ANSWER_SECONDS)
        except TimeoutError:
            raise ControlError("the sweeper gave no answer; `rstguard status` says more") from None
        finally:
            del self._waiting[number]
