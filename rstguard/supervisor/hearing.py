"""What workers and the sweeper tell, and where it goes: the supervisor's one dispatch."""

from __future__ import annotations

import asyncio

from rstguard.engine.shedding import UNDONE, Level
from rstguard.ipc.messages import (
    Blocked,
    Explained,
    Killed,
    NearestAre,
    News,
    NotKilled,
    Observed,
    Overloaded,
    Productive,
    Reply,
    Reset,
)
from rstguard.observe.events import Event
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.inquiry import Inquiry
from rstguard.supervisor.learning import Learning


class Hearing:
    """Takes the messages of all processes."""

    def __init__(self, guard: Guard, bans: Bans, learning: Learning) -> None:
        self._guard = guard
        self._bans = bans
        self._learning = learning
        self.explained: Inquiry[Explained] = Inquiry()
        self.nearest: Inquiry[NearestAre] = Inquiry()
        self.killed: Inquiry[Killed] = Inquiry()

    def hear(self, message: News | Reply) -> None:
        """Note what a worker or the sweeper did, and pass on what concerns others."""
        guard = self._guard
        match message:
            case Blocked():
                self._bans.heard(message)
            case Reset():
                self._reset(message)
            case Observed():
                flow, rule, reason = str(message.flow), message.rule, message.reason
                guard.events.add(Event("observed", flow, rule, reason))
            case Explained():
                self.explained.heard(message)
            case NearestAre():
                self.nearest.heard(message)
            case Killed():
                self.killed.heard(message)
            case NotKilled():
                for one in message.unconfirmed:
                    guard.events.add(Event("not_killed", str(one.flow), detail=one.sentence))
            case Productive():
                guard.productive = message
                for worker in guard.workers:
                    worker.send(message)
            case Overloaded():
                self._overloaded(message)
            case _:  # what learning takes; the type checker knows that nothing else is left
                self._learning.heard(message)

    def _reset(self, message: Reset) -> None:
        flow, enforced = str(message.flow), message.enforced
        event = Event("reset", flow, message.rule, message.reason, enforced=enforced)
        self._guard.events.add(event)
        if enforced and message.known and message.by_worker:
            self._guard.sweeper.send(message)

    def _overloaded(self, message: Overloaded) -> None:
        guard = self._guard
        alive = {worker.pid for worker in guard.workers}
        guard.overload = {pid: level for pid, level in guard.overload.items() if pid in alive}
        guard.overload[message.pid] = message.level
        if message.level is not Level.NOTHING:
            guard.unjudged_at = asyncio.get_running_loop().time()
            self._learning.overrun()
        guard.events.add(Event("overload", f"worker {message.pid}", detail=UNDONE[message.level]))
