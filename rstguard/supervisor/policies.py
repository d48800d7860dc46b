"""The life of a policy in the running guard: applied, confirmed, gone back from, remembered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rstguard.ipc.requests import ControlError, Request
from rstguard.observe.events import Event
from rstguard.policy.load import Loaded, PolicyError, parse
from rstguard.state.history import KEPT, PENDING, UNDONE, Entry, before, gone_back_from
from rstguard.state.store import StoreError

if TYPE_CHECKING:
    from rstguard.supervisor.supervisor import Supervisor

log = logging.getLogger(__name__)

LONGEST_WAIT = 3600
"""Seconds that a policy may wait for its confirmation."""


@dataclass(slots=True)
class _Waiting:
    """A policy that goes unless it is confirmed: its number, the one before it, the alarm."""

    number: int
    loaded: Loaded
    file: str
    alarm: asyncio.TimerHandle
    until: float


class Policies:
    """Changes the policy of a supervisor, with a way back.

    Without a store there is still a way back to the policy before, but no history.
    """

    def __init__(self, guard: Supervisor) -> None:
        self._guard = guard
        self._waiting: _Waiting | None = None
        self._before: tuple[Loaded, str] | None = None
        self._number = 0
        self._going_back: asyncio.Task[None] | None = None
        self._one_by_one = asyncio.Lock()
        """A policy cannot be confirmed while it is being gone back from."""
        self.commands: dict[str, Callable[[Request], Awaitable[object]]] = {
            "policy-apply": self._apply,
            "policy-confirm": self._confirm,
            "policy-rollback": self._rollback,
            "policy-history": self._history,
        }

    @property
    def waits_s(self) -> float | None:
        """For how many more seconds the policy in force waits to be confirmed, or None."""
        return max(0.0, self._waiting.until - time.monotonic()) if self._waiting else None

    def begin(self, loaded: Loaded, file: str) -> tuple[Loaded, str]:
        """Return the policy to start with: the file's, unless it was gone back from.

        A policy that nobody confirmed must not return by a restart or a reboot.
        """
        history = self._entries()
        if gone_back_from(history, loaded.text):
            last = before(history, loaded.text)
            if last is not None and (parsed := _parsed(last)) is not None:
                log.error(
                    "%s holds a policy that was not confirmed or was rolled back; the one before "
                    "it (%s) is used instead: `rstguard policy apply FILE` makes a policy the one "
                    "to start with",
                    file,
                    last.name,
                )
                loaded, file = parsed, last.file
        if not history or history[0].text != loaded.text or history[0].state != KEPT:
            self._number = self._write("the guard", "start", loaded, file, KEPT)
        else:
            self._number = history[0].number
        return loaded, file

    async def _apply(self, request: Request) -> object:
        name, text = _text(request, "name"), _text(request, "text")
        wait = request.get("confirm_s")
        if wait is not None and (type(wait) is not int or not 1 <= wait <= LONGEST_WAIT):
            raise ControlError(f"a policy waits 1 to {LONGEST_WAIT} seconds to be confirmed")
        try:
            loaded = parse(text, name)
        except PolicyError as error:
            raise ControlError(str(error)) from None
        self._guard.upkeep.administrator(request.get("ssh"))
        async with self._one_by_one:
            done = await self._change(loaded, name, _who(request), "apply", wait)
        spared = [line._asdict() for line in self._guard.upkeep.lifelines]
        return done | {"spared": [{**row, "address": str(row["address"])} for row in spared]}

    async def reload(self, loaded: Loaded, file: str) -> None:
        """Take up the policy file again, as the service manager asked.

        Raises:
            ControlError: it was refused; the old policy is in force.
        """
        async with self._one_by_one:
            await self._change(loaded, file, "the service manager", "apply", None)

    async def _change(
        self, loaded: Loaded, file: str, who: str, action: str, wait: int | None
    ) -> dict[str, Any]:
        guard = self._guard
        waiting = self._waiting
        # What is applied while another waits goes back to the same one: the last that was good.
        old = (waiting.loaded, waiting.file) if waiting else (guard.loaded, guard.file)
        began = time.monotonic()
        await guard.change_policy(loaded, file)
        took = time.monotonic() - began
        self._disarm()
        if waiting:
            self._mark(waiting.number, UNDONE)
        if old[0].text != loaded.text:
            self._before = old
        self._number = self._write(who, action, loaded, file, KEPT if wait is None else PENDING)
        if wait is not None:
            alarm = asyncio.get_running_loop().call_later(wait, self._time_is_over)
            self._waiting = _Waiting(self._number, *old, alarm, time.monotonic() + wait)
        return {
            "name": guard.ruleset.name,
            "took_ms": round(took * 1000, 1),
            "confirm_s": wait,
            "number": self._number,
        }

    async def _confirm(self, request: Request) -> object:
        async with self._one_by_one:
            if self._waiting is None:
                raise ControlError(
                    "no policy waits to be confirmed; `rstguard policy history` says why"
                )
            number = self._waiting.number
            self._disarm()
            self._mark(number, KEPT)
            name = self._guard.ruleset.name
            self._guard.events.add(Event("policy", name, detail=f"confirmed by {_who(request)}"))
            return {"name": name, "number": number}

    async def _rollback(self, request: Request) -> object:
        async with self._one_by_one:
            last = self._last()
            if last is None:
                raise ControlError("there is no earlier policy to go back to")
            undone = self._guard.loaded.text
            done = await self._change(*last, _who(request), "rollback", None)
            self._before = None
            store = self._guard.record.store
            if store and undone != last[0].text:
                with _logged():
                    store.undo_policy(undone)
            return done

    def _last(self) -> tuple[Loaded, str] | None:
        if self._waiting:
            return self._waiting.loaded, self._waiting.file
        if self._before:
            return self._before
        entry = before(self._entries(), self._guard.loaded.text)
        parsed = _parsed(entry) if entry else None
        return (parsed, entry.file) if parsed and entry else None

    async def _history(self, _request: Request) -> object:
        return [
            entry._asdict() | {"in_force": entry.number == self._number}
            for entry in self._entries()
        ]

    def _time_is_over(self) -> None:
        # Kept in a field: a task that nobody refers to may vanish.
        self._going_back = asyncio.ensure_future(self._go_back(self._waiting))

    async def _go_back(self, late: _Waiting | None) -> None:
        async with self._one_by_one:
            if late is None or self._waiting is not late:
                return  # confirmed, or gone, in this very moment
            name = self._guard.ruleset.name
            try:
                await self._change(late.loaded, late.file, "the guard", "not confirmed", None)
            except ControlError as error:
                log.error("policy %s was not confirmed, but cannot be taken back: %s", name, error)
                return
            log.warning("policy %s was not confirmed in time; the one before it is in force", name)

    def _disarm(self) -> None:
        if self._waiting:
            self._waiting.alarm.cancel()
            self._waiting = None

    def _entries(self) -> list[Entry]:
        store = self._guard.record.store
        if store:
            with _logged():
                return store.policies()
        return []

    def _write(self, who: str, action: str, loaded: Loaded, file: str, state: str) -> int:
        store = self._guard.record.store
        if store is None:
            return 0
        try:
            return store.add_policy(who, action, loaded.policy.name, file, loaded.text, state)
        except StoreError as error:
            log.error("%s", error)
            return 0

    def _mark(self, number: int, state: str) -> None:
        store = self._guard.record.store
        if store and number:
            with _logged():
                store.mark_policy(number, state)


@contextmanager
def _logged() -> Iterator[None]:
    """A policy is in force whether or not the disk takes a note of it."""
    try:
        yield
    except StoreError as error:
        log.error("%s", error)


def _parsed(entry: Entry) -> Loaded | None:
    try:
        return parse(entry.text, entry.file)
    except PolicyError as error:  # of a later version of the language
        log.error("policy %d of the history can no longer be read: %s", entry.number, error)
        return None


def _text(request: Request, key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise ControlError(f"the request lacks {key!r}")
    return value


def _who(request: Request) -> str:
    """Return who asked: the account that the kernel names, and what the command adds."""
    said = request.get("who")
    account = str(request.get("account", "somebody"))
    return f"{account} ({said})" if isinstance(said, str) and said else account
