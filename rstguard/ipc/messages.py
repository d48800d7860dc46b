"""What the processes of the guard say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.nearest import Near
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.shedding import Level
from rstguard.engine.sources import Offence
from rstguard.engine.verdict import Ban, Ends, Reason, Shun
from rstguard.kernel.elements import element_of


@dataclass(frozen=True, slots=True)
class Start:
    """Supervisor to worker or sweeper: begin with this policy."""

    ruleset: RuleSet
    queue: int
    index: int = 0
    """Of a worker: its number among the workers, from 0."""


@dataclass(frozen=True, slots=True)
class Offences:
    """Supervisor to worker and sweeper: what is remembered of an earlier time."""

    offences: tuple[Offence, ...]


@dataclass(frozen=True, slots=True)
class Productive:
    """Sweeper to supervisor to worker: how productive sources are, in percent, by their keys."""

    percents: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Ready:
    """Worker or sweeper: the policy numbered `generation` is in force here.

    A worker says what its packets are read by (`rstguard.kernel.readers`).
    """

    generation: int
    reader: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """Worker or sweeper: cannot go on, and why."""

    sentence: str


@dataclass(frozen=True, slots=True)
class NewPolicy:
    """Supervisor to worker and sweeper: replace the policy, keep the counts."""

    ruleset: RuleSet
    generation: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """A source was banned or shunned in the kernel (or would have been: `enforced` False).

    `by_worker` False tells that the sweeper knows of it already.  `offence` is that of `Ban`.
    """

    kind: str
    source: Prefix
    seconds: int
    rule: str
    reason: Reason
    keep_existing: bool
    enforced: bool = True
    by_worker: bool = True
    offence: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    """A connection was condemned (or would have been); `ends` says who is told.

    `known` is False for a SYN that was refused: there is no other end to be told.
    """

    flow: Tuple
    ends: Ends
    rule: str
    reason: Reason
    enforced: bool = True
    known: bool = True
    by_worker: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """A rule that only observes was crossed."""

    flow: Tuple
    rule: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Overloaded:
    """Worker: what it now leaves undone, as its queue fills or empties."""

    pid: int
    level: Level


@dataclass(frozen=True, slots=True)
class Counts:
    """Worker or sweeper: what was counted since it started (totals, by name)."""

    totals: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Recheck:
    """Supervisor to sweeper: many were banned, so end the connections of all who are."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Supervisor to worker and sweeper: tell how a source (a tagged address) stands."""

    number: int
    source: int


@dataclass(frozen=True, slots=True)
class Explained:
    """Worker or sweeper: how much of each rule's limit the source has used, 1 being all."""

    number: int
    used: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Nearest:
    """Supervisor to worker and sweeper: tell who is nearest each limit, so many a rule at most."""

    number: int
    most: int


@dataclass(frozen=True, slots=True)
class NearestAre:
    """Worker or sweeper: who is nearest."""

    number: int
    nearest: tuple[Near, ...]


@dataclass(frozen=True, slots=True)
class Kill:
    """Supervisor to sweeper: end the connections that all given conditions fit."""

    number: int
    source: Prefix | None = None
    source_port: int | None = None
    destination: Prefix | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """A connection that was condemned but not seen to die, and what is known of it."""

    flow: Tuple
    sentence: str


@dataclass(frozen=True, slots=True)
class Killed:
    """Sweeper: the outcome of `Kill`."""

    number: int
    matched: int
    confirmed: int
    unconfirmed: tuple[Unconfirmed, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class NotKilled:
    """Sweeper: how many condemned connections were not seen to die, and the first of them."""

    count: int
    unconfirmed: tuple[Unconfirmed, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """Supervisor: finish what is in hand and leave."""


@dataclass(frozen=True, slots=True)
class Learn:
    """Supervisor to worker and sweeper: measure what sources show, or forget what was measured.

    While it `rests`, what was measured is kept, and nothing is added to it.
    """

    on: bool
    rests: bool = False


@dataclass(frozen=True, slots=True)
class Tell:
    """Supervisor to worker and sweeper: tell what was measured."""

    number: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Worker or sweeper: a part of what sources showed of a rule's measure, by their keys."""

    number: int
    rule: str
    shown: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class LookProductive:
    """Sweeper: a part of the sources that look productive (`rstguard.engine.shown.Breadth`)."""

    number: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AllMeasured:
    """Worker or sweeper: all was told; so often a source had to make room for others."""

    number: int
    left_out: int


@dataclass(frozen=True, slots=True)
class FoundProductive:
    """Sweeper: so many sources look productive by now."""

    count: int


def blocked_message(effect: Ban | Shun, enforced: bool, by_worker: bool = True) -> Blocked:
    """Return the report of a ban or shun that was carried out (or would have been)."""
    element = element_of(effect)
    return Blocked(
        element.kind,
        effect.source,
        element.remaining or 0,
        effect.rule,
        effect.reason,
        element.keep_existing,
        enforced,
        by_worker,
        effect.offence if isinstance(effect, Ban) else 0,
    )
