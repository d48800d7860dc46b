"""Where events go besides the text log: a file of JSON lines, and the journal with its fields."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

JOURNAL = "/run/systemd/journal/socket"
_WARNINGS = frozenset({"capped", "conflict", "panic", "overload", "restart", "not_killed"})
_LEVEL_WARNING, _LEVEL_INFO = 4, 6

Record = Mapping[str, object]


class Sink(Protocol):
    """Takes events, never raises, and tells once if it cannot keep them."""

    def write(self, record: Record, text: str) -> None:
        """Take one event, as data and as a line for people."""

    def close(self) -> None:
        """Let go of what it holds."""


class JsonLines:
    """Appends one line of JSON for each event to a file.

    The file may be moved away by logrotate at any time: the next event goes into a new one.  A line
    is written by one system call, so that readers never see half of one, except on a full disk.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._path = path
        self._failed = False
        self._torn = False
        self._file = self._open()

    def _open(self) -> int:
        # A pipe that nobody reads must not hold up the guard.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._path, flags, 0o640)

    def write(self, record: Record, text: str) -> None:
        """Append an event; `text` is not needed here."""
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            self._follow()
            if self._torn:
                line = b"\n" + line
            written = os.write(self._file, line)
            self._torn = written < len(line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("events are lost: %s cannot be written (%s)", self._path, error.strerror)
            self._failed = True

    def _follow(self) -> None:
        """Open the file again if another, or none, is at its place."""
        held = os.fstat(self._file)
        try:
            there = self._path.stat()
            if (there.st_ino, there.st_dev) == (held.st_ino, held.st_dev):
                return
        except FileNotFoundError:
            pass
        fresh = self._open()
        os.close(self._file)
        self._file = fresh

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Journal:
    """Sends events to systemd's journal with fields of their own (RSTGUARD_KIND, …).

    The protocol is that of systemd's "Native Journal Protocol": one datagram for each entry.
    """

    def __init__(self, path: str = JOURNAL) -> None:
        """Raises OSError if there is no journal."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.lost = 0
        """Entries that a busy journal has not taken since it last took one."""

    def write(self, record: Record, text: str) -> None:
        """Send an event; one that the journal does not take at once is lost, counted, and told."""
        warns = record["kind"] in _WARNINGS
        fields = {
            "MESSAGE": text,
            "PRIORITY": _LEVEL_WARNING if warns else _LEVEL_INFO,
            "SYSLOG_IDENTIFIER": "rstguard",
        }
        fields |= {
            f"RSTGUARD_{key.upper()}": value
            for key, value in record.items()
            if value not in (None, "")
        }
        try:
            self._socket.send(b"".join(_field(key, str(value)) for key, value in fields.items()))
        except OSError:
            self.lost += 1
            return
        if self.lost:
            log.warning("the journal was busy, and %d events did not get into it", self.lost)
            self.lost = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"
