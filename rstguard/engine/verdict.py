"""What the engine can decide, and the one table of reasons.

Counters, events, command line and documentation all derive from `Reason`; there is no second list.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple

from rstguard.engine.address import Prefix
from rstguard.engine.flow import Tuple


class Action(IntEnum):
    """What a rule asks for; a larger value is sterner and wins."""

    OBSERVE = 0
    DROP = 1
    RESET = 2
    BAN = 3


class Verdict(IntEnum):
    """What happens to the packet itself."""

    ACCEPT = 0
    DROP = 1
    RESET = 2


class Ends(Enum):
    """Which ends of a connection are told of a reset; the other sees silence."""

    BOTH = "both"
    SOURCE = "source"
    DESTINATION = "destination"


class Reason(Enum):
    """Why a packet or a connection met its fate: one sentence each."""

    PASSED = "no rule objects"
    TRUSTED = "the source is on the policy's trusted list"
    PROTECTED = "the source is a protected address: it is never banned, shunned or reset"
    UNREADABLE = "the packet could not be parsed as TCP over IPv4 or IPv6"
    SYN_RATE = "the source sent SYNs faster than the rule allows"
    CONNECTION_RATE = "the source completed handshakes faster than the rule allows"
    HALF_OPEN = "the source left more handshakes unfinished than the rule allows"
    REFUSED_PORTS = "more targets refused the source, or kept silent, than the rule allows"
    DISTINCT_PORTS = "the source tried more different ports than the rule allows"
    DISTINCT_HOSTS = "the source tried more different hosts than the rule allows"
    BAD_FLAGS = "the source sent impossible flag combinations faster than the rule allows"
    OUT_OF_STATE = "the source sent segments of no known connection faster than the rule allows"
    RESET_RATE = "the source sent RSTs faster than the rule allows"
    SHORT_CONNECTIONS = "the source ended connections early more often than the rule allows"
    CONNECTIONS = "the source holds more connections at once than the rule allows"
    BYTE_RATE = "the source moved bytes faster than the rule allows"
    PACKET_RATE = "the client sent small packets faster than the rule allows"
    SLOW = "the connection moved fewer bytes a second than the rule demands"
    STALLED = "the client kept its receive window closed longer than the rule allows"
    IDLE = "the connection was silent longer than the rule allows"
    AGE = "the connection is older than the rule allows"
    UNANSWERED = "a pressed server has not answered the connection for as long as it now may take"
    OVERLOAD = "the worker was overrun, and the source sent a great share of what held it up"
    OUTLIVED = "the connection went on at its server after a RST that the gateway had believed"
    FORGED_RESET = "the end that the RST names holds the connection: it did not send it"
    LOW_TTL = "the segment had too few hops left to reach its server"
    STRAYS = "more segments of no connection came than all sources together may send"
    SPOOFED = "the segment came from outside in the name of an address that answers from inside"
    BANNED = "the source was banned, and its connections end with it"
    KILLED = "an administrator asked for it"

    @property
    def code(self) -> str:
        """The name used in counters, events and ``--json``."""
        return self.name.lower()


class Ban(NamedTuple):
    """Drop everything from `source` for `duration` nanoseconds.

    `offence` says how many bans by this rule are remembered, this one included; 0 if none are.
    """

    source: Prefix
    duration: int
    rule: str
    reason: Reason
    keep_existing: bool
    offence: int = 0


class Shun(NamedTuple):
    """Drop new SYNs from `source` for `duration` nanoseconds.

    `withheld` says that it stands for a ban, as the rule has banned too many.
    """

    source: Prefix
    duration: int
    rule: str
    reason: Reason
    withheld: bool = False


class Condemn(NamedTuple):
    """End the connection whose original direction is `flow`."""

    flow: Tuple
    ends: Ends
    rule: str
    reason: Reason


Effect = Ban | Shun | Condemn


class Decision(NamedTuple):
    """The outcome for one packet: exactly one verdict, and what else is to be done.

    `trust` asks that the rest of the connection no longer passes through the queue.  `rule` is the
    name of the most severe rule that objected, or "" if none did.
    """

    verdict: Verdict
    reason: Reason
    rule: str = ""
    trust: bool = False
    ends: Ends = Ends.BOTH
    effects: tuple[Effect, ...] = ()


PASS = Decision(Verdict.ACCEPT, Reason.PASSED)
PASS_AND_TRUST = Decision(Verdict.ACCEPT, Reason.PASSED, trust=True)
