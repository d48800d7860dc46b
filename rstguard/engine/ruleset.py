"""The compiled policy: plain values that the engine, the chains and the reports all read.

Times are integer nanoseconds, ports are expanded, addresses are prefixes.  Nothing here has
state; `rstguard.engine.rules` gives each `Rule` its tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from rstguard.engine.address import Prefix
from rstguard.engine.shares import DEFAULT_SHARES, Shares
from rstguard.engine.verdict import Action, Ends

SECOND = 1_000_000_000

DEFAULT_MARKS = 0xFF000000
"""The bits of marks that are the guard's: eight adjacent ones (`rstguard.kernel.marks`)."""
DEFAULT_LABELS = 120
"""The first of the eight connection labels that are the guard's."""
LIKELY, CONFIRMED, ADOPTED, BEGUN, CONDEMNED, MPTCP, REUSED, ANEW = range(8)
"""The labels, counted from that one (`rstguard.kernel.marks`)."""

DEFAULT_LEAST_TTL = 4
"""Hops that a segment must have left: enough for servers behind two routers more."""
DEFAULT_SPOOFED_AFTER = 600 * SECOND
"""How long segments in the name of an inside address are counted before they are dropped."""

RULE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")
"""The name of a rule or of a policy: it is also kept beside a ban in the kernel's set."""


class Measure(Enum):
    """What a rule measures; the value is its name in a policy file."""

    SYN_RATE = "syn_rate"
    CONNECTION_RATE = "connection_rate"
    HALF_OPEN = "half_open"
    DISTINCT_PORTS = "distinct_ports"
    DISTINCT_HOSTS = "distinct_hosts"
    REFUSED_PORTS = "refused_ports"
    BAD_FLAGS = "bad_flags"
    OUT_OF_STATE = "out_of_state"
    RESET_RATE = "reset_rate"
    SHORT_CONNECTIONS = "short_connections"
    CONNECTIONS = "connections"
    BYTE_RATE = "byte_rate"
    PACKET_RATE = "packet_rate"
    SLOW = "slow"
    STALLED = "stalled"
    IDLE = "idle"
    AGE = "age"
    UNANSWERED = "unanswered"


RATE_MEASURES = frozenset({
    Measure.SYN_RATE, Measure.CONNECTION_RATE, Measure.BAD_FLAGS, Measure.OUT_OF_STATE,
    Measure.RESET_RATE, Measure.SHORT_CONNECTIONS, Measure.BYTE_RATE, Measure.PACKET_RATE,
})  # fmt: skip
"""Measures whose `limit` is an amount per `period`."""

SWEEP_MEASURES = frozenset({
    Measure.CONNECTIONS, Measure.BYTE_RATE, Measure.PACKET_RATE, Measure.SLOW, Measure.IDLE,
    Measure.AGE, Measure.UNANSWERED,
})  # fmt: skip
"""Measures judged from the kernel's connection table, not packet by packet."""


FORGEABLE = frozenset(
    {
        Measure.SYN_RATE,
        Measure.HALF_OPEN,
        Measure.DISTINCT_PORTS,
        Measure.DISTINCT_HOSTS,
        Measure.REFUSED_PORTS,
        Measure.BAD_FLAGS,
        Measure.OUT_OF_STATE,
        Measure.RESET_RATE,
    }
)
"""Measures that count packets which anybody can send in anybody's name."""
NEVER_BANS = frozenset(
    {Measure.HALF_OPEN, Measure.REFUSED_PORTS, Measure.BAD_FLAGS, Measure.OUT_OF_STATE}
)
"""Those of them that count nothing else: no packet of a proven connection is among what they count,
so they never ban."""
OF_NO_CONNECTION = (Measure.BAD_FLAGS, Measure.OUT_OF_STATE)
"""Measures of segments that belong to no connection: what such a rule does not let pass the kernel
drops by itself (`rstguard.kernel.limiting`)."""
PERIODS = (SECOND, 60 * SECOND, 3600 * SECOND, 86400 * SECOND)
"""The times over which the kernel can count."""
_MOST_AT_ONCE = 1_000_000
_LONGEST_REFILL = 49 * 86400 * SECOND
"""What xt_hashlimit can keep count of: see `Rule.countable`."""


