"""What is known of each connection that is being killed, and what follows from it.  Pure.

What is provable, and how:

- An end has been sent its RST once its RST_SENT bit is on the connection; the rule in front of the
  one that sends the RST sets it.  The packet counters would tell it less surely: between setting
  the mark and reading the counters a busy end may already have died, and dead ends count no more.
- State CLOSE proves no more than that one RST passed.  The tracker enters it with the first RST of
  the kernel's own (nf_reject, nf_ct_set_closing) as with a RST of an end that passed its checks.
  With no RST_SENT bit it was the latter: an end closed the connection itself, before it was
  condemned, and its RST went on to the other, so there is nothing left to kill.
- An end whose RST passes to another that was sent none yet is dead, and the other hears of it: the
  rule for it sets both RST_SENT bits.  So ends a client whose segments were on their way when its
  server was reset: the dead server answers them with a RST of its own, and both are silent.
- An entry in CLOSE vanishes after 10 s, so absence must not be waited for; and absence by itself
  proves nothing (the table may have been flushed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from rstguard.engine.flow import Flow, TcpState, Tuple, held_on
from rstguard.engine.segment import opening
from rstguard.engine.verdict import Ends, Reason
from rstguard.kernel.marks import Labels, Marks

MILLISECOND: Final = 1_000_000

PROBE_AT: Final = tuple(
    ms * MILLISECOND for ms in (0, 20, 60, 150, 400, 800, 1300, 2000, 2800, 3600, 4400)
)
"""When to probe, after condemning: each probe is answered, unless it or the answer is lost."""

STRICT_AFTER: Final = 3
"""Probes after which a silent end is taken to be behind a firewall that drops what does not fit."""

OVER: Final = frozenset({TcpState.TIME_WAIT, TcpState.CLOSE})
"""States in which no end will send data any more."""


class Target(NamedTuple):
    """A connection to kill, which of its ends are to be told, by which rule and why."""

    flow: Flow
    ends: Ends
    rule: str
    reason: Reason


class Outcome(Enum):
    """What became of a target."""

    RESET = "every end that was to be told was sent a RST"
    SUBFLOW = (
        "client and server were reset, but it is an MPTCP connection: this subflow of it is ended,"
        " its sockets may stay (`mptcp: strip` in the policy makes connections plain TCP)"
    )
    OVER = "the connection had ended by itself"
    SILENT = "an end answered no probe, so that nothing proves that it was reset"
    LOST = "the kernel forgot the connection before its ends answered"
    REFUSED = "the connection could not be condemned"


class Result(NamedTuple):
    """The end of one case: outcome, which ends stayed silent, when it ended and how long it took.

    Times are monotonic ns.
    """

    target: Target
    outcome: Outcome
    silent: Ends | None
    at: int
    took: int
    text: str

    @property
    def confirmed(self) -> bool:
        """Whether the kernel's table proves that the connection is dead."""
        return self.outcome in (Outcome.RESET, Outcome.OVER)


@dataclass(slots=True)
class Case:
    """What is known of one target.  Pure: it is told what the table says, and says what to do."""

    target: Target
    since: int
    deadline: int
    marks: Marks
    labels: Labels
    condemned: bool = False
    condemned_at: int = 0
    probes: int = 0
    closed_before: bool = False
    disturbed: bool = False
    rst_sent: int = 0

    @property
    def wanted(self) -> int:
        """The RST_SENT bits that prove the case."""
        return self.marks.rst_sent_for[self.target.ends]

    @property
    def bits(self) -> int:
        """The bits that condemn the ends."""
        return self.marks.condemned_for[self.target.ends]

    def judge(self, seen: Flow | None, now: int) -> Result | None:
        """Return the end of the case if what the table shows ends it; `seen` None is absence."""
        if seen is None or seen.ident != self.target.flow.ident:
            return self.absent(now)
        self.rst_sent |= seen.mark & self.wanted
        if self.rst_sent == self.wanted:
            of_mptcp = seen.labels >> self.labels.mptcp & 1
            return self.result(Outcome.SUBFLOW if of_mptcp else Outcome.RESET, now)
        # Other software has changed the mark; it may have taken RST_SENT bits with it.
        self.disturbed |= self.condemned and not seen.mark & self.marks.condemned.mask
        over = seen.state in OVER and not held_on(seen, self.marks.closing.mask)
        if over and not seen.mark & self.marks.rst_sent.mask and not self.disturbed:
            # The kernel reports the mark before the state, and a RST may pass in between: only the
            # second such reading is proof.
            if self.closed_before or not seen.mark & self.marks.condemned.mask:
                return self.result(Outcome.OVER, now)
            self.closed_before = True
        if now >= self.deadline:
            return self.result(Outcome.SILENT, now)
        return None

    def absent(self, now: int) -> Result:
        """Return the end of a case whose connection has left the table."""
        if self.closed_before or not (self.condemned or self.disturbed):
            return self.result(Outcome.OVER, now)
        return self.result(Outcome.LOST, now)

    def due(self, now: int) -> bool:
        """Tell whether the next probe is due."""
        return self.probes < len(PROBE_AT) and now >= self.condemned_at + PROBE_AT[self.probes]

    def result(self, outcome: Outcome, now: int, detail: str = "") -> Result:
        """Return the end of the case."""
        silent = None
        if outcome is Outcome.SILENT:
            unsent = self.wanted & ~self.rst_sent
            silent = next(e for e, bits in self.marks.rst_sent_for.items() if bits == unsent)
        text = f"{self.target.flow.original}: {detail or self._sentence(outcome, silent)}."
        return Result(self.target, outcome, silent, now, now - self.since, text)

    def _sentence(self, outcome: Outcome, silent: Ends | None) -> str:
        if outcome is Outcome.RESET:
            return _WERE_RESET[self.target.ends]
        if silent is None:
            return str(outcome.value)
        other = {Ends.SOURCE: "the server was reset", Ends.DESTINATION: "the client was reset"}
        rest = f"; {other[silent]}" if self.rst_sent else ""
        return f"{_STAYED_SILENT[silent]} to {self.probes} probes{rest}"


_WERE_RESET: Final[dict[Ends, str]] = {
    Ends.BOTH: "client and server were reset",
    Ends.SOURCE: "the client was reset",
    Ends.DESTINATION: "the server was reset",
}
_STAYED_SILENT: Final[dict[Ends, str]] = {
    Ends.BOTH: "client and server stayed silent",
    Ends.SOURCE: "the client stayed silent",
    Ends.DESTINATION: "the server stayed silent",
}


def opening_of(path: Tuple, flow: Flow, draw: Callable[[], int]) -> bytes:
    """Return what makes an end speak that hears no probe, on one of the `probe_paths`.

    It is behind a firewall that drops what does not fit.
    """
    to_client = path == flow.original.turned
    return opening(path, draw(), draw() if to_client else None)


def probe_paths(flow: Flow, ends: int, marks: Marks) -> list[Tuple]:
    """Return, for each end that a RST_SENT bit names, who a probe must seem to be from, and to.

    With NAT each end knows the connection by another tuple; conntrack gives both.
    """
    paths = []
    if ends & marks.rst_sent_source.mask:
        paths.append(flow.original.turned)
    if ends & marks.rst_sent_destination.mask:
        paths.append(flow.reply.turned)
    return paths
