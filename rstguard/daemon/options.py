"""What a guard is started with."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from rstguard.policy.load import Loaded


@dataclass(frozen=True, slots=True)
class Options:
    """What `rstguard run` was told."""

    policy: Loaded
    file: str
    directory: Path
    state: Path
    queue: int
    workers: int
    keep_bans: bool
    event_log: Path | None = None
    journal: bool = False
    web: socket.socket | None = None
