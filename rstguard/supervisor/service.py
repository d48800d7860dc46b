"""The guard as a service: it tells systemd how it is, and reads its policy again on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable

from rstguard.engine.ruleset import RuleSet
from rstguard.ipc.requests import ControlError
from rstguard.policy.load import Loaded, PolicyError, load
from rstguard.supervisor.notify import Notifier

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0

Change = Callable[[Loaded, str], Awaitable[None]]
"""Applies a policy and the name of its file; raises ControlError if the old policy stays."""


class Service:
    """What systemd and a SIGHUP want of a guard."""

    def __init__(self, file: str, mute: Callable[[], str], summary: Callable[[], str]) -> None:
        """Speak for a guard.

        Args:
            file: the policy file that a SIGHUP reads again.
            mute: names a process of the guard that does not answer, or returns "".
            summary: what the guard does, in one line.
        """
        self.file = file
        self.notifier = Notifier(os.environ, os.getpid())
        self._mute = mute
        self._summary = summary
        self._hangup = asyncio.Event()

    def listen(self) -> None:
        """Take SIGHUP from now on; one that comes before `attend` waits for it."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup.set)

    async def attend(self, change: Change) -> None:
        """Say that the guard is ready, then give signs of life and reload, until cancelled."""
        self.notifier.status(self._summary())
        self.notifier.ready()
        await asyncio.gather(self._live(), self._reload_often(change))

    async def _live(self) -> None:
        """Send a sign of life every `period`, but only while every process of the guard answers."""
        period = self.notifier.period
        loop = asyncio.get_running_loop()
        next_sign = loop.time()
        while True:
            mute = self._mute()
            said = f"the {mute} does not answer; {self._summary()}" if mute else self._summary()
            self.notifier.status(said)
            if period is not None and not mute and loop.time() >= next_sign:
                self.notifier.alive()
                next_sign = loop.time() + period
            await asyncio.sleep(min(_LOOK_SECONDS, period or _LOOK_SECONDS))

    async def _reload_often(self, change: Change) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            self.notifier.reloading()
            try:
                await self._reload(change)
            finally:
                self.notifier.ready()

    async def _reload(self, change: Change) -> None:
        here = [name for _, name in socket.if_nameindex()]
        try:
            loaded = await asyncio.to_thread(load, self.file, here)
            for problem in loaded.warnings:
                log.warning("%s", problem)
            await change(loaded, self.file)
        except PolicyError as error:
            log.error("the policy is not read again, the old one stays: %s", error)
        except ControlError as error:
            log.error("%s", error)


def mode_of(ruleset: RuleSet) -> str:
    """Return in words whether a policy enforces."""
    return "enforce" if ruleset.enforce else "observe: nothing is blocked"
