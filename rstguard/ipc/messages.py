"""What the processes of the guard say to each other.

`FromChild` is what a worker or the sweeper says.  These read what strangers send and are trusted
with as little as possible, so their messages are data only: JSON whose every value is checked
(`rstguard.ipc.codec`) before the supervisor sees it.  `ToChild` is what the supervisor says; it has
more rights than whoever reads it, and its messages hold whole policies, so they travel as pickles
(`rstguard.ipc.channel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.nearest import Near
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.shedding import Level
from rstguard.engine.sources import Offence
from rstguard.engine.verdict import Ban, Ends, Reason, Shun
from rstguard.ipc import values
from rstguard.ipc.said import Large, Said, UnderPressure, Weighed
from rstguard.ipc.values import MOST_NAMES, Count, CountName, RuleName, Text
from rstguard.kernel.elements import Element, element_of


@dataclass(frozen=True, slots=True)
class Start:
    """Supervisor to worker or sweeper: begin with this policy."""

    ruleset: RuleSet
    queue: int
    index: int = 0
    """Of a worker: its number among the workers, from 0."""


@dataclass(frozen=True, slots=True)
class NewPolicy:
    """Supervisor to worker and sweeper: replace the policy, keep the counts."""

    ruleset: RuleSet
    generation: int


@dataclass(frozen=True, slots=True)
class Offences:
    """Supervisor to worker and sweeper: what is remembered of an earlier time."""

    offences: tuple[Offence, ...]


@dataclass(frozen=True, slots=True)
class Recheck:
    """Supervisor to sweeper: many were banned, so end the connections of all who are."""


@dataclass(frozen=True, slots=True)
class Explain:
    """Supervisor to worker and sweeper: tell how a source (a tagged address) stands."""

    number: int
    source: int


@dataclass(frozen=True, slots=True)
class Nearest:
    """Supervisor to worker and sweeper: tell who is nearest each limit, so many a rule at most."""

    number: int
    most: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Supervisor to sweeper: end the connections that all given conditions fit."""

    number: int
    source: Prefix | None = None
    source_port: int | None = None
    destination: Prefix | None = None
    port: int | None = None


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
class Stop:
    """Supervisor: finish what is in hand and leave."""


class Blocked(Said, frozen=True):
    """A source was banned or shunned in the kernel (or would have been: `enforced` False).

    To the supervisor, and on to the sweeper: `by_worker` False tells that it knows of it already.
    `offence` is that of `Ban`, `withheld` that of `Shun`.
    """

    element: Element
    reason: Reason
    enforced: bool = True
    by_worker: bool = True
    offence: Annotated[int, Meta(ge=0, le=64)] = 0
    withheld: bool = False

    def __post_init__(self) -> None:
        values.check_element(self.element)


class Reset(Said, frozen=True):
    """A connection was condemned (or would have been); `ends` says who is told.

    Worker or sweeper to supervisor, and from a worker on to the sweeper.  `known` is False for a
    SYN that was refused: there is no other end to be told.
    """

    flow: Tuple
    ends: Ends
    rule: RuleName
    reason: Reason
    enforced: bool = True
    known: bool = True
    by_worker: bool = True

    def __post_init__(self) -> None:
        values.check_flow(self.flow)


class Productive(Said, frozen=True):
    """Sweeper to supervisor to worker: how productive sources are, in percent, by their keys."""

    percents: Mapping[int, Annotated[int, Meta(ge=0, le=100)]]

    def __post_init__(self) -> None:
        values.check_keys(self.percents)


class Ready(Said, frozen=True):
    """Worker or sweeper: the policy numbered `generation` is in force here.

    A worker says what its packets are read by (`rstguard.kernel.readers`).
    """

    generation: Count
    reader: Annotated[str, Meta(pattern=r"\A[a-z_-]{0,32}\Z")] = ""


