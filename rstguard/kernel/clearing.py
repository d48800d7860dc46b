"""Takes the guard's bits off packets before they are routed, verdicts to their connections.

A verdict comes back from the queue as bits of the packet's mark, and after NFQUEUE a packet goes on
at the next hook function: no rule of the mangle table sees it again before its route is chosen, by
`ip rule fwmark` too, which often is written without a mask.  So there is a hook function of our own
right behind the mangle table, in PREROUTING and OUTPUT: a table of nf_tables, whatever iptables is
made of.  It also clears what was to be read by a worker where none reads, and bits that another
program copied from a connection onto its packets.  In OUTPUT its chain is of the type that has a
packet whose mark it changes routed anew: so SYNPROXY's SYNs and our own probes go where they would
without a mark.

Other programs mark packets with the same bits.  A verdict is believed only where the queue is: on
TCP that came in on a protected interface, of a guarded connection, from which the mangle table has
taken what others had set (`rstguard.kernel.chains`), and only if it is exactly one.  What belongs
to no connection of the guard keeps its mark.  A connection that a verdict condemns is given a label
besides: others may write these bits into the mark of a connection, but not that.

NF_REPEAT, by which packets would meet the mangle table a second time, could do without this, but
other programs' rules would count them twice, a `CONNMARK --set-mark` of theirs take the bits of the
connection, and a `CONNMARK --restore-mark` without a mask the verdict: so that the packet is queued
for ever.

Where the kernel has no nf_tables the mangle table's FORWARD and INPUT do the same, behind the
routing decision (`rstguard.kernel.chains`): then an `ip rule` must have a mask, and the check
"routing by marks" of `rstguard doctor` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rstguard.engine.ruleset import RuleSet
from rstguard.kernel import nftables, tables
from rstguard.kernel.marks import Bits, Labels, Marks
from rstguard.kernel.matching import interface_names
from rstguard.kernel.names import PREFIX
from rstguard.kernel.nftables import (
    ACCEPT,
    INVALID,
    MARK_OF_CONNECTION,
    MARK_OF_PACKET,
    NEW,
    STATE_OF_CONNECTION,
    Chain,
    Rule,
    came_in_on,
    give_label,
    has_any,
    is_exactly,
    is_syn,
    is_tcp,
    put,
)
from rstguard.kernel.seam import Kernel

PRIORITY: Final = -149
"""Right behind the mangle table (NF_IP_PRI_MANGLE, -150), before nat and what others put there."""

_PRE_ROUTING, _LOCAL_OUT = 0, 3  # linux/netfilter.h, enum nf_inet_hooks


@dataclass(frozen=True, slots=True)
class Place:
    """Where the guard's bits are, which labels it gives, and on which interfaces it has queues.

    Without `labels` none are given: for a trial of the rest.
    """

    marks: Marks
    interfaces: tuple[str, ...] = ()
    labels: Labels | None = None

    @classmethod
    def of(cls, ruleset: RuleSet) -> Place:
        """Return what a policy says."""
        labels = Labels(ruleset.labels)
        return cls(Marks(ruleset.marks), tuple(interface_names(ruleset)), labels)


def chains(place: Place) -> tuple[Chain, ...]:
    """Return the chains.  Pure."""
    marks = place.marks
    of_others = Rule(
        f"none of the bits 0x{marks.mask:08x}", is_exactly(MARK_OF_PACKET, marks.none) + ACCEPT
    )
    cleared = put(MARK_OF_PACKET, marks.none)
    probe = Rule("rstguard's own packet", is_exactly(MARK_OF_PACKET, marks.probe) + cleared)
    ours = Rule("of the guard's connections", has_any(MARK_OF_CONNECTION, marks.mask) + cleared)
    inward = [rule for name in place.interfaces for rule in _inward(place, name)]
    begun = _begun(place)
    return (
        Chain("prerouting", _PRE_ROUTING, PRIORITY, "filter", (*begun, of_others, *inward, ours)),
        Chain(
            "output", _LOCAL_OUT, PRIORITY, "route",
            (*begun, of_others, probe, *_verdicts(place, "SYN", is_tcp() + is_syn()), ours),
        ),
    )  # fmt: skip


def _begun(place: Place) -> tuple[Rule, ...]:
    if place.labels is None:
        return ()
    new = is_tcp() + has_any(STATE_OF_CONNECTION, NEW) + give_label(place.labels.begun)
    return (Rule("begins while the guard is there", new),)


def _inward(place: Place, name: str) -> tuple[Rule, ...]:
    """What came in on a protected interface: from nowhere else a packet comes with a verdict."""
    marks = place.marks
    came = came_in_on(name) + is_tcp()
    stray = Bits(marks.to_queue_stray.value, marks.mask ^ marks.to_queue_proven.mask)
    unread = came + has_any(STATE_OF_CONNECTION, INVALID | NEW) + is_exactly(MARK_OF_PACKET, stray)
    return (
        Rule(
            f"{name}: a segment of no connection that nobody has read",
            unread + is_syn(False) + put(MARK_OF_PACKET, marks.none),
        ),
        *_verdicts(place, name, came),
    )


def _verdicts(place: Place, where: str, came: bytes) -> tuple[Rule, ...]:
    """Move verdicts to their connections; nothing is taken back."""
    marks, labels = place.marks, place.labels
    label = give_label(labels.condemned) if labels else b""
    of_proven, of_guarded = marks.established.mask, marks.unguarded.mask
    trusted = _verdict(came, of_proven, Bits(marks.trust.value, marks.mask))
    ends = marks.condemned_source, marks.condemned_destination, marks.condemned
    condemned = (
        Rule(
            f"{where}: a verdict: condemned, 0x{bits.value:x}",
            _verdict(came, of_guarded, Bits(bits.value, marks.mask))
            + label
            + put(MARK_OF_CONNECTION, bits),
        )
        for bits in ends
    )
    return (
        Rule(f"{where}: a verdict: trusted", trusted + put(MARK_OF_CONNECTION, marks.trusted)),
        *condemned,
    )


def _verdict(came: bytes, of_connections: int, bits: Bits) -> bytes:
    """Match exactly one verdict, on a packet of a connection that has one of some bits."""
    return came + has_any(MARK_OF_CONNECTION, of_connections) + is_exactly(MARK_OF_PACKET, bits)


def apply(kernel: Kernel, place: Place) -> None:
    """Put the table in place; one that is as it should be is left alone.

    Raises:
        KernelError: the kernel has no nf_tables, or refused.
    """
    tables.keep(kernel, PREFIX, chains(place))


def missing(kernel: Kernel, place: Place) -> list[str]:
    """Return what of the table is not in the kernel, in words; empty if all is well.

    Raises:
        KernelError: the kernel has no nf_tables, or could not be asked.
    """
    return tables.missing(kernel, PREFIX, chains(place))


def remove(kernel: Kernel) -> bool:
    """Take the table away; tell whether it was there.

    Raises:
        KernelError: the kernel refused.
    """
    return kernel.remove_table(PREFIX)


def trial() -> None:
    """Have the kernel check the table without making it.

    Raises:
        KernelError: the kernel has no nf_tables, or lacks a part of it.
    """
    nftables.replace(PREFIX, chains(Place(Marks(), ("lo",))), commit=False)
