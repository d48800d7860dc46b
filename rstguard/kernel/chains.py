"""What the kernel is told: a compiled policy becomes the text of iptables-restore.  Pure.

Rules are written as iptables-save prints them, so that a table that is already as it should be can
be told from one that is not, and left alone.

Own chains only, each reached by one jump from a built-in chain.  The way of a packet:

- raw PREROUTING drops what the tracker would believe and the server would not hear, or has not
  sent (`rstguard.kernel.ingress`), and the SYNs, and all that is not TCP, of banned sources, and
  the SYNs of gated and shunned ones, before the connection tracker pays for them; of shunned ones
  those that are answered with SYN cookies are kept from it (`rstguard.kernel.challenge`).  raw
  OUTPUT keeps our own probes away from the tracker.
- mangle PREROUTING tells what a packet is and diverts it into the queue if a rule of the policy
  needs to see it.  Connections that need nothing more leave the chain at its second rule.  It
  comes last in the built-in chain: after the queue a packet goes on at the next hook, and the
  rules of other software must not be skipped.
- Right behind it the table of `rstguard.kernel.clearing` moves a worker's verdict from the packet's
  mark to its connection, before the packet is routed.  Where the kernel has no such table mangle
  FORWARD and INPUT do so, only too late for `ip rule`.
- filter INPUT, FORWARD and OUTPUT answer every segment of a condemned connection with a RST
  that carries the sender's own ACK number, the only one RFC 5961 (3.2) always accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from rstguard.engine.ruleset import RuleSet
from rstguard.kernel import ingress, proof
from rstguard.kernel.counting import up_to
from rstguard.kernel.diversion import Diversion
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Bits, Marks
from rstguard.kernel.matching import SYN_ONLY, Matching
from rstguard.kernel.names import PREFIX
from rstguard.kernel.tracker import USUAL, Tracker

REFUSALS: Final = 100
"""RSTs or ICMP errors a second to one address that is blocked."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All chains of one address family: table -> chain -> rules, and the jumps to them."""

    chains: dict[str, dict[str, tuple[str, ...]]]
    jumps: tuple[Jump, ...] = field(default=())


def plan(ruleset: RuleSet, family: int, queues: range, tracker: Tracker = USUAL) -> Plan:
    """Return the chains for a policy in one address family (4 or 6).

    `queues` are the NFQUEUE numbers of the workers, one each; their count is a power of two.
    `tracker` says how the connection tracker is set.
    """
    matching = Matching(ruleset, family)
    entering = ingress.Ingress(ruleset, family)
    diversion = Diversion(ruleset, family, queues, tracker)
    diverting = diversion.chains()
    diverting[f"{PREFIX}-in"] = (
        foreign(matching.marks),
        *entering.served(),
        *diverting[f"{PREFIX}-in"],
    )
    chains = {
        "raw": {
            f"{PREFIX}-raw": (
                *entering.entrance(),
                *matching.on_interfaces(f"{PREFIX}-blocked", outbound=False),
            ),
            **entering.raw(),
            f"{PREFIX}-blocked": _blocked(matching),
            f"{PREFIX}-probe": ("-j CT --notrack",),
        },
        "mangle": {
            **diverting,
            **entering.mangle(),
            f"{PREFIX}-foreign": (f"-j MARK --set-xmark {matching.marks.none}",),
            f"{PREFIX}-save": _save(matching.marks),
        },
        "filter": {f"{PREFIX}-condemned": condemned(matching.marks, proof.not_condemned(matching))},
    }
    if ruleset.blocking != "drop":
        refuse = matching.on_interfaces(f"{PREFIX}-refused", outbound=False, tcp=True)
        chains["filter"][f"{PREFIX}-refuse"] = refuse
        chains["filter"][f"{PREFIX}-refused"] = _refused(matching)
        chains["filter"][f"{PREFIX}-refusal"] = _refusal(matching)
    return Plan(chains, (*entering.jumps(), *_jumps(ruleset)))


def _jumps(ruleset: RuleSet) -> tuple[Jump, ...]:
    marks = Marks(ruleset.marks)
    probe = f"-m mark --mark {marks.probe}"
    saved = f"-m mark ! --mark {marks.none} -m connmark ! --mark {marks.unguarded}"
    dead = f"-p tcp -m connmark ! --mark {marks.uncondemned}"
    jumps = [
        Jump("raw", "PREROUTING", "", f"{PREFIX}-raw"),
        Jump("raw", "OUTPUT", probe, f"{PREFIX}-probe"),
        Jump("mangle", "PREROUTING", "", f"{PREFIX}-in", last=True),
        Jump("mangle", "INPUT", saved, f"{PREFIX}-save"),
        Jump("mangle", "FORWARD", saved, f"{PREFIX}-save"),
        Jump("mangle", "POSTROUTING", "", f"{PREFIX}-out", last=True),
    ]
    jumps += [
        Jump("filter", hook, dead, f"{PREFIX}-condemned") for hook in ("INPUT", "FORWARD", "OUTPUT")
    ]
    if ruleset.blocking != "drop":
        jumps += [
            Jump("filter", hook, f"-p tcp -m tcp --tcp-flags {SYN_ONLY}", f"{PREFIX}-refuse")
            for hook in ("INPUT", "FORWARD")
        ]
    return tuple(jumps)