class Divert(Enum):
    """A class of packets that some rule needs to see in the queue."""

    SYN = "new SYNs"
    HANDSHAKE = "the first ACK of a connection"
    CLOSE = "FINs and RSTs of a connection"
    GIVEN_UP = "RSTs that end a handshake"
    BAD_FLAGS = "segments with impossible flags"
    STRAY = "segments of no known connection"
    SMALL_WINDOW = "ACKs that advertise a small window"


NEEDS: dict[Measure, frozenset[Divert]] = {
    Measure.SYN_RATE: frozenset({Divert.SYN}),
    Measure.CONNECTION_RATE: frozenset({Divert.HANDSHAKE}),
    Measure.HALF_OPEN: frozenset({Divert.SYN, Divert.HANDSHAKE, Divert.GIVEN_UP}),
    Measure.DISTINCT_PORTS: frozenset({Divert.SYN}),
    Measure.DISTINCT_HOSTS: frozenset({Divert.SYN}),
    Measure.REFUSED_PORTS: frozenset({Divert.SYN, Divert.HANDSHAKE, Divert.GIVEN_UP}),
    Measure.BAD_FLAGS: frozenset({Divert.BAD_FLAGS}),
    Measure.OUT_OF_STATE: frozenset({Divert.STRAY}),
    Measure.RESET_RATE: frozenset({Divert.CLOSE}),
    Measure.SHORT_CONNECTIONS: frozenset({Divert.SYN, Divert.CLOSE}),
    Measure.STALLED: frozenset({Divert.SYN, Divert.SMALL_WINDOW}),
}
"""Which packets a measure needs; sweep measures need none."""


def needs(rule: Rule) -> frozenset[Divert]:
    """Return which packets a rule needs to see, all of them."""
    return frozenset() if rule.in_kernel else NEEDS.get(rule.measure, frozenset())


class Per(Enum):
    """What a source measure counts by; the last two count what is sent to them by anybody."""

    SOURCE = "source"
    PREFIX = "prefix"
    CONNECTION = "connection"
    SERVICE = "service"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Escalate:
    """Each new ban within `memory` lasts `factor` times the last, at most `up_to` (nanoseconds)."""

    factor: int
    up_to: int
    memory: int


