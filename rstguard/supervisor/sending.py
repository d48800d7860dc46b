"""Sends to a process of the guard what its socket does not take at once, a little later."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from rstguard.ipc.channel import Closed, SupervisorEnd
from rstguard.ipc.messages import ToChild

_AGAIN_SECONDS: Final = 0.01


class Sending:
    """Sends messages over one channel until it is closed."""

    def __init__(self, channel: SupervisorEnd) -> None:
        self._channel = channel
        self._open = True

    def send(self, message: ToChild) -> None:
        """Send a message; a process that just died misses nothing: its successor starts anew."""
        if self._open:
            with contextlib.suppress(Closed):
                self._channel.send(message)
            self._go_on()

    def close(self) -> None:
        """Leave unsent what waits."""
        self._open = False

    def _go_on(self) -> None:
        if self._open and self._channel.waiting:
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._flush)

    def _flush(self) -> None:
        if self._open:
            with contextlib.suppress(Closed):
                self._channel.flush()
                self._go_on()