def foreign(marks: Marks) -> str:
    """Return the rule by which bits that others have set go to the chain that takes them off."""
    set_by_others = f"-m mark ! --mark {marks.none} -m connmark ! --mark {marks.unguarded}"
    return f"-p tcp {set_by_others} -j {PREFIX}-foreign"


def _save(marks: Marks) -> tuple[str, ...]:
    """Bits are added to the connection, never taken: a late verdict must not undo a later one."""
    proven = f"-m connmark --mark {marks.established}"
    trust = Bits(marks.trust.value, marks.mask)
    return (
        f"-m mark --mark {trust} {proven} -j CONNMARK --set-xmark {marks.trusted}",
        *(
            f"-m mark --mark {Bits(bits.value, marks.mask)} -j CONNMARK --set-xmark {bits}"
            for bits in (marks.condemned_source, marks.condemned_destination, marks.condemned)
        ),
        f"-j MARK --set-xmark {marks.none}",
    )


def unsaved(plan: Plan) -> Plan:
    """Return a plan without what moves verdicts where the kernel has no table that does.

    There, behind the routing decision, others may have marked the packet again.
    """
    save = f"{PREFIX}-save"
    mangle = {name: rules for name, rules in plan.chains["mangle"].items() if name != save}
    jumps = tuple(jump for jump in plan.jumps if jump.chain != save)
    return Plan({**plan.chains, "mangle": mangle}, jumps)


def condemned(marks: Marks, disbelieved: str = "") -> tuple[str, ...]:
    """Return the rules for segments of condemned connections.

    The bit that says that an end was sent its RST is set just before: it is the proof that the end
    was reset.  What another program has written into a connection's mark condemns nobody: if
    `disbelieved` matches, the connection goes on.

    A RST to an end that was not sent one yet is no answer of ours: the other end has sent it, and
    so is dead as well.  One that was just reset says so to whatever was on its way to it.  But a
    server that is looked after behind its client's RST (`rstguard.sweeper.doubts`) would say so to
    an address in whose name anybody may have sent that.
    """
    ends = (
        ("ORIGINAL", "REPLY", marks.condemned_source, marks.rst_sent_source),
        ("REPLY", "ORIGINAL", marks.condemned_destination, marks.rst_sent_destination),
    )
    rst = "-p tcp -m tcp --tcp-flags RST RST"
    rules = [
        f"{rst} -m conntrack --ctdir {towards} -m connmark --mark"
        f" {Bits(condemned.value, condemned.mask | sent.mask)}"
        f" -j CONNMARK --set-xmark {marks.rst_sent}"
        for _, towards, condemned, sent in ends
    ]
    ended = Bits(
        marks.condemned_destination.value | marks.closing.value,
        marks.condemned.mask | marks.closing.mask,
    )
    rules.append(f"{rst} -m conntrack --ctdir REPLY -m connmark --mark {ended} -j DROP")
    rules.append(f"{rst} -j RETURN")
    for direction, _, condemned, sent in ends:
        match = f"-p tcp -m conntrack --ctdir {direction} -m connmark --mark {condemned}"
        rules.append(f"{match} -j CONNMARK --set-xmark {sent}")
        rules.append(f"{match} -j REJECT --reject-with tcp-reset")
    return (*([f"{disbelieved} -j RETURN"] if disbelieved else []), *rules, "-j DROP")


def _blocked(matching: Matching) -> tuple[str, ...]:
    """Other segments of a banned source go on: its connections are to hear their RST."""
    if matching.ruleset.blocking != "drop":
        return (
            "-p tcp -j RETURN",
            *matching.covered(),
            f"{matching.hit('ban')} -j DROP",
        )
    return (
        f"-p tcp -m tcp ! --tcp-flags {SYN_ONLY} -j RETURN",
        *matching.covered(),
        f"{matching.hit('ban')} -j DROP",
        *(f"-p tcp {matching.hit(name)} -j DROP" for name in ("gate", "shun")),
    )


def _refused(matching: Matching) -> tuple[str, ...]:
    """Whose SYN gets more than silence if the policy says so: who is blocked."""
    blocked = ("ban", "gate", "shun")
    # By now the target may have been translated; its SYN was guarded if it was protected.
    guarded = f"-m connmark ! --mark {matching.marks.unguarded} "
    covered = "" if matching.ruleset.covers_all else guarded
    return tuple(f"-p tcp {covered}{matching.hit(name)} -j {PREFIX}-refusal" for name in blocked)


def _refusal(matching: Matching) -> tuple[str, ...]:
    """What it gets; a SYN can bear anybody's address, who is not to be flooded with answers."""
    unreachable = "icmp-admin-prohibited" if matching.family == 4 else "icmp6-adm-prohibited"
    kind = "tcp-reset" if matching.ruleset.blocking == "reset" else unreachable
    rate = up_to(matching.family, "refusal", (REFUSALS, REFUSALS))
    return f"-p tcp {rate} -j REJECT --reject-with {kind}", "-j DROP"
