"""The plan of all bits that the guard keeps on connections and packets, those to come included.

Eight adjacent bits of the mark, chosen by the policy's key `marks` (`DEFAULT_MARKS`); every other
bit belongs to other software and is never changed.  Eight labels beside them (`Labels`).

On a connection (connmark), GUARDED, PROVEN and TRUSTED are *stages*: who is trusted has proved
itself, and who has proved itself is guarded.  Two bits hold the three.  A stage only rises, and
each rule that raises it asks for the one below: so a late verdict takes nothing back.

A mark bit is what a dump filters by, what a rule clears again, and what must work for connections
that are older than the guard.  A label is what is only ever set, and only on connections that began
while some rule asked for labels: older ones have no room for them, and none can be made
(nf_conntrack_labels.c: nf_ct_labels_ext_add when an entry is made; nf_connlabels_replace gives
ENOSPC, xt_connlabel sets nothing).  No dump filters by labels, and no rule clears
one: a process can (`rstguard.sweeper.sweeping`).

On a packet the bits mean something else, and only between a rule of ours and the queue, or between
the queue and the next hook function, where they are taken off it before it is routed
(`rstguard.kernel.clearing`): on its way into the queue what the kernel knows of it
(`rstguard.engine.wire`: KNOWN, PROVEN, …), on its way back the verdict.  No bit means both: a
packet that passes because nobody reads the queue must not condemn its connection.  A verdict's bit
stands where it can do no harm if another program copies a connection's whole mark onto its packets
(`CONNMARK --restore-mark` without a mask): a verdict to condemn where the connection is condemned,
one to trust where it was sent a RST.

A mark that is no eight adjacent bits is refused (ValueError); a policy says so before.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from rstguard.engine import wire
from rstguard.engine.ruleset import (
    ADOPTED,
    ANEW,
    BEGUN,
    CONDEMNED,
    CONFIRMED,
    DEFAULT_LABELS,
    DEFAULT_MARKS,
    LIKELY,
    MPTCP,
    REUSED,
)
from rstguard.engine.verdict import Ends

_GUARDED, _PROVEN, _TRUSTED = 1, 2, 3
_STAGE = 3
_CLOSING = 1 << 2
_CONDEMNED_SOURCE, _CONDEMNED_DESTINATION = 1 << 3, 1 << 4
_HELD = 1 << 5
_RST_SENT_SOURCE, _RST_SENT_DESTINATION = 1 << 6, 1 << 7

_TO_QUEUE_KNOWN, _TO_QUEUE_PROVEN, _TO_QUEUE_OVER, _TO_QUEUE_STRAY = 1, 2, 1 << 2, 1 << 5
_OUTBOUND = _TO_QUEUE_KNOWN | _TO_QUEUE_PROVEN | _TO_QUEUE_STRAY
_TRUST = 1 << 6
_ALL = 0xFF


class Meaning(NamedTuple):
    """One line of the plan: where a bit is, which (of the lowest as 0x1), and what it says."""

    place: str
    name: str
    value: int
    says: str


_ON_CONNECTION, _INTO, _BACK, _LABEL = (
    "mark of a connection", "mark of a packet, into the queue", "mark of a packet, back from it",
    "label of a connection",
)  # fmt: skip

PLAN: Final = (
    Meaning(
        _ON_CONNECTION, "GUARDED", _GUARDED,
        "began with a SYN that came in on a protected interface to a protected target",
    ),
    Meaning(
        _ON_CONNECTION, "PROVEN", _PROVEN,
        "guarded, and the kernel saw the handshake completed",
    ),
    Meaning(
        _ON_CONNECTION, "TRUSTED", _TRUSTED,
        "proven, and nothing of it needs to pass through the queue any more",
    ),
    Meaning(
        _ON_CONNECTION, "CLOSING", _CLOSING,
        "a RST or FIN came in its client's name, and its server has not closed it: the sweeper"
        " looks what became of its ends; or its SYN took the place of one of which this is true;"
        " not GUARDED: an ACK that may bear a SYN cookie, and is not to be translated",
    ),
    Meaning(
        _ON_CONNECTION, "CONDEMNED_SOURCE", _CONDEMNED_SOURCE,
        "every further segment of the client is answered with a RST",
    ),
    Meaning(
        _ON_CONNECTION, "CONDEMNED_DESTINATION", _CONDEMNED_DESTINATION,
        "every further segment of the server is answered with a RST",
    ),
    Meaning(
        _ON_CONNECTION, "HELD", _HELD,
        "a RST is held back until the end that it claims to come from was asked; not GUARDED: a"
        " SYN to a service with too many open handshakes, dropped behind all rules",
    ),
    Meaning(
        _ON_CONNECTION, "RST_SENT_SOURCE", _RST_SENT_SOURCE,
        "the client has been sent a RST: set by the rule in front of the one that sends it",
    ),
    Meaning(
        _ON_CONNECTION, "RST_SENT_DESTINATION", _RST_SENT_DESTINATION,
        "the server has been sent a RST: likewise",
    ),
    Meaning(
        _LABEL, "LIKELY", LIKELY,
        "its first ACK fitted, and no ACK that fits nothing came from its source lately",
    ),
    Meaning(
        _LABEL, "CONFIRMED", CONFIRMED,
        "the server has sent data on it, or the kernel has taken a SYN cookie for it",
    ),
    Meaning(
        _LABEL, "ADOPTED", ADOPTED,
        "the tracker had forgotten it and has taken it up again: nobody knows its age and window"
        " scale",
    ),
    Meaning(
        _LABEL, "BEGUN", BEGUN,
        "its first packet came while the guard ran: the bits that condemn count only with the next",
    ),
    Meaning(
        _LABEL, "CONDEMNED", CONDEMNED,
        "the guard itself has condemned it, and no other program's mark",
    ),
    Meaning(
        _LABEL, "MPTCP", MPTCP, "its server has agreed to MPTCP: a RST ends a subflow alone",
    ),
    Meaning(
        _LABEL, "REUSED", REUSED,
        "its entry had been another's: the age, the bytes and the packets that the kernel counts"
        " are of both",
    ),
    Meaning(
        _LABEL, "ANEW", ANEW,
        "the same since the last sweep, which clears it, and LIKELY and CONFIRMED: those were"
        " another's",
    ),
    Meaning(_INTO, "KNOWN", _TO_QUEUE_KNOWN, "the tracker calls the connection established"),
    Meaning(
        _INTO, "PROVEN", _TO_QUEUE_PROVEN,
        "with KNOWN: the connection is LIKELY or CONFIRMED; else: its source lately had a"
        " CONFIRMED one",
    ),
    Meaning(
        _INTO, "OVER", _TO_QUEUE_OVER,
        "by the kernel's count it is one too many; of a RST: its connection's handshake was not"
        " over; of a RST that waits: it came in on a protected interface",
    ),
    Meaning(_INTO, "STRAY", _TO_QUEUE_STRAY, "it fits no connection that the tracker knows"),
    Meaning(
        _BACK, "CONDEMN_SOURCE", _CONDEMNED_SOURCE, "its connection is condemned, the client told",
    ),
    Meaning(
        _BACK, "CONDEMN_DESTINATION", _CONDEMNED_DESTINATION,
        "its connection is condemned, the server told",
    ),
    Meaning(_BACK, "TRUST", _TRUST, "its connection is trusted, if it is proven"),
)  # fmt: skip
"""Every bit and label, in the order of docs/how-it-works.md."""


class Bits(NamedTuple):
    """Some bits of a mark: what they are under a mask.  To be matched, or to be set."""

    value: int
    mask: int

    def __str__(self) -> str:
        """Return them as iptables writes them, in a match and in a target alike."""
        return f"0x{self.value:x}/0x{self.mask:x}"


class Marks:
    """The bits at the place that a policy gives them: `mask` is eight adjacent ones."""

    def __init__(self, mask: int = DEFAULT_MARKS) -> None:
        unit = mask & -mask
        if not mask or mask != unit * _ALL or mask >> 32:
            raise ValueError(f"0x{mask:x} is not eight adjacent bits of a mark")
        self.mask = mask
        self.base = unit.bit_length() - 1

        # The stage of a connection: each as a match, and as what a rule sets.
        self.stage_mask = _STAGE * unit
        self.unguarded = Bits(0, _STAGE * unit)
        self.guarded = Bits(_GUARDED * unit, _STAGE * unit)
        self.proven = Bits(_PROVEN * unit, _STAGE * unit)
        self.trusted = Bits(_TRUSTED * unit, _STAGE * unit)
        self.established = Bits(_PROVEN * unit, _PROVEN * unit)
        """PROVEN or TRUSTED: only a match."""

        self.held = _one(_HELD * unit)
        self.closing = _one(_CLOSING * unit)
        self.condemned_source = _one(_CONDEMNED_SOURCE * unit)
        self.condemned_destination = _one(_CONDEMNED_DESTINATION * unit)
        self.condemned = _both(self.condemned_source, self.condemned_destination)
        self.uncondemned = Bits(0, self.condemned.mask)
        self.rst_sent_source = _one(_RST_SENT_SOURCE * unit)
        self.rst_sent_destination = _one(_RST_SENT_DESTINATION * unit)
        self.rst_sent = _both(self.rst_sent_source, self.rst_sent_destination)
        self.condemned_for = {
            Ends.BOTH: self.condemned.value,
            Ends.SOURCE: self.condemned_source.value,
            Ends.DESTINATION: self.condemned_destination.value,
        }
        """The bits that reset the named ends of a connection, and those of the verdict to do so."""
        self.rst_sent_for = {
            Ends.BOTH: self.rst_sent.value,
            Ends.SOURCE: self.rst_sent_source.value,
            Ends.DESTINATION: self.rst_sent_destination.value,
        }
        """The bits that prove that the named ends were sent a RST."""

        alive = self.uncondemned.mask
        self.swept = Bits(self.established.value, self.established.mask | alive)
        self.half_open = Bits(self.guarded.value, self.guarded.mask | alive)
        self.unfinished = Bits(alive, alive | self.rst_sent.mask)
        """Condemned, and no end was sent its RST yet."""
        # A RST or FIN for it came in, that is not held back.
        self.doubted = Bits(self.closing.value, self.closing.mask | self.held.mask | alive)

        self.none = Bits(0, mask)
        self.to_queue_proven = _one(_TO_QUEUE_PROVEN * unit)
        self.to_queue_over = _one(_TO_QUEUE_OVER * unit)
        self.to_queue_given_up = Bits(_TO_QUEUE_OVER * unit, mask)
        self.to_queue_stray = Bits(_TO_QUEUE_STRAY * unit, mask)
        self.to_queue_known = Bits((_TO_QUEUE_KNOWN | _TO_QUEUE_PROVEN) * unit, mask)
        """A segment of a proven connection; or SYNPROXY's own SYN."""
        self.to_queue_also_known = _one(_TO_QUEUE_KNOWN * unit)  # of a RST that waits
        self.to_queue_bare = Bits(_TO_QUEUE_KNOWN * unit, mask)  # it may have been forged
        self.outbound = _OUTBOUND * unit
        """What a packet of the protected side is given by who reads the queue (POSTROUTING)."""
        self.trust = _one(_TRUST * unit)
        self.probe = Bits(mask, mask)
        """On a packet that the guard sends to make a silent end speak, until it is known by it."""

    @property
    def bearer(self) -> Bits:
        """An entry made by an ACK that may bear a SYN cookie: it ends where that is read."""
        return Bits(self.closing.value, self.closing.mask | self.stage_mask)

    @property
    def awaiting(self) -> Bits:
        """One made by a SYN to a service behind DNAT that is full: it ends behind all rules."""
        return Bits(self.held.value, self.held.mask | self.stage_mask)

    @property
    def replacing(self) -> Bits:
        """One whose SYN took the place of a doubted one."""
        bits = self.guarded.value | self.closing.value
        return Bits(bits, self.guarded.mask | self.doubted.mask)

    @property
    def states(self) -> tuple[int, ...]:
        """The state bits of `rstguard.engine.wire` for ``mark >> base & 255`` of a packet."""
        return tuple(map(_state, range(_ALL + 1)))


