"""The life of a policy in the running guard: applied, confirmed, rolled back, remembered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rstguard.ipc.requests import ControlError, Request, text_of
from rstguard.observe.events import Event
from rstguard.policy.load import Loaded, PolicyError, parse
from rstguard.state.history import KEPT, PENDING, UNDONE, Entry, before, gone_back_from
from rstguard.state.record import Record
from rstguard.state.store import StoreError
from rstguard.supervisor.change import Change
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.protected import Protected

log = logging.getLogger(__name__)

LONGEST_WAIT = 3600
"""Seconds that a policy may wait for its confirmation."""
_AGAIN_SECONDS = 1.0

_T = TypeVar("_T")


@dataclass(slots=True)
class _Waiting:
    """A policy that rolls back unless it is confirmed: its number, the one before it, the alarm."""

    number: int
    loaded: Loaded
    file: str
    alarm: asyncio.TimerHandle
    until: float


class Policies:
    """Changes the policy of a guard, with a way back.

    Without a store there is still a way back to the policy before, but no history.
    """

    def __init__(self, guard: Guard, change: Change, record: Record, protected: Protected) -> None:
        self._guard = guard
        self._change = change
        self._record = record
        self._protected = protected
        self._start_file = guard.file
        """What the guard reads when it starts, or is told to read its policy again."""
        self._waiting: _Waiting | None = None
        self._before: tuple[Loaded, str] | None = None
        self._number = 0
        self._late = asyncio.Event()
        """Set when a policy was not confirmed in time, or a history can be kept now."""
        record.opened_late = self._late.set
        self._one_by_one = asyncio.Lock()
        """A policy cannot be confirmed while it is being rolled back."""
        self.commands: dict[str, Callable[[Request], Awaitable[object]]] = {
            "policy-apply": self._apply,
            "policy-confirm": self._confirm,
            "policy-rollback": self._rollback,
            "policy-history": self._history,
        }

    @property
    def waits_s(self) -> float | None:
        """For how many more seconds the policy in force waits to be confirmed, or None."""
        return max(0.0, self._waiting.until - _now()) if self._waiting else None

    async def begin(self) -> None:
        """Choose the policy to start with: the file's, unless it was rolled back.

        A policy that nobody confirmed must not return by a restart or a reboot.
        """
        guard = self._guard
        history = await self._entries()
        if gone_back_from(history, guard.loaded.text):
            last = before(history, guard.loaded.text)
            if last is not None and (parsed := await _parsed(last)) is not None:
                log.error(
                    "%s holds a policy that was not confirmed or was rolled back; the one before "
                    "it (%s) is used instead: `rstguard policy apply FILE` makes a policy the one "
                    "to start with",
                    guard.file,
                    last.name,
                )
                guard.loaded, guard.file = parsed, last.file
        loaded, file = guard.loaded, guard.file
        if not history or history[0].text != loaded.text or history[0].state != KEPT:
            self._number = await self._write("the guard", "start", loaded, file, KEPT)
        else:
            self._number = history[0].number

    async def _apply(self, request: Request) -> object:
        name, text = text_of(request, "name"), text_of(request, "text")
        wait = request.get("confirm_s")
        if wait is not None and (type(wait) is not int or not 1 <= wait <= LONGEST_WAIT):
            raise ControlError(f"a policy waits 1 to {LONGEST_WAIT} seconds to be confirmed")
        try:
            loaded = await asyncio.to_thread(parse, text, name)
        except PolicyError as error:
            raise ControlError(str(error)) from None
        self._protected.administrator(request.get("ssh"))
        async with self._one_by_one:
            done = await self._replace(loaded, name, _who(request), "apply", wait)
        protected = [line._asdict() for line in self._protected.addresses]
        return done | {"protected": [{**row, "address": str(row["address"])} for row in protected]}

    async def reload(self, loaded: Loaded, file: str) -> None:
        """Take up the policy file again, as the service manager asked.

        Raises:
            ControlError: it was refused; the old policy is in force.
        """
        async with self._one_by_one:
            await self._replace(loaded, file, "the service manager", "apply", None)

    async def _replace(
        self, loaded: Loaded, file: str, who: str, action: str, wait: int | None
    ) -> dict[str, Any]:
        guard = self._guard
        waiting = self._waiting
        # What is applied while another waits goes back to the same one: the last that was good.
        old = (waiting.loaded, waiting.file) if waiting else (guard.loaded, guard.file)
        began = _now()
        await self._change.apply(loaded, file)
        took = _now() - began
        self._disarm()
        if wait is not None:
            alarm = asyncio.get_running_loop().call_later(wait, self._late.set)
            self._waiting = _Waiting(0, *old, alarm, _now() + wait)
        if old[0].text != loaded.text:
            self._before = old
        if waiting:
            await self._mark(waiting.number, UNDONE)
        state = KEPT if wait is None else PENDING
        self._number = await self._write(who, action, loaded, file, state)
        if self._waiting:
            self._waiting.number = self._number
        return {
            "name": guard.ruleset.name,
            "took_ms": round(took * 1000, 1),
            "confirm_s": wait,
            "number": self._number,
            "start_file": self._start_file,
        }

    async def _confirm(self, request: Request) -> object:
        async with self._one_by_one:
            if self._waiting is None:
                raise ControlError(
                    "no policy waits to be confirmed; `rstguard policy history` says why"
                )
            number = self._waiting.number
            self._disarm()
            await self._mark(number, KEPT)
            name = self._guard.ruleset.name
            self._guard.events.add(Event("policy", name, detail=f"confirmed by {_who(request)}"))
            return {"name": name, "number": number, "start_file": self._start_file}

    async def _rollback(self, request: Request) -> object:
        async with self._one_by_one:
            last = await self._last()
            if last is None:
                raise ControlError("there is no earlier policy to go back to")
            undone = self._guard.loaded.text
            done = await self._replace(*last, _who(request), "rollback", None)
            self._before = None
            if undone != last[0].text:
                await self._stored(lambda store: store.undo_policy(undone), None)
            return done

    async def _last(self) -> tuple[Loaded, str] | None:
        if self._waiting:
            return self._waiting.loaded, self._waiting.file
        if self._before:
            return self._before
        entry = before(await self._entries(), self._guard.loaded.text)
        parsed = await _parsed(entry) if entry else None
        return (parsed, entry.file) if parsed and entry else None

    async def _history(self, _request: Request) -> object:
        return [
            entry._asdict() | {"in_force": entry.number == self._number}
            for entry in await self._entries()
        ]

    async def watch(self) -> None:
        """Roll back what nobody confirmed in time; does not end by itself."""
        while True:
            await self._late.wait()
            self._late.clear()
            await self._go_back()
            await self._catch_up()

    async def _catch_up(self) -> None:
        """Enter the policy in force into a history that could not be kept when it came."""
        async with self._one_by_one:
            if self._number or self._record.store is None:
                return
            loaded, file = self._guard.loaded, self._guard.file
            state = PENDING if self._waiting else KEPT
            self._number = await self._write("the guard", "start", loaded, file, state)
            if self._waiting:
                self._waiting.number = self._number

    async def _go_back(self) -> None:
        async with self._one_by_one:
            late = self._waiting
            if late is None or _now() < late.until:
                return  # confirmed, or another one waits by now
            name = self._guard.ruleset.name
            try:
                await self._replace(late.loaded, late.file, "the guard", "not confirmed", None)
            except ControlError as error:
                log.error(
                    "policy %s was not confirmed, and cannot be rolled back yet: %s", name, error
                )
                late.alarm = asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._late.set)
                return
            log.warning("policy %s was not confirmed in time; the one before it is in force", name)

    def _disarm(self) -> None:
        if self._waiting:
            self._waiting.alarm.cancel()
            self._waiting = None

    async def _entries(self) -> list[Entry]:
        return await self._stored(lambda store: store.policies(), [])

    async def _write(self, who: str, action: str, loaded: Loaded, file: str, state: str) -> int:
        name, text = loaded.policy.name, loaded.text
        return await self._stored(
            lambda store: store.add_policy(who, action, name, file, text, state), 0
        )

    async def _mark(self, number: int, state: str) -> None:
        if number:
            await self._stored(lambda store: store.mark_policy(number, state), None)

    async def _stored(self, use: Callable[[Any], _T], otherwise: _T) -> _T:
        """Use the store off the loop; a policy is in force whether or not the disk notes it."""
        store = self._record.store
        if store is None:
            return otherwise
        try:
            return await asyncio.to_thread(use, store)
        except StoreError as error:
            log.error("%s", error)
            return otherwise


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _parsed(entry: Entry) -> Loaded | None:
    try:
        return await asyncio.to_thread(parse, entry.text, entry.file)
    except PolicyError as error:  # of a later version of the language
        log.error("policy %d of the history can no longer be read: %s", entry.number, error)
        return None


def _who(request: Request) -> str:
    """Return who asked: the account that the kernel names, and what the command adds."""
    said = request.get("who")
    account = str(request.get("account", "somebody"))
    return f"{account} ({said})" if isinstance(said, str) and said else account
