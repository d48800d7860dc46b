"""RSTs that wait until their sender was asked: the rules, for both queues of the asker.  Pure.

Behind the tracker, as only it can tell a RST that would end a guarded connection from one that is
ignored anyway: with a flood of RSTs of any numbers hardly one comes to a queue.  It has closed the
entry by then, which the asker repairs (`rstguard.kernel.conntrack.Conntrack.reopen`).

- In the queue *held* a RST waits for its verdict.  Its connection is marked HELD before that, and
  before any limit, so that the asker finds those again whose RST got lost.
- A SYN of a connection of which a RST was held has the tracker forget it, if it was closed by that.
  So such SYNs wait in front of the tracker, in the same queue, for the same decision.
- In the queue *answers* short segments of HELD connections come to the asker, and RSTs that fit
  nothing but bear the name of such a connection: with a RST a dead end answers a probe.  Bulk data
  is not diverted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import proof
from rstguard.kernel.chains import Plan
from rstguard.kernel.counting import table_size
from rstguard.kernel.jumps import Jump
from rstguard.kernel.matching import UNTRACKED, Matching
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.services import SYN

_INVALID: Final = "-m conntrack --ctstate INVALID"
_RST: Final = "-p tcp -m tcp --tcp-flags SYN,RST RST"
_FIN: Final = "-p tcp -m tcp --tcp-flags FIN,SYN,RST FIN"
NAMED_SECONDS: Final = 3
"""How long RSTs in the name of a connection are looked at after one of its was held."""
_SHORT: Final = {4: 120, 6: 140}
"""Bytes of an IP packet that can only be a segment with some options and hardly any data."""
_OF_CONNECTION: Final = (50, 32)
"""RSTs a second that wait of one connection and direction, and at once; the rest are dropped.

An honest one comes with three answers, which the tracker takes for RSTs like any."""
_OF_NETWORK: Final = (1000, 200)
"""Likewise of the connections of all clients in a /24 or /48."""
_ANSWERS: Final = (50, 16)
"""RSTs a second that fit nothing, in the name of one held connection."""


@dataclass(frozen=True, slots=True)
class Queues:
    """The numbers of the two queues."""

    held: int
    answers: int


def in_force(ruleset: RuleSet) -> bool:
    """Tell whether RSTs are asked for."""
    return ruleset.forged_resets != "off" and ruleset.enforce


def queues_of(workers: range) -> Queues:
    """Return the asker's queues: those right behind the workers'."""
    return Queues(workers.stop, workers.stop + 1)


def named_set(family: int) -> str:
    """Return the set of connections whose answers are awaited, in both directions."""
    return set_name("named", family)


def with_holding(plan: Plan, ruleset: RuleSet, family: int, queues: Queues) -> Plan:
    """Return a policy's plan with what holds RSTs back, if it wants that."""
    if not in_force(ruleset):
        return plan
    build = _Build(ruleset, family, queues)
    chains = {table: dict(of_table) for table, of_table in plan.chains.items()}
    mangle = chains["mangle"]
    asked = f"-p tcp -m connmark --mark {build.marks.held} -j {PREFIX}-asked"
    held = (_RST, _FIN) if ruleset.forged_fins else (_RST,)
    first, *rest = mangle[f"{PREFIX}-in"]
    mangle |= {
        f"{PREFIX}-in": (
            first,
            *(f"{segment} -j {PREFIX}-hold" for segment in held),
            asked,
            *rest,
        ),
        f"{PREFIX}-hold": build.hold(),
        f"{PREFIX}-outside": build.outside(),
        f"{PREFIX}-asked": build.asked(),
        f"{PREFIX}-local": (asked,),
    }
    chains["raw"][f"{PREFIX}-behind"] = build.behind()
    # Last: a packet that comes back from a queue goes on at the next hook.
    behind = f"{SYN} -m set --match-set {named_set(family)} src,src,dst"
    jumps = (
        Jump("raw", "PREROUTING", behind, f"{PREFIX}-behind", last=True),
        Jump("mangle", "OUTPUT", "", f"{PREFIX}-local", last=True),
    )
    return replace(plan, chains=chains, jumps=(*plan.jumps, *jumps))