class Labels:
    """The numbers of the labels, from `first` on (0-120).

    They need the connlabel match (CONFIG_NETFILTER_XT_MATCH_CONNLABEL and
    CONFIG_NF_CONNTRACK_LABELS; the check "proof of address" of `rstguard doctor`).
    """

    def __init__(self, first: int = DEFAULT_LABELS) -> None:
        self.likely = first + LIKELY
        self.confirmed = first + CONFIRMED
        self.adopted = first + ADOPTED
        self.begun = first + BEGUN
        self.condemned = first + CONDEMNED
        self.mptcp = first + MPTCP
        self.reused = first + REUSED
        self.anew = first + ANEW


def _one(value: int) -> Bits:
    return Bits(value, value)


def _both(one: Bits, other: Bits) -> Bits:
    return _one(one.value | other.value)


def _state(bits: int) -> int:
    known, stray = bool(bits & _TO_QUEUE_KNOWN), bool(bits & _TO_QUEUE_STRAY)
    return (
        wire.KNOWN * known
        | wire.PROVEN * bool(bits & _TO_QUEUE_PROVEN)
        | wire.OUTBOUND * (stray and known)
        | wire.STRAY * (stray and not known)
        | wire.OVER * bool(bits & _TO_QUEUE_OVER)
    )
