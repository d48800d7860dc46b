"""The running guard learns limits: begun, ended and asked for by `rstguard policy learn --live`.

Workers and sweeper measure beside their work (`rstguard.ipc.measuring`); here is when, and from
their parts is made what the command needs to propose limits.  It learns while the policy observes:
whom a policy blocks cannot show what they would do.  What was measured is kept, after the time is
over too, until it is ended or the guard stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from rstguard.engine.ruleset import Measure, RuleSet
from rstguard.engine.shown import Breadth, sum_up
from rstguard.ipc.messages import (
    AllMeasured,
    FoundProductive,
    Learn,
    LookProductive,
    Measured,
    Tell,
)
from rstguard.ipc.requests import ControlError, Request
from rstguard.supervisor.guard import Guard

LONGEST = 30 * 86400
"""Seconds that the guard may learn without being asked again."""
_ANSWER_SECONDS = 30.0

Answer = Measured | LookProductive | AllMeasured | FoundProductive


class _Gathered:
    """What the processes have told of one asking so far."""

    def __init__(self, processes: int) -> None:
        self.all: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shown: dict[str, dict[int, int]] = {}
        self.productive: set[int] = set()
        self.left_out = 0
        self._missing = processes

    def add(self, part: Measured | LookProductive | AllMeasured, least: bool) -> None:
        """Take a part; `least` says that of what two processes tell of a source the less counts."""
        if isinstance(part, LookProductive):
            self.productive.update(part.sources)
        elif isinstance(part, Measured):
            shown = self.shown.setdefault(part.rule, {})
            for key, amount in part.shown:
                known = shown.get(key, amount)
                shown[key] = min(known, amount) if least else max(known, amount)
        else:
            self.left_out += part.left_out
            self._missing -= 1
            if not self._missing and not self.all.done():
                self.all.set_result(None)


class Learning:
    """Whether the guard learns, for how long it has, and what came in between."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._on = False
        self._until = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._since: tuple[float, int] | None = None
        """Since when it measures without a pause, and the packets up to then."""
        self._seconds, self._packets = 0.0, 0
        self._deaths, self._found = 0, 0
        self._notes: dict[str, None] = {}
        self._gathered: dict[int, _Gathered] = {}
        self._number = 0
        self._asking = asyncio.Lock()
        self.commands = {
            "learn-start": self._start,
            "learn-stop": self._stop,
            "learn-status": self._status,
            "learned": self._learned,
        }

    @property
    def status(self) -> dict[str, Any] | None:
        """For how long it has learned and will, of how much; None if it does not."""
        if not self._on:
            return None
        now, packets = self._now()
        since = self._since or (now, packets)
        left = 0.0 if self._alarm is None else max(0.0, self._until - now)
        return {
            "measuring": self._since is not None,
            "seconds": round(self._seconds + now - since[0], 3),
            "left_s": round(left, 1),
            "packets": self._packets + packets - since[1],
            "productive": self._found,
            "notes": list(self._remarks()),
        }

    def first(self) -> tuple[Learn, ...]:
        """Return what a process that begins is to be told."""
        return (Learn(on=True, rests=self._alarm is None),) if self._on else ()

    async def follow(self, old: RuleSet, new: RuleSet) -> None:
        """Another policy is in force; the processes know what to do by themselves."""
        if not self._on:
            return
        if new.enforce:
            self._note("the policy enforced for a while, and nothing was measured meanwhile")
        if {rule.name: rule for rule in old.rules} != {rule.name: rule for rule in new.rules}:
            self._note("the policy changed meanwhile: rules that did were measured from then on")
        self._pause()
        self._go_on()

    def heard(self, message: Answer) -> None:
        """Take what a process tells."""
        if isinstance(message, FoundProductive):
            self._found = message.count
        elif gathered := self._gathered.get(message.number):
            gathered.add(message, self._is_least(message))

    def _is_least(self, message: Answer) -> bool:
        rules = self._guard.ruleset.rules
        slow = {rule.name for rule in rules if rule.measure is Measure.SLOW}
        return isinstance(message, Measured) and message.rule in slow

    def died(self) -> None:
        """Note that a process died, with all that it had measured."""
        self._deaths += self._on
        for gathered in self._gathered.values():
            if not gathered.all.done():
                gathered.all.set_exception(ControlError("a process died just now: ask again"))

    def overrun(self) -> None:
        """Note that a worker left packets unjudged, and unmeasured."""
        if self._on:
            self._note("a worker was overrun meanwhile, and measured nothing until it was not")

    def _note(self, note: str) -> None:
        self._notes[note] = None

    def _remarks(self) -> Iterator[str]:
        if self._deaths:
            times = "once" if self._deaths == 1 else f"{self._deaths} times"
            yield f"a process of the guard died {times}: what it had measured is missing"
        yield from self._notes

    def _now(self) -> tuple[float, int]:
        return asyncio.get_running_loop().time(), sum(
            worker.totals["packets"] for worker in self._guard.workers
        )

    def _go_on(self) -> None:
        if self._alarm is not None and not self._guard.ruleset.enforce:
            self._since = self._now()

    def _pause(self) -> None:
        if self._since is not None:
            now, packets = self._now()
            self._seconds += now - self._since[0]
            self._packets += packets - self._since[1]
            self._since = None

    async def _start(self, request: Request) -> object:
        seconds = request.get("seconds")
        if type(seconds) is not int or not 1 <= seconds <= LONGEST:
            raise ControlError(f"the guard learns for 1 to {LONGEST} seconds")
        if self._guard.ruleset.enforce:
            raise ControlError(
                f"policy {self._guard.ruleset.name} enforces, and whom it blocks cannot show what "
                "they would do: apply it with `mode: observe` first, or learn from a capture"
            )
        if self._alarm is not None:
            raise ControlError(
                "the guard learns already: take what it has learned with --live --out FILE, or end "
                "it with --live --stop"
            )
        self._forget()
        self._on, self._until = True, asyncio.get_running_loop().time() + seconds
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._time_is_over)
        self._tell(*self.first())
        self._go_on()
        return self.status

    async def _stop(self, _request: Request) -> object:
        was_on = self._on
        self._forget()
        return {"stopped": was_on}

    async def _status(self, _request: Request) -> object:
        return self.status

    def _forget(self) -> None:
        """What a guard measured before is no part of what it measures next."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._on:
            self._tell(Learn(on=False))
        self._on, self._alarm, self._since = False, None, None
        self._seconds, self._packets, self._deaths, self._found = 0.0, 0, 0, 0
        self._notes.clear()

    def _time_is_over(self) -> None:
        self._pause()
        self._alarm = None
        self._tell(*self.first())

    def _tell(self, *messages: Learn | Tell) -> None:
        for child in self._guard.judges:
            for message in messages:
                child.send(message)

    async def _learned(self, _request: Request) -> object:
        async with self._asking:
            status = self.status
            if status is None:
                raise ControlError(
                    "the guard is not learning: begin with --live --start, or with --live --for 1h"
                )
            gathered = await self._gather()
            guard = self._guard
            ruleset, loaded = guard.ruleset, guard.loaded
            rows = await asyncio.to_thread(_summary, ruleset, gathered)
        one = Breadth(ruleset, source_only=True)
        return {
            **status,
            "policy": {"name": ruleset.name, "file": guard.file, "text": loaded.text},
            "productive": len({*map(one.of, gathered.productive)}),
            "left_out": gathered.left_out,
            "rules": rows,
            "large_sources": [
                {"source": str(one.source), "percent": one.share, "connections": one.connections}
                for one in guard.large.sources
            ],
        }

    async def _gather(self) -> _Gathered:
        """Ask all processes what they have measured.

        Raises:
            ControlError: one of them died, or is not there.
        """
        children = self._guard.judges
        if not all(child.serves for child in children):
            raise ControlError("a process of the guard is being started again: ask once more")
        self._number += 1
        number, gathered = self._number, _Gathered(len(children))
        self._gathered[number] = gathered
        try:
            self._tell(Tell(number))
            await asyncio.wait_for(gathered.all, _ANSWER_SECONDS)
        except TimeoutError:
            raise ControlError(
                "a process of the guard gave no answer; `rstguard status` says more"
            ) from None
        finally:
            del self._gathered[number]
        return gathered


def _summary(ruleset: RuleSet, gathered: _Gathered) -> list[dict[str, Any]]:
    """Return what was shown of each rule's measure, as plain values."""
    rows = []
    for rule in ruleset.rules:
        shown = sum_up(rule, gathered.shown.get(rule.name, {}), gathered.productive)
        rows.append({"rule": rule.name, **shown._asdict()})
    return rows