class Failed(Said, frozen=True):
    """Worker or sweeper: cannot go on, and why; one line is made of it."""

    sentence: str

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "sentence", values.one_line(self.sentence))


class Observed(Said, frozen=True):
    """A rule that only observes was hit."""

    flow: Tuple
    rule: RuleName
    reason: Reason

    def __post_init__(self) -> None:
        values.check_flow(self.flow)


class Overloaded(Said, frozen=True):
    """Worker: what it now leaves undone, as its queue fills or empties."""

    pid: Count
    level: Level


class Counts(Said, frozen=True):
    """Worker or sweeper: what was counted since it started (totals, by name)."""

    totals: Annotated[Mapping[CountName, Count], Meta(max_length=MOST_NAMES)]

    def __post_init__(self) -> None:
        values.check_printable("".join(self.totals))


class Explained(Said, frozen=True):
    """Worker or sweeper: how much of each rule's limit the source has used, 1 being all."""

    number: Count
    used: Annotated[Mapping[RuleName, float], Meta(max_length=MOST_NAMES)]


class NearestAre(Said, frozen=True):
    """Worker or sweeper: who is nearest."""

    number: Count
    nearest: Annotated[tuple[Near, ...], Meta(max_length=MOST_NAMES)]

    def __post_init__(self) -> None:
        for rule, subject, _ in self.nearest:
            values.check_printable(rule, values.LONGEST_NAME)
            values.check_printable(subject, values.LONGEST_NAME)


class Unconfirmed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A connection that was condemned but not seen to die, and what is known of it."""

    flow: Tuple
    sentence: Text

    def __post_init__(self) -> None:
        values.check_flow(self.flow)
        values.check_printable(self.sentence)


class Killed(Said, frozen=True):
    """Sweeper: the outcome of `Kill`."""

    number: Count
    matched: Count
    confirmed: Count
    unconfirmed: Annotated[tuple[Unconfirmed, ...], Meta(max_length=MOST_NAMES)] = ()


class NotKilled(Said, frozen=True):
    """Sweeper: how many condemned connections were not seen to die, and the first of them."""

    count: Count
    unconfirmed: Annotated[tuple[Unconfirmed, ...], Meta(max_length=MOST_NAMES)]


class Measured(Said, frozen=True):
    """Worker or sweeper: a part of what sources showed of a rule's measure, by their keys."""

    number: Count
    rule: RuleName
    shown: tuple[tuple[int, Count], ...]

    def __post_init__(self) -> None:
        values.check_keys([key for key, _ in self.shown])


class LookProductive(Said, frozen=True):
    """Sweeper: a part of the sources that look productive (`rstguard.engine.shown.Breadth`)."""

    number: Count
    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        values.check_keys(self.sources)


class AllMeasured(Said, frozen=True):
    """Worker or sweeper: all was told; so often a source had to make room for others."""

    number: Count
    left_out: Count


class FoundProductive(Said, frozen=True):
    """Sweeper: so many sources look productive."""

    count: Count


Order = NewPolicy | Offences | Recheck | Learn | Stop
Question = Explain | Nearest | Kill | Tell
ToChild = Start | Order | Question | Productive | Large | Blocked | Reset

Reply = Explained | NearestAre | Killed | Measured | LookProductive | AllMeasured
Told = Productive | FoundProductive | UnderPressure | Large
News = Blocked | Reset | Weighed | Observed | Overloaded | NotKilled | Told
OfItself = Ready | Failed | Counts  # what concerns nobody but the process that says it
FromChild = OfItself | News | Reply


def blocked_message(effect: Ban | Shun, enforced: bool, by_worker: bool = True) -> Blocked:
    """Return the report of a ban or shun that was carried out (or would have been)."""
    offence, withheld = (effect.offence, False) if isinstance(effect, Ban) else (0, effect.withheld)
    return Blocked(element_of(effect), effect.reason, enforced, by_worker, offence, withheld)
