"""What is true of the running guard now.  No I/O: the parts read it, each writes its own lines.

Who writes what: `change` the policy in force; `upkeep` what is missing, and panic; `settings` which
sysctls are altered; `processes` what
was not placed or not judged; `hearing` what the processes tell.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from rstguard.engine.ruleset import SECOND, RuleSet
from rstguard.engine.service import Service
from rstguard.engine.shedding import Level
from rstguard.ipc.messages import Productive
from rstguard.ipc.said import Large
from rstguard.kernel.sysctl import Change
from rstguard.observe.events import EventLog
from rstguard.policy.load import Loaded
from rstguard.supervisor.child import Child


class Pressed(NamedTuple):
    """A service in distress: since when (the loop's time), and how many connections it holds.

    From `start` on patience with those that make no progress shrinks, to nothing at `end`.
    """

    since: float
    live: int
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Guard:
    """The state of one guard."""

    loaded: Loaded
    """The policy in force."""
    file: str
    """The file it came from."""
    ruleset: RuleSet
    """What it was compiled to, with the protected addresses in it."""
    events: EventLog
    started: float
    """When the guard began, in seconds of the event loop's clock, as all times here."""
    workers: list[Child] = field(default_factory=list)
    sweepers: list[Child] = field(default_factory=list)
    """The one sweeper, once it has been built."""
    askers: list[Child] = field(default_factory=list)
    """The asker, while the policy wants one."""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever changes rules or policy: they must not meet half-way."""
    diverts: bool = False
    """Whether the rules were put in place for the first time."""
    missing: tuple[str, ...] = ()
    """Rules and sets that were not as they should be when they were last looked at."""
    unseen: tuple[str, ...] = ()
    """What of the protected interfaces the rules do not see, in words."""
    crowded: str = ""
    """Why connections find no room in the tracker's table, or ""."""
    altered: tuple[Change, ...] = ()
    """Sysctls that other programs have changed and that were not put back yet."""
    one_sided: tuple[Service, ...] = ()
    """Services whose answers do not pass here, though their clients go on."""
    unmatched: str = ""
    """Why no packet can come under the policy, or ""."""
    panic: bool = False
    """Whether all traffic passes because somebody said `rstguard panic`."""
    unplaced_at: float | None = None
    """When a ban or shun could last not be placed."""
    unjudged_at: float | None = None
    """When packets last passed, or were dropped, unjudged."""
    memory: Callable[[], str] = lambda: ""
    """Tells why nothing is kept for a restart at present, or ""."""
    unheard: Callable[[], str] = lambda: ""
    """Tells why servers' offers cannot be learned, or ""."""
    overload: dict[int, Level] = field(default_factory=dict)
    """How much the worker of a process id sheds."""
    pressed: dict[Service, Pressed] = field(default_factory=dict)
    """The services in distress."""
    productive: Productive = field(default_factory=lambda: Productive({}))
    large: Large = field(default_factory=lambda: Large(()))
    """The sources that carry a large share of all connections."""
    large_at: float = 0.0
    """When that was told."""

    @property
    def sweeper(self) -> Child:
        """The sweeper's process."""
        return self.sweepers[0]

    @property
    def not_remembered(self) -> str:
        """Why nothing is kept for a restart at present, or ""."""
        return self.memory()

    @property
    def children(self) -> list[Child]:
        """All processes but this one."""
        return [*self.judges, *self.askers]

    @property
    def judges(self) -> list[Child]:
        """Those that judge by the policy's rules: workers and sweeper."""
        return [*self.workers, *self.sweepers]

    @property
    def counts(self) -> Counter[str]:
        """What all processes counted since the guard started."""
        return sum((child.totals for child in self.children), Counter())

    def note_large(self, large: Large, now: float) -> None:
        """Take note of the large sources, as they are at a time of the loop."""
        self.large, self.large_at = large, now

    def large_now(self, now: float) -> Large:
        """Return the large sources, as old as they are at a time of the loop."""
        return self.large.later(max(0, int((now - self.large_at) * SECOND)))

    @property
    def mode(self) -> str:
        """In words, whether the policy enforces."""
        return "enforce" if self.ruleset.enforce else "observe: nothing is blocked"
