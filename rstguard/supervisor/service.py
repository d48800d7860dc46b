"""The guard as a service: it tells systemd how it is, and reads its policy again on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable

from rstguard.ipc.requests import ControlError
from rstguard.policy.check import Around
from rstguard.policy.load import Loaded, PolicyError, load
from rstguard.supervisor.notify import Notifier

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0

Change = Callable[[Loaded, str], Awaitable[None]]
"""Applies a policy and the name of its file; raises ControlError if the old policy stays."""


class Service:
    """What systemd and a SIGHUP want of a guard."""

    def __init__(self, file: str, summary: Callable[[], str], around: Around) -> None:
        """Speak for a guard.

        Args:
            file: the policy file that a SIGHUP reads again.
            summary: how the guard is, in one line.
            around: tells what of a policy cannot match here.
        """
        self.file = file
        self.notifier = Notifier(os.environ, os.getpid())
        self._summary = summary
        self._around = around
        self._hangup = asyncio.Event()

    def listen(self) -> None:
        """Take SIGHUP from now on; one that comes before `attend` waits for it."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hangup.set)

    async def attend(self, change: Change) -> None:
        """Say that the guard is ready, then give signs of life and reload; does not end."""
        self.notifier.status(self._summary())
        self.notifier.ready()
        async with asyncio.TaskGroup() as both:
            both.create_task(self._live())
            both.create_task(self._reload_often(change))

    async def _live(self) -> None:
        """Send a sign of life every `period`.

        It says that this loop lives, and no more.  A worker that hangs is killed and replaced by
        the supervisor itself; to start the whole guard anew for it, or for anything that an
        outsider can cause, would do harm.
        """
        period = self.notifier.period
        loop = asyncio.get_running_loop()
        next_sign = loop.time()
        while True:
            self.notifier.status(self._summary())
            if period is not None and loop.time() >= next_sign:
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
        try:
            loaded = await asyncio.to_thread(load, self.file, self._around)
            for problem in loaded.warnings:
                log.warning("%s", problem)
            await change(loaded, self.file)
        except PolicyError as error:
            log.error("the policy is not read again, the old one stays: %s", error)
        except ControlError as error:
            log.error("%s", error)