@dataclass(frozen=True, slots=True)
class Unless:
    """A source of whose connections `productive` percent carry data may go `up_to` times as far."""

    productive: int
    up_to: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One compiled rule.

    `limit` is a count, an amount per `period` for rate measures (`RATE_MEASURES`), bytes/s for
    SLOW (the `under`), or nanoseconds for IDLE, AGE, UNANSWERED and STALLED (the `over`).
    `period`, `within`, `after`, `shorter_than`, `duration` are nanoseconds.  `burst` is at
    least 1.  `ipv4_length`/`ipv6_length` say how wide one counted source is, or one destination
    with `Per.DESTINATION`.  `ports` is None for all protected ports, no `destinations` mean all
    that are protected; sources of `excepted` are not concerned.  `window` is in bytes, `of` is
    client, server or both.  With `in_kernel` the kernel counts, and only the SYNs that are too
    many come to the engine.  `when_pressed` rules concern pressed services alone
    (`rstguard.engine.pressure`).  SLOW looks at the last `over_last` nanoseconds, 0: at all.
    """

    name: str
    measure: Measure
    action: Action
    limit: int
    period: int = 0
    burst: int = 1
    within: int = 0
    ports: frozenset[int] | None = None
    per: Per = Per.SOURCE
    ipv4_length: int = 32
    ipv6_length: int = 64
    duration: int = 0
    escalate: Escalate | None = None
    keep_existing: bool = False
    shorter_than: int = 0
    after: int = 0
    of: str = "client"
    window: int = 0
    ends: Ends = Ends.BOTH
    in_kernel: bool = False
    unless: Unless | None = None
    destinations: tuple[Prefix, ...] = ()
    excepted: tuple[Prefix, ...] = ()
    when_pressed: bool = False
    over_last: int = 0

    @property
    def of_target(self) -> bool:
        """Whether it counts what a service or a destination gets, whoever sends it."""
        return self.per in (Per.SERVICE, Per.DESTINATION)

    @property
    def is_partial(self) -> bool:
        """Whether it concerns some destinations or sources only."""
        return bool(self.destinations or self.excepted)

    def concerns(self, source: int, destination: int) -> bool:
        """Tell whether it concerns what a source sends to a destination (tagged addresses)."""
        if self.destinations and not any(one.covers(destination) for one in self.destinations):
            return False
        return not any(one.covers(source) for one in self.excepted)

    @property
    def limits_service(self) -> bool:
        """Whether the rule keeps SYNs from a service or destination, whoever sends them."""
        limits = self.measure is Measure.SYN_RATE and self.of_target
        return limits and self.action is not Action.OBSERVE

    @property
    def countable(self) -> bool:
        """Whether the kernel can keep the very count of a rate measure.

        It does so in whole microseconds between two packets (user2credits in
        net/netfilter/xt_hashlimit.c), and remembers a source for 2^32 milliseconds at most.
        """
        if self.period not in PERIODS or self.limit * SECOND > _MOST_AT_ONCE * self.period:
            return False
        return self.burst <= _MOST_AT_ONCE and self.refill <= _LONGEST_REFILL

    @property
    def refill(self) -> int:
        """Nanoseconds after which a source of a rate measure has its whole burst again."""
        return -(-self.period * self.burst // self.limit)


@dataclass(frozen=True, slots=True)
class Scope:
    """What is protected, and who is exempt.

    Empty `destinations` mean any address, None `ports` any TCP port.  Interfaces are names or
    globs as in the policy file ("wan*").  `trusted` are exempt from everything, `protected` only
    from being banned, shunned and reset: what of theirs is too fast is dropped.
    """

    interfaces: tuple[str, ...]
    destinations: tuple[Prefix, ...]
    ports: frozenset[int] | None
    trusted: tuple[Prefix, ...]
    protected: tuple[Prefix, ...] = ()

    def exempts(self, source: int) -> bool:
        """Tell whether a tagged address may not be banned, shunned or reset."""
        return any(prefix.covers(source) for prefix in self.protected + self.trusted)

    def trusts(self, source: int) -> bool:
        """Tell whether a tagged address is on the trusted list."""
        return any(prefix.covers(source) for prefix in self.trusted)

    def protects(self, destination: int, port: int) -> bool:
        """Tell whether a target is inside the policy's scope."""
        if self.ports is not None and port not in self.ports:
            return False
        return not self.destinations or any(p.covers(destination) for p in self.destinations)


@dataclass(frozen=True, slots=True)
class SynBudget:
    """How much of a service's handshakes the kernel lets pass before it gives out SYN cookies.

    `rate` are SYNs a second, `half_open` handshakes that are not completed yet; None: any number.
    `ports` None means all protected.
    """

    rate: int | None
    ports: frozenset[int] | None
    half_open: int | None = None

    def __str__(self) -> str:
        """Return it in words: `20000/s and 128 half-open`."""
        rate = [] if self.rate is None else [f"{self.rate}/s"]
        waiting = [] if self.half_open is None else [f"{self.half_open} half-open"]
        return " and ".join(rate + waiting)


