"""Takes the guard's bits off packets before they are routed, verdicts to their connections.

A verdict comes back from the queue as bits of the packet's mark, and after NFQUEUE a packet goes on
at the next hook function: no rule of the mangle table sees it again before its route is chosen, by
`ip rule fwmark` too, which often is written without a mask.  So there is a hook function of our own
right behind the mangle table, in PREROUTING and OUTPUT: a table of nf_tables, whatever iptables is
made of.  It also clears what was to be read by a worker where none reads, and bits that another
program copied from a connection onto its packets.  In OUTPUT its chain is of the type that has a
packet whose mark it changes routed anew: so SYNPROXY's SYNs and our own probes go where they would
without a mark.

NF_REPEAT, by which packets would meet the mangle table a second time, could do without this, but
other programs' rules would count them twice, a `CONNMARK --set-mark` of theirs take the bits of the
connection, and a `CONNMARK --restore-mark` without a mask the verdict: so that the packet is queued
for ever.

Where the kernel has no nf_tables the mangle table's FORWARD and INPUT do the same, behind the
routing decision (`rstguard.kernel.chains`): then an `ip rule` must have a mask, and the check
"routing by marks" of `rstguard doctor` says so.
"""

from __future__ import annotations

from typing import Final

from rstguard.kernel import nftables
from rstguard.kernel.marks import Bits, Marks
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
    has_any,
    is_exactly,
    put,
)
from rstguard.kernel.seam import Kernel

PRIORITY: Final = -149
"""Right behind the mangle table (NF_IP_PRI_MANGLE, -150), before nat and what others put there."""

_PRE_ROUTING, _LOCAL_OUT = 0, 3  # linux/netfilter.h, enum nf_inet_hooks


def chains(marks: Marks) -> tuple[Chain, ...]:
    """Return the chains for these mark bits.  Pure.

    Bits that are not ours, on packets of connections that the guard has nothing to do with, stay.
    """
    of_others = Rule(
        f"none of the bits 0x{marks.mask:08x}", is_exactly(MARK_OF_PACKET, marks.none) + ACCEPT
    )
    cleared = put(MARK_OF_PACKET, marks.none)
    stray = Bits(marks.to_queue_stray.value, marks.mask ^ marks.to_queue_proven.mask)
    unread = Rule(
        "a segment of no connection that nobody has read",
        has_any(STATE_OF_CONNECTION, INVALID | NEW) + is_exactly(MARK_OF_PACKET, stray) + cleared,
    )
    probe = Rule("rstguard's own packet", is_exactly(MARK_OF_PACKET, marks.probe) + cleared)
    condemned = marks.condemned_source, marks.condemned_destination
    moved = (
        _verdict("trusted", marks.established.mask, marks.trust, marks.trusted),
        *(_verdict("condemned", marks.unguarded.mask, bit, bit) for bit in condemned),
        Rule("of the guard's connections", has_any(MARK_OF_CONNECTION, marks.mask) + cleared),
    )
    return (
        Chain("prerouting", _PRE_ROUTING, PRIORITY, "filter", (of_others, unread, *moved)),
        Chain("output", _LOCAL_OUT, PRIORITY, "route", (of_others, probe, *moved)),
    )


def _verdict(comment: str, of_connections: int, bit: Bits, becomes: Bits) -> Rule:
    """Move a verdict to its connection, if that has one of some bits; nothing is taken back."""
    which = has_any(MARK_OF_CONNECTION, of_connections) + has_any(MARK_OF_PACKET, bit.mask)
    return Rule(f"a verdict: {comment}", which + put(MARK_OF_CONNECTION, becomes))


def apply(kernel: Kernel, marks: Marks) -> None:
    """Put the table in place; one that is as it should be is left alone.

    Raises:
        KernelError: the kernel has no nf_tables, or refused.
    """
    if missing(kernel, marks):
        kernel.replace_table(PREFIX, chains(marks))


def missing(kernel: Kernel, marks: Marks) -> list[str]:
    """Return what of the table is not in the kernel, in words; empty if all is well.

    Raises:
        KernelError: the kernel has no nf_tables, or could not be asked.
    """
    held = kernel.table_comments(PREFIX)
    return [
        f"the chain {chain.name} in the nf_tables table inet {PREFIX}"
        for chain in chains(marks)
        if held.get(chain.name) != [rule.comment for rule in chain.rules]
    ]


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
    nftables.replace(PREFIX, chains(Marks()), commit=False)
