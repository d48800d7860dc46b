"""What is dropped before the tracker: it would be believed there, and nowhere else.  Pure.

What the tracker takes and the server does not hear makes the gateway forget a connection that its
server goes on holding.  Two kinds of segments are known for it by sight, so they never get there:

- *With few hops left.*  A RST of TTL 1 dies behind the gateway.  It is dropped, not given more
  hops: on a routing loop a packet must come to an end.
- *In the name of an inside address.*  A RST+ACK of the server, with any number, ends what a SYN in
  the client's name began (nf_conntrack_proto_tcp.c), and nobody behind the gateway has sent it.

An address is inside once a client was answered from it: its SYN-ACK came in on an interface that is
not protected, or left this host itself, or the address was translated here.  Nobody outside can
bring this about, where all answers go another way it does not happen (one-armed gateways, direct
server return), and no list of networks must be right.  And the route back to it must lead elsewhere
than where the segment came from (the rpfilter match), or it has moved: then it is no spoof.

The sets rstguard-inside4 and -inside6 hold these addresses, rstguard-translated4 and -translated6
the services that seem to be this host's own, and are not.  Those called rstguard-doubt4 and -doubt6
hold the connections for which a RST or FIN has just come in, rstguard-replaced4 and -replaced6
those of them whose place a SYN has just taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rstguard.kernel import forgotten, oneway, proof
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Bits, Labels
from rstguard.kernel.matching import SYN_ACK, Matching, interface_names, negated
from rstguard.kernel.names import PREFIX, set_name

INSIDE_SECONDS: Final = 432_000
"""How long after its last answer an address is inside: as long as a silent connection is tracked
(nf_conntrack_tcp_timeout_established)."""
MOST_INSIDE: Final = 65_536
DOUBT_SECONDS: Final = 10
"""How long it is known that a RST or FIN came: as long as a closed entry stays in the table
(nf_conntrack_tcp_timeout_close)."""
REPLACED_SECONDS: Final = 3
"""How long it is known that a SYN took the place of one of them: until the sweeper has asked."""
_LOCAL: Final = "-m addrtype --dst-type LOCAL"


def inside_set(family: int) -> str:
    """Return the name of the set of addresses that answer from inside."""
    return set_name("inside", family)


def translated_set(family: int) -> str:
    """Return the name of the set of services whose target this host translates."""
    return set_name("translated", family)


def doubt_set(family: int) -> str:
    """Return the name of the set of connections for which a RST or FIN has just come in."""
    return set_name("doubt", family)


def replaced_set(family: int) -> str:
    """Return the name of the set of those whose place a SYN has just taken."""
    return set_name("replaced", family)


def translated(matching: Matching, first: str) -> list[str]:
    """Return the rules for the first ACK of a connection, which `first` matches.

    The client of a translated service knows the address that it was translated from.
    """
    if not matching.ruleset.enforce:
        return []
    match = f"{first} -m conntrack --ctstate DNAT -j SET"
    return [
        f"{match} --add-set {inside_set(matching.family)} dst --exist",
        f"{match} --add-set {translated_set(matching.family)} dst,dst --exist",
    ]


def replacing(matching: Matching) -> list[str]:
    """Return the rules for a SYN that takes the place of a connection that was in doubt.

    The tracker forgets what it takes for over as soon as a SYN of the same ends comes
    (tcp_packet in nf_conntrack_proto_tcp.c), before anybody could look at it: so the new entry is
    looked at (`rstguard.sweeper.doubts`).  To find it the whole table is walked through, so that a
    set tells whether there is any.
    """
    if not matching.ruleset.enforce:
        return []
    marks = matching.marks
    new = f"-m conntrack --ctstate NEW -m connmark --mark {marks.guarded}"
    doubted = f"-m set --match-set {doubt_set(matching.family)} src,src,dst"
    added = f"-j SET --add-set {replaced_set(matching.family)} src,src,dst --exist"
    closing = f"-m conntrack --ctstate NEW -m connmark --mark {marks.replacing}"
    return [f"{new} {doubted} -j CONNMARK --set-xmark {marks.closing}", f"{closing} {added}"]


@dataclass(frozen=True, slots=True)
class Ingress(Matching):
    """The rules for one policy and address family; a policy that observes drops nothing."""

    def entrance(self) -> tuple[str, ...]:
        """Return the rules of raw PREROUTING: nearly every packet is past after both matches."""
        if not self.ruleset.enforce:
            return ()
        few = f"-m ttl --ttl-lt {self.ruleset.least_ttl}"
        if self.family == 6:
            few = f"-m hl --hl-lt {self.ruleset.least_ttl}"
        spoofed = f"-m set --match-set {inside_set(self.family)} src -m rpfilter --invert"
        rules = []
        for name in interface_names(self.ruleset):
            if self.ruleset.least_ttl:
                rules.append(f"-i {name} -p tcp {few} -j {PREFIX}-low-ttl")
            rules.append(f"-i {name} -p tcp {spoofed} -j {PREFIX}-spoofed")
        return tuple(rules)

    def raw(self) -> dict[str, tuple[str, ...]]:
        """Return what becomes of those segments, by chain; the last rule of each counts them."""
        if not self.ruleset.enforce:
            return {}
        here = f"{_LOCAL} {negated(self.in_set('translated', 'dst,dst'))} -j RETURN"
        chains: dict[str, tuple[str, ...]] = {
            f"{PREFIX}-spoofed": ("-j DROP" if self.ruleset.drops_spoofed else "-j RETURN",)
        }
        if self.ruleset.least_ttl:
            rules = (*self.unless_trusted(), *self.in_scope(), here, "-j DROP")
            chains[f"{PREFIX}-low-ttl"] = rules
        return chains

    def mangle(self) -> dict[str, tuple[str, ...]]:
        """Return what is learned from servers: who serves, and is inside; they close, too."""
        outside = tuple(f"-i {name} -j RETURN" for name in interface_names(self.ruleset))
        serves = forgotten.serving(self.family)
        always = {
            f"{PREFIX}-anew": (*outside, *self.anew()),
            f"{PREFIX}-heard": (*oneway.answered(self), f"-j {PREFIX}-inside"),
            f"{PREFIX}-served": self.served(),
        }
        if not self.ruleset.enforce:
            return {**always, f"{PREFIX}-inside": (*outside, serves)}
        learn = f"-j SET --add-set {inside_set(self.family)} src --exist"
        closed = f"-j CONNMARK --set-xmark {Bits(0, self.marks.closing.mask)}"
        doubt = (
            f"-j CONNMARK --set-xmark {self.marks.closing}",
            f"-j SET --add-set {doubt_set(self.family)} src,src,dst --exist",
        )
        return {
            **always,
            f"{PREFIX}-inside": (*outside, serves, learn),
            f"{PREFIX}-closed": (closed,),
            f"{PREFIX}-doubt": doubt,
        }

    def anew(self) -> tuple[str, ...]:
        """A server answers a SYN on a connection that had been established: it is another one.

        The tracker makes no new entry for a SYN if the last that the old one saw came from the
        server, as a RST does (tcp_packet in nf_conntrack_proto_tcp.c): mark, labels, counters and
        age stay.  A client's SYN alone proves nothing, as anybody can forge it.
        """
        labels = Labels(self.ruleset.labels)
        return (
            proof.label(labels.reused, add=True),
            proof.label(labels.anew, add=True),
            f"-j CONNMARK --set-xmark {self.marks.guarded}",
        )

    def served(self) -> tuple[str, ...]:
        """Return the rules for what servers send, whichever way it comes: it leads to no queue."""
        # Not the one that SYNPROXY opens: it is proven from its SYN on, and not ASSURED before the
        # server has been acknowledged.
        begun = f"{SYN_ACK} -m conntrack --ctstatus ASSURED --ctdir REPLY"
        always = (
            *proof.agreed(self),
            f"{begun} -m connmark --mark {self.marks.established} -j {PREFIX}-anew",
            oneway.answer(self),
            oneway.refused(self),
        )
        if not self.ruleset.enforce:
            return always
        fin = "-p tcp -m tcp --tcp-flags FIN,RST FIN -m conntrack --ctstate ESTABLISHED"
        bits = self.marks.closing.value | self.marks.established.value
        closing = f"--ctdir REPLY -m connmark --mark {Bits(bits, bits)}"
        return (*always, f"{fin} {closing} -j {PREFIX}-closed")

    def jumps(self) -> tuple[Jump, ...]:
        """Return the jump to the same rules for what this host sends itself."""
        return (Jump("mangle", "OUTPUT", "-p tcp", f"{PREFIX}-served"),)