@dataclass(frozen=True, slots=True)
class RuleSet:
    """A whole compiled policy.

    `enforce` False means: decide, count and report, but change nothing.  `fail_open` is what
    passes while the engine is down or overrun.  `blocking` is what a banned or shunned source
    sees: "drop", "reset" or "unreachable".  With `covers_all` it is blocked from everything, else
    from protected targets alone.  `challenge` has shunned sources answered with SYN cookies where
    those can be had.  `shun_duration` and `sweep_every` are nanoseconds.
    A rule that bans in more than `bans_per_minute` wide prefixes (`rstguard.engine.capping`) a
    minute is `capped`: it shuns instead for a while.  `marks` are the mark bits, `labels` is the
    first of the connection labels that the guard may use.
    `forged_resets` is "hold", "observe" or "off": whether the sender of a RST is asked before it
    passes, after it has passed, or not at all; RSTs that come from `reset_exempt` always pass.
    With `forged_fins` FINs are treated like them.
    `inspect_packets` caps how many early packets of a connection may pass through the queue.
    With `strip_mptcp` SYNs to protected targets lose the option MPTCP.
    Segments with fewer than `least_ttl` hops left are dropped, 0: none.  What comes from outside in
    the name of an address that answers from inside is dropped after `spoofed_after` nanoseconds,
    None: never; `drops_spoofed` says that it is so far.  `capacity` are ports, and how many
    connections the server of each can hold.  `shares` is about sources that carry a large one.
    """

    name: str
    enforce: bool
    fail_open: bool
    scope: Scope
    rules: tuple[Rule, ...]
    source_ipv4: int = 32
    source_ipv6: int = 64
    inspect_packets: int = 8
    syn_budget: SynBudget | None = None
    blocking: str = "drop"
    covers_all: bool = True
    challenge: bool = True
    shun_duration: int = 10 * SECOND
    sweep_every: int = 2 * SECOND
    bans_per_minute: int = 1000
    capped: frozenset[str] = frozenset()
    marks: int = DEFAULT_MARKS
    labels: int = DEFAULT_LABELS
    forged_resets: str = "off"
    forged_fins: bool = False
    reset_exempt: tuple[Prefix, ...] = ()
    strip_mptcp: bool = False
    least_ttl: int = DEFAULT_LEAST_TTL
    spoofed_after: int | None = DEFAULT_SPOOFED_AFTER
    drops_spoofed: bool = False
    capacity: tuple[tuple[int, int], ...] = ()
    shares: Shares = DEFAULT_SHARES

    @property
    def diverts(self) -> frozenset[Divert]:
        """The packet classes that this policy's rules need, and no others."""
        return frozenset().union(*map(needs, self.rules))

    @property
    def kernel_rule(self) -> Rule | None:
        """The rule that the kernel counts SYNs for; there is at most one."""
        return next((rule for rule in self.rules if rule.in_kernel), None)

    def keeping_out(self, measure: Measure) -> tuple[Rule, ...]:
        """Return the rules of a measure that let packets not pass, the most severe first.

        Of equal ones the first in the policy comes first, as in the engine.  A policy that only
        observes has none.
        """
        found = (rule for rule in self.rules if rule.measure is measure)
        severe = (rule for rule in found if self.enforce and rule.action > Action.OBSERVE)
        return tuple(sorted(severe, key=lambda rule: rule.action, reverse=True))

    def kept_by_kernel(self, measure: Measure) -> tuple[Rule, ...]:
        """Return those of them whose limit the kernel keeps as well: not of some sources only."""
        keeping = self.keeping_out(measure)
        return tuple(rule for rule in keeping if rule.countable and not rule.is_partial)

    @property
    def sweeps(self) -> bool:
        """Whether any rule is judged from the kernel's connection table."""
        return any(rule.measure in SWEEP_MEASURES for rule in self.rules)

    @property
    def looks_for_pressure(self) -> bool:
        """Whether it matters which services are pressed."""
        return bool(self.capacity) or any(rule.when_pressed for rule in self.rules)

    @property
    def lenient(self) -> bool:
        """Whether any rule gives productive sources more, so that they must be known."""
        return any(rule.unless for rule in self.rules)

    @property
    def bans(self) -> bool:
        """Whether any rule bans, so that proof of address matters."""
        return any(rule.action is Action.BAN for rule in self.rules)

    def ports_needing(self, divert: Divert) -> frozenset[int] | None:
        """Return the ports for which some rule needs the packet class; None means all."""
        found: set[int] = set()
        for rule in self.rules:
            if divert in needs(rule):
                if rule.ports is None:
                    return None
                found |= rule.ports
        return frozenset(found)