@dataclass(frozen=True, slots=True)
class _Build(Matching):
    ours: Queues

    def hold(self) -> tuple[str, ...]:
        """RSTs that the tracker has taken, of guarded connections, whoever sent them."""
        marks = self.marks
        named = named_set(self.family)
        rules = [
            f"{_INVALID} -m set --match-set {named} src,src,dst -j {PREFIX}-asked",
            f"-m connmark ! --mark {marks.established} -j RETURN",
            f"-m connmark ! --mark {marks.uncondemned} -j RETURN",
            "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
            "-m conntrack ! --ctstatus ASSURED -j RETURN",
        ]
        if self.ruleset.reset_exempt:
            rules.append(f"{self.in_set('reset-exempt')} -j RETURN")
        rules += [
            f"-j CONNMARK --set-xmark {marks.held}",
            f"-j SET --add-set {named} src,src,dst --exist",
            f"-j SET --add-set {named} dst,dst,src --exist",
            *self.limits(),
            f"-j MARK --set-xmark {marks.none}",
            *self.on_interfaces(f"{PREFIX}-outside", outbound=False, tcp=True),
            f"-j NFQUEUE --queue-num {self.ours.held}{self.bypass}",
        ]
        return tuple(rules)

    def behind(self) -> tuple[str, ...]:
        """SYNs behind a RST; those that are answered with a cookie do not get to the tracker."""
        return (
            f"{UNTRACKED} -j RETURN",
            self.each_connection("syn", _OF_CONNECTION),
            f"-j NFQUEUE --queue-num {self.ours.held}{self.bypass}",
        )

    @property
    def bypass(self) -> str:
        return " --queue-bypass" if self.ruleset.fail_open else ""

    def limits(self) -> list[str]:
        """More are dropped, and their connections stay HELD: the asker asks for those as well."""
        size = table_size(NAMED_SECONDS)
        width = 24 if self.family == 4 else 48
        networks = (
            f"-m conntrack --ctdir {way} -m hashlimit --hashlimit-above {_OF_NETWORK[0]}/sec"
            f" --hashlimit-burst {_OF_NETWORK[1]} --hashlimit-mode {end}ip --hashlimit-{end}mask"
            f" {width} --hashlimit-name {PREFIX}{self.family}-rst-{end} {size} -j DROP"
            for way, end in (("ORIGINAL", "src"), ("REPLY", "dst"))
        )
        return [self.each_connection("rst", _OF_CONNECTION), *networks]

    def each_connection(self, name: str, most: tuple[int, int]) -> str:
        """Drop what is more than so many a second, and at once, of one connection's direction."""
        return (
            f"-m hashlimit --hashlimit-above {most[0]}/sec --hashlimit-burst {most[1]}"
            " --hashlimit-mode srcip,srcport,dstip,dstport"
            f" --hashlimit-name {PREFIX}{self.family}-{name} {table_size(NAMED_SECONDS)} -j DROP"
        )

    def outside(self) -> tuple[str, ...]:
        """What came in on a protected interface; and whether a worker is to see it, if it goes on.

        The asker then hands it over (`Queue.settle`).
        """
        marks = self.marks
        rules = [f"-j MARK --set-xmark {marks.to_queue_over}"]
        if Divert.CLOSE in self.ruleset.diverts:
            rules.append("-m conntrack --ctdir REPLY -j RETURN")
            if self.ruleset.ports_needing(Divert.CLOSE) is not None:
                match = f"-p tcp -m set ! --match-set {set_name('close-ports')} dst"
                rules.append(f"{match} -j RETURN")
            rules.append(f"-j MARK --set-xmark {marks.to_queue_also_known}")
            rules += proof.bits(self)
        return tuple(rules)

    def asked(self) -> tuple[str, ...]:
        """What may be an answer to a probe."""
        queue = f"-j NFQUEUE --queue-num {self.ours.answers} --queue-bypass"
        short = f"-m length --length 0:{_SHORT[self.family]}"
        ack = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK"
        too_many = self.each_connection("answers", _ANSWERS)
        fits = "-m conntrack ! --ctstate INVALID -j RETURN"
        return (f"{ack} {short} {queue}", fits, too_many, queue)
