"""How the guard is: one value, from which status, metrics and service manager derive.  Pure."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Final, NamedTuple

from rstguard.engine.shedding import Level
from rstguard.kernel.admission import REFUSED_GROUP, TOLD_GROUP
from rstguard.supervisor.child import State
from rstguard.supervisor.guard import Guard

RECENT: Final = 60.0
"""Seconds for which it is told that bans were not placed or packets passed unjudged."""
SILENT: Final = 2.0
"""Seconds without a report after which a worker, or the asker, does not count as at work."""


class Condition(Enum):
    """How the guard is, in a word."""

    FILTERING = "filtering"
    DEGRADED = "degraded"
    NOT_FILTERING = "not filtering"


class Health(NamedTuple):
    """The guard's condition and, in sentences without a full stop, what is wrong, worst first."""

    condition: Condition
    problems: tuple[str, ...]

    @property
    def filtering(self) -> bool:
        """Whether the guard filters, and lacks nothing."""
        return self.condition is Condition.FILTERING

    @property
    def at_work(self) -> bool:
        """Whether the guard filters, be it degraded."""
        return self.condition is not Condition.NOT_FILTERING

    def __str__(self) -> str:
        """The condition and the first problem."""
        return ": ".join([self.condition.value, *self.problems[:1]])


def health(guard: Guard, now: float) -> Health:
    """Return how the guard is at `now`, in seconds of the event loop's clock.

    *Filtering*: every worker and the sweeper serve, the rules are in place, and something can come
    under them.  *Not filtering*: no worker serves, a rule or set is gone, or nothing can match.
    *Degraded*: at work, but not with all its parts.
    """
    if guard.panic:
        return Health(Condition.DEGRADED, ("panic: all traffic passes", *_degraded(guard, now)))
    if stopped := tuple(_not_filtering(guard, now)):
        return Health(Condition.NOT_FILTERING, (*stopped, *_degraded(guard, now)))
    if lacking := tuple(_degraded(guard, now)):
        return Health(Condition.DEGRADED, lacking)
    return Health(Condition.FILTERING, ())


def _not_filtering(guard: Guard, now: float) -> Iterator[str]:
    if not guard.diverts:
        yield "the guard is starting: no packet is diverted yet"
    if not any(_works(guard, index) for index in range(len(guard.workers))):
        yield "no worker serves"
    if guard.unmatched:
        yield guard.unmatched
    yield from (f"missing: {lack}" for lack in guard.missing)


def _works(guard: Guard, index: int) -> bool:
    worker = guard.workers[index]
    return worker.serves and worker.silent_for() < SILENT


def _degraded(guard: Guard, now: float) -> Iterator[str]:
    for rule in sorted(guard.ruleset.capped):
        yield (
            f"CAPPED: rule {rule} banned sources of more than {guard.ruleset.bans_per_minute} "
            "networks in a minute and shuns instead until that is over: see `rstguard events`"
        )
    for child in guard.children:
        if not child.serves:
            yield f"the {child.name} does not serve ({_stage(child.state)})"
        elif child is not guard.sweeper and child.silent_for() >= SILENT:
            yield f"the {child.name} has been silent for {child.silent_for():.0f} s"
    if guard.ruleset.forged_resets == "hold" and guard.counts["cannot_hold"]:
        yield (
            "forged RSTs are told, not held: this kernel does not let a connection be called "
            "established again that a RST has closed"
        )
    if guard.counts["cannot_count"]:
        yield (
            "connections are counted by sweeps alone, so between two more may be open than a rule "
            f"allows: another program reads NFLOG group {TOLD_GROUP} or {REFUSED_GROUP}, or the "
            "kernel has no NFLOG; stop it, or load nfnetlink_log, and restart the guard"
        )
    if guard.counts["uncounted"]:
        yield (
            "more connections began in the last minute than could be counted one by one: their "
            "limits were held by the kernel's own count, and closed ones freed no place before the "
            "next sweep"
        )
    if guard.unplaced_at is not None and now - guard.unplaced_at < RECENT:
        yield "bans could not be placed in the last minute: a set is full, or the kernel refused"
    if any(level is not Level.NOTHING for level in guard.overload.values()):
        yield "a worker is overrun and sheds load"
    elif guard.unjudged_at is not None and now - guard.unjudged_at < RECENT:
        yield "packets passed unjudged in the last minute"
    yield from _around(guard)
    if guard.not_remembered:
        yield guard.not_remembered


def _around(guard: Guard) -> Iterator[str]:
    """What the network, or other programs beside the guard, keep it from."""
    yield from guard.unseen
    if guard.crowded:
        yield guard.crowded
    if guard.one_sided:
        shown = ", ".join(map(str, guard.one_sided[:3]))
        more = f" and {len(guard.one_sided) - 3} more" if len(guard.one_sided) > 3 else ""
        yield (
            f"only one side is seen of {shown}{more}: its answers take another way, so rules on "
            "handshakes and connections cannot act on it; lead them through this gateway, or name "
            "under protect: destinations and ports what does answer here"
        )
    for change in guard.altered:
        yield (
            f"another program has set {change.name} to {change.before}: of connections that begin "
            "meanwhile bytes or age are not known, and rules on these do not act; find it"
        )
    if unheard := guard.unheard():
        yield f"shunned sources are dropped, not challenged: {unheard}"


def _stage(state: State) -> str:
    return "it is started again and again" if state is State.BACKOFF else state.value
