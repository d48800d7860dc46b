"""What a service says to systemd: one datagram for each change of its state (sd_notify(3)).

Without ``NOTIFY_SOCKET`` in its environment, started by hand for instance, it says nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Notifier:
    """Tells systemd how the service is.  A lost notice is logged and is no error."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        """Take the socket and the watchdog's time from the environment of the process `pid`."""
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading "@" stands for the zero byte of an abstract name.
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._status = ""
        self.period = self._watchdog(environment, pid) if address else None
        """Seconds between two signs of life, half of what systemd waits; None: it waits for none.
        """

    @staticmethod
    def _watchdog(environment: Mapping[str, str], pid: int) -> float | None:
        usec = environment.get("WATCHDOG_USEC", "")
        if not usec.isdecimal() or int(usec) == 0:
            return None
        if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
            return None  # meant for the process that started this one
        return int(usec) / 2_000_000

    def ready(self) -> None:
        """Say that the guard filters, at first or again after a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the policy is being read again; `ready` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the guard is being taken down."""
        self._send("STOPPING=1", "STATUS=stopping")

    def alive(self) -> None:
        """Give the watchdog its sign of life."""
        self._send("WATCHDOG=1")

    def status(self, sentence: str) -> None:
        """Set the line that `systemctl status` shows; nothing is sent if it is that already."""
        line = " ".join(sentence.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def _send(self, *fields: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as one:
                # An unread socket must not hold up the guard.
                one.settimeout(1)
                one.sendto(os.fsencode("\n".join(fields)), self._address)
        except OSError as error:
            log.warning("systemd could not be told %s: %s", fields[0], error.strerror or error)
