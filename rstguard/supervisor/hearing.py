"""What workers and the sweeper tell, and where it goes: the supervisor's one dispatch."""

from __future__ import annotations

import asyncio
from typing import assert_never

from rstguard.engine.service import Service
from rstguard.engine.shedding import SHED, Level
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import (
    AllMeasured,
    Blocked,
    Explained,
    FoundProductive,
    Killed,
    LookProductive,
    Measured,
    NearestAre,
    News,
    NotKilled,
    Observed,
    Overloaded,
    Productive,
    Reply,
    Reset,
)
from rstguard.ipc.said import Large, UnderPressure, Weighed
from rstguard.observe.events import Event
from rstguard.state.record import Record
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.guard import Guard, Pressed
from rstguard.supervisor.inquiry import Inquiry
from rstguard.supervisor.learning import Learning


class Hearing:
    """Takes the messages of all processes."""

    def __init__(self, guard: Guard, bans: Bans, learning: Learning, record: Record) -> None:
        self._guard = guard
        self._record = record
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
            case Weighed():
                self._weighed(message)
            case Observed():
                flow, rule, reason = str(message.flow), message.rule, message.reason
                guard.events.add(Event("observed", flow, rule, reason))
            case Explained() | NearestAre() | Killed():
                self._answered(message)
            case NotKilled():
                for one in message.unconfirmed:
                    guard.events.add(Event("not_killed", str(one.flow), detail=one.sentence))
            case Productive() | Large():
                self._of_sources(message)
            case Overloaded() | UnderPressure():
                self._strained(message)
            case Measured() | LookProductive() | AllMeasured() | FoundProductive():
                self._learning.heard(message)
            case _:
                assert_never(message)

    def _answered(self, message: Explained | NearestAre | Killed) -> None:
        match message:
            case Explained():
                self.explained.heard(message)
            case NearestAre():
                self.nearest.heard(message)
            case Killed():
                self.killed.heard(message)

    def _reset(self, message: Reset) -> None:
        flow, enforced = str(message.flow), message.enforced
        event = Event("reset", flow, message.rule, message.reason, enforced=enforced)
        self._guard.events.add(event)
        if enforced and message.known and message.by_worker:
            self._guard.sweeper.send(message)

    def _weighed(self, message: Weighed) -> None:
        """Tell a forged RST: whom it named, and by what it could be told."""
        end = "client" if message.by_client else "server"
        signs = [f"{'a FIN ' if message.fin else ''}in the {end}'s name"]
        if message.inside == message.by_client:
            signs.append(f"on an interface {'inside' if message.inside else 'outside'}")
        if message.hops >= 0 and message.true_hops >= 0:
            signs.append(f"TTL {message.hops}, the {end}'s is {message.true_hops}")
        signs.append(f"answered in {message.waited / 1000:.1f} ms")
        kind = "forged_reset"
        reason, held = Reason.FORGED_RESET, message.held
        event = Event(kind, str(message.flow), "", reason, ", ".join(signs), enforced=held)
        self._guard.events.add(event)

    def _strained(self, message: Overloaded | UnderPressure) -> None:
        match message:
            case Overloaded():
                self._overloaded(message)
            case UnderPressure():
                self._pressed(message)

    def _pressed(self, message: UnderPressure) -> None:
        """Tell which services begin to be in distress, and which no longer are."""
        guard, now = self._guard, asyncio.get_running_loop().time()
        before, guard.pressed = guard.pressed, {}
        for one in message.services:
            service = Service(one.address, one.port)
            since = before[service].since if service in before else now
            guard.pressed[service] = Pressed(since, one.live, one.start, one.end)
            if service not in before:
                detail = f"{one.live} connections: patience shrinks from {one.start} to {one.end}"
                guard.events.add(Event("pressed", str(service), detail=detail))
        for service in before.keys() - guard.pressed.keys():
            guard.events.add(Event("calm", str(service), detail="no sign of distress any more"))

    def _of_sources(self, message: Productive | Large) -> None:
        """Have the workers know what the sweeper has found of sources."""
        for worker in self._guard.workers:
            worker.send(message)
        match message:
            case Productive():
                self._guard.productive = message
            case Large():
                self._large(message)

    def _large(self, message: Large) -> None:
        """Tell which sources are large that were not."""
        guard = self._guard
        before = {one.source for one in guard.large.sources}
        guard.note_large(message, asyncio.get_running_loop().time())
        self._record.large(message)
        for one in message.sources:
            if one.source not in before:
                spared = "spared" if one.bore else "not spared, as it has borne nothing in calm"
                detail = (
                    f"{one.share}% of all proven connections, {one.connections} of them; {spared}: "
                    "say what it is"
                )
                guard.events.add(Event("large_source", str(one.source), detail=detail))

    def _overloaded(self, message: Overloaded) -> None:
        guard = self._guard
        alive = {worker.pid for worker in guard.workers}
        guard.overload = {pid: level for pid, level in guard.overload.items() if pid in alive}
        guard.overload[message.pid] = message.level
        if message.level is not Level.NOTHING:
            guard.unjudged_at = asyncio.get_running_loop().time()
            self._learning.overrun()
        guard.events.add(Event("overload", f"worker {message.pid}", detail=SHED[message.level]))
