"""What a guard is started with."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rstguard.ipc.requests import Answer
from rstguard.kernel.seam import Kernel
from rstguard.policy.load import Loaded
from rstguard.supervisor.claims import claim
from rstguard.supervisor.spawn import Spawn, Spawned, spawn


@dataclass(frozen=True, slots=True)
class Options:
    """What `rstguard run` was told."""

    kernel: Kernel
    policy: Loaded
    file: str
    directory: Path
    state: Path
    queue: int
    spawned: tuple[Spawned, ...]
    """The first workers, and last the first sweeper."""
    keep_bans: bool
    event_log: Path | None = None
    journal: bool = False
    spawn: Spawn = spawn
    """Starts their successors."""
    claim: Callable[..., AbstractContextManager[object]] = claim
    """Keeps other guards away from the namespace and from these directories."""
    wall: Callable[[], float] = time.time
    """The clock that people set, in seconds since 1970."""
    web: Callable[[Answer], Coroutine[Any, Any, None]] | None = None
    """Serves the web page for as long as it is let, given what answers requests."""
