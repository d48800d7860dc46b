"""Connections that the tracker has forgotten, and segments of none.  Pure.

An uplink that flaps, `conntrack -F`, a failover: the tracker loses entries whose ends go on.  With
tcp_loose=1, as Linux has it by default, it takes such a connection up again at the next ACK, as a
new entry without marks; with 0 its segments are INVALID for good.  Either way the segment is no
proof of anything, and nobody's fault.

- *The valve.*  Each segment of no connection that passes makes an entry, which lives for 300 s if
  nobody answers (nf_conntrack_tcp_timeout_unacknowledged), so a flood of them could fill the table.
  All together they stay below a quarter of it.  Half of that is for sources that were proven
  lately, a few a second of each, lest a connection that goes on be starved by somebody's flood.
- *The benefit of the doubt.*  What a source sends within `GRACE_SECONDS` of its first segment of no
  connection is not counted, nor is anything of it while a server has answered one lately
  (rstguard-answered): only what goes on unanswered is.
- *Adoption.*  When the server speaks on an entry without marks, and is known as a server
  (rstguard-serving), the connection is guarded and trusted from then on, with the label ADOPTED.

A server is known by its address and port, once it has answered a SYN of a guarded connection.  So a
connection that was made from inside is never taken for one of a client, whichever end speaks first
after it was forgotten.  An entry that a server's segment made has its ends reversed: no packet of
its client is of the original direction, so no rule of ours ever looks at it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rstguard.engine.ruleset import Divert, Measure
from rstguard.kernel import oneway
from rstguard.kernel.counting import printed_alike, up_to
from rstguard.kernel.marks import Labels
from rstguard.kernel.matching import Matching
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.proof import label
from rstguard.kernel.tracker import Tracker

UNANSWERED_SECONDS: Final = 300
"""How long an entry without an answer lives."""
GRACE_SECONDS: Final = 2
"""How long a server may take to answer what was forgotten, before it is counted."""
LOST_SECONDS: Final = 60
"""How long a source must send no such segment to have that time anew."""
ANSWERED_SECONDS: Final = 60
"""How long after the last answer nothing of its source is counted."""
SERVING_SECONDS: Final = 432_000
"""How long after its last answer to a SYN a service is known: see `ingress.INSIDE_SECONDS`."""
MOST_SERVING: Final = 65_536
_FEW: Final = (5, 20)
"""Segments a second, and at once, of one proven source that pass beside what others must pass."""
_PART: Final = 4
"""The valve leaves this part of the table to them, shared out by two families and two ways."""

_FITS_NOTHING: Final = "-m conntrack --ctstate NEW -m conntrack ! --ctstatus CONFIRMED"
_SPEAKS: Final = "-p tcp -m tcp --tcp-flags SYN,RST,ACK ACK"


def few(family: int, of: str) -> str:
    """Match up to a few segments a second of each source; `of` names the count."""
    return up_to(family, of, _FEW)


def most_a_second(tracker: Tracker) -> int:
    """Return how many entries a second each of the four ways may make."""
    return printed_alike(max(1, tracker.most // (_PART * UNANSWERED_SECONDS * 4)))


def serving_set(family: int) -> str:
    """Return the name of the set of services that have answered a client."""
    return set_name("serving", family)


def serving(family: int) -> str:
    """Return the rule that notes a service; it is for a guarded connection's SYN-ACK."""
    return f"-j SET --add-set {serving_set(family)} src,src --exist"


@dataclass(frozen=True, slots=True)
class Forgotten(Matching):
    """The rules for one policy and address family."""

    tracker: Tracker

    @property
    def counts(self) -> bool:
        """Whether some rule counts segments of no connection."""
        return Divert.STRAY in self.ruleset.diverts

    def strays(self) -> tuple[str, ...]:
        """Return the rules of rstguard-invalid: what fits no connection, of protected targets."""
        rules = []
        if self.ruleset.enforce:
            rules.append(f"{_FITS_NOTHING} -g {PREFIX}-valve")
        if self.ruleset.kept_by_kernel(Measure.OUT_OF_STATE):
            return (*rules, f"-g {PREFIX}-unfit")
        # What is of a service that answers by another way makes entries as well, and is no stray.
        rules += [f"-j {PREFIX}-lost"] if self.counts else oneway.strays(self)
        return tuple(rules)

    def chains(self) -> dict[str, tuple[str, ...]]:
        """Return the chains by name."""
        found = {f"{PREFIX}-adopt": self.adopt(), f"{PREFIX}-spoke": self.spoke()}
        found[f"{PREFIX}-adopted"] = (
            f"-j CONNMARK --set-xmark {self.marks.trusted}",
            label(Labels(self.ruleset.labels).adopted, add=True),
        )
        if self.counts:
            found[f"{PREFIX}-lost"] = self.lost()
        if self.ruleset.enforce:
            found[f"{PREFIX}-valve"] = self.valve()
        return found

    def valve(self) -> tuple[str, ...]:
        """What would make an entry; the last rule counts what may not."""
        rate = most_a_second(self.tracker)
        known, others = (
            f"-m hashlimit --hashlimit-upto {rate}/sec --hashlimit-burst {rate}"
            f" --hashlimit-name {PREFIX}{self.family}-{of}-{rate}"
            for of in ("known", "others")
        )
        beside = f"{self.in_set('proven')} {few(self.family, 'few')} {known}"
        passes = f"{others} -g {PREFIX}-lost" if self.counts else f"{others} -j RETURN"
        return (f"{beside} -j RETURN", passes, "-j DROP")

    def lost(self) -> tuple[str, ...]:
        """What is counted: of a source that goes on though nobody answers it."""
        lost, grace, answered = (
            f"--{{}} {set_name(name, self.family)} src" for name in ("lost", "grace", "answered")
        )
        return (
            *oneway.strays(self),
            f"-m set {answered.format('match-set')} -j RETURN",
            f"-m set ! {lost.format('match-set')} -j SET {grace.format('add-set')} --exist",
            f"-j SET {lost.format('add-set')} --exist",
            f"-m set {grace.format('match-set')} -j RETURN",
            f"-g {PREFIX}-limit-strays",
        )

    def adopt(self) -> tuple[str, ...]:
        """What goes out on protected interfaces: nearly all of it leaves at once."""
        return (
            f"-m connmark ! --mark {self.marks.unguarded} -j RETURN",
            "-m conntrack --ctdir ORIGINAL -j RETURN",
            f"{_SPEAKS} -m set --match-set {serving_set(self.family)} src,src -j {PREFIX}-spoke",
        )

    def spoke(self) -> tuple[str, ...]:
        """A server that speaks to a client of which the guard knows nothing."""
        rules = [f"{self.in_set('trusted', 'dst')} -j RETURN"] if self.trusts else []
        if self.counts:
            rules.append(f"-j SET --add-set {set_name('answered', self.family)} dst --exist")
        known = "-m conntrack --ctstate ESTABLISHED --ctdir REPLY"
        return (*rules, f"{known} -j {PREFIX}-adopted")
