"""What the kernel is told: a compiled policy becomes the text of iptables-restore.  Pure.

Rules are written as iptables-save prints them, so that a table that is already as it should be can
be told from one that is not, and left alone.

Own chains only, each reached by one jump from a built-in chain.  The way of a packet:

- raw PREROUTING drops the SYNs, and all that is not TCP, of banned sources, and the SYNs of
  shunned ones, before the connection tracker pays for them.  raw OUTPUT keeps our own probes
  away from the tracker.
- mangle PREROUTING tells what a packet is and diverts it into the queue if a rule of the policy
  needs to see it.  Connections that need nothing more leave the chain at its second rule.  It
  comes last in the built-in chain: after the queue a packet goes on at the next hook, and the
  rules of other software must not be skipped.
- mangle FORWARD and INPUT move a worker's verdict from the packet's mark to its connection.
- filter INPUT, FORWARD and OUTPUT answer every segment of a condemned connection with a RST
  that carries the sender's own ACK number, the only one RFC 5961 (3.2) always accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rstguard.engine.address import is_v6
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import counting, marks
from rstguard.kernel.counting import PREFIX, bits

SYN_ONLY = "FIN,SYN,RST,ACK SYN"
# All combinations that nf_conntrack_proto_tcp.c does not list in tcp_valid_flags.
_IMPOSSIBLE = (
    "FIN,SYN FIN,SYN",
    "SYN,RST SYN,RST",
    "FIN,RST FIN,RST",
    "FIN,ACK FIN",
    "FIN,SYN,RST,ACK NONE",
    "ACK,URG URG",
)


@dataclass(frozen=True, slots=True)
class Jump:
    """The one rule by which a built-in chain reaches one of ours."""

    table: str
    builtin: str
    match: str
    chain: str
    last: bool = False

    @property
    def rule(self) -> str:
        """The rule as iptables-save prints it, less the ``-A CHAIN``."""
        return f"{self.match} -j {self.chain}".strip()


@dataclass(frozen=True, slots=True)
class Plan:
    """All chains of one address family: table -> chain -> rules, and the jumps to them."""

    chains: dict[str, dict[str, tuple[str, ...]]]
    jumps: tuple[Jump, ...] = field(default=())


def plan(ruleset: RuleSet, family: int, queues: range) -> Plan:
    """Return the chains for a policy in one address family (4 or 6).

    `queues` are the NFQUEUE numbers of the workers, one each; their count is a power of two.
    """
    build = _Build(ruleset, family, queues)
    chains = {
        "raw": {
            f"{PREFIX}-raw": build.on_interfaces(f"{PREFIX}-blocked", outbound=False),
            f"{PREFIX}-blocked": build.blocked(),
            f"{PREFIX}-probe": ("-j CT --notrack",),
        },
        "mangle": {
            f"{PREFIX}-in": build.on_interfaces(f"{PREFIX}-classify", outbound=False, tcp=True),
            f"{PREFIX}-classify": build.classify(),
            f"{PREFIX}-syn": build.syn(),
            f"{PREFIX}-count": counting.syns(ruleset, family),
            f"{PREFIX}-first": build.first_ack(),
            f"{PREFIX}-close": build.close(),
            f"{PREFIX}-invalid": build.invalid(),
            f"{PREFIX}-window": build.window(),
            f"{PREFIX}-save": _save(),
            f"{PREFIX}-queue": build.queue("source"),
        },
        "filter": {f"{PREFIX}-condemned": _condemned()},
    }
    if build.watches_outbound:
        chains["mangle"][f"{PREFIX}-out"] = build.on_interfaces(
            f"{PREFIX}-reset-out", outbound=True, tcp=True
        )
        chains["mangle"][f"{PREFIX}-reset-out"] = build.reset_out()
        chains["mangle"][f"{PREFIX}-queue-out"] = build.queue("destination")
    if ruleset.blocking != "drop":
        chains["filter"][f"{PREFIX}-refuse"] = build.on_interfaces(
            f"{PREFIX}-refused", outbound=False, tcp=True
        )
        chains["filter"][f"{PREFIX}-refused"] = build.refused()
    return Plan(chains, _jumps(ruleset, build.watches_outbound))


def _jumps(ruleset: RuleSet, outbound: bool) -> tuple[Jump, ...]:
    probe = f"-m mark --mark {bits(marks.PROBE)}"
    saved = f"-m mark ! --mark 0x0/0x{marks.MASK:x}"
    dead = f"-p tcp -m connmark ! --mark 0x0/0x{marks.CONDEMNED:x}"
    jumps = [
        Jump("raw", "PREROUTING", "", f"{PREFIX}-raw"),
        Jump("raw", "OUTPUT", probe, f"{PREFIX}-probe"),
        Jump("mangle", "PREROUTING", "", f"{PREFIX}-in", last=True),
        Jump("mangle", "INPUT", saved, f"{PREFIX}-save"),
        Jump("mangle", "FORWARD", saved, f"{PREFIX}-save"),
    ]
    jumps += [
        Jump("filter", hook, dead, f"{PREFIX}-condemned") for hook in ("INPUT", "FORWARD", "OUTPUT")
    ]
    if outbound:
        jumps.append(Jump("mangle", "POSTROUTING", "", f"{PREFIX}-out", last=True))
    if ruleset.blocking != "drop":
        jumps += [
            Jump("filter", hook, f"-p tcp -m tcp --tcp-flags {SYN_ONLY}", f"{PREFIX}-refuse")
            for hook in ("INPUT", "FORWARD")
        ]
    return tuple(jumps)


def _save() -> tuple[str, ...]:
    """Bits are added to the connection, never taken: a late verdict must not undo a later one."""
    rules = [
        f"-m mark --mark {bits(bit)} -j CONNMARK --set-xmark {bits(bit)}"
        for bit in (marks.TRUSTED, marks.CONDEMNED_SOURCE, marks.CONDEMNED_DESTINATION)
    ]
    return (*rules, f"-j MARK --set-xmark 0x0/0x{marks.MASK:x}")


def _condemned() -> tuple[str, ...]:
    """An end is noted as told just before it is: that note is the proof that it was reset."""
    rules = ["-p tcp -m tcp --tcp-flags RST RST -j RETURN"]
    for direction, condemned, told in (
        ("ORIGINAL", marks.CONDEMNED_SOURCE, marks.TOLD_SOURCE),
        ("REPLY", marks.CONDEMNED_DESTINATION, marks.TOLD_DESTINATION),
    ):
        match = f"-p tcp -m conntrack --ctdir {direction} -m connmark --mark {bits(condemned)}"
        rules.append(f"{match} -j CONNMARK --set-xmark {bits(told)}")
        rules.append(f"{match} -j REJECT --reject-with tcp-reset")
    return (*rules, "-j DROP")


@dataclass(frozen=True, slots=True)
class _Build:
    """The rules of each chain, for one policy and address family."""

    ruleset: RuleSet
    family: int
    queues: range

    @property
    def watches_outbound(self) -> bool:
        return Divert.CLOSE in self.ruleset.diverts

    def in_set(self, name: str, direction: str = "src") -> str:
        return f"-m set --match-set {PREFIX}-{name}{self.family} {direction}"

    def hit(self, name: str) -> str:
        """Match who is banned or shunned: a lifeline in the midst of a banned network is not."""
        return f"{self.in_set(name)} {negated(self.in_set('spared'))}"

    def on_interfaces(self, chain: str, outbound: bool, tcp: bool = False) -> tuple[str, ...]:
        protocol = "-p tcp " if tcp else ""
        way = "-o" if outbound else "-i"
        names = interface_names(self.ruleset)
        return tuple(f"{way} {name} {protocol}-j {chain}" for name in names)

    def unless_trusted(self) -> list[str]:
        v6 = self.family == 6
        trusts = any(is_v6(prefix.network) == v6 for prefix in self.ruleset.scope.trusted)
        return [f"{self.in_set('trusted')} -j RETURN"] if trusts else []

    def blocked(self) -> tuple[str, ...]:
        """Other segments of a banned source go on: its connections are to hear their RST."""
        if self.ruleset.blocking != "drop":
            return (
                *self.unless_trusted(),
                "-p tcp -j RETURN",
                f"{self.hit('ban')} -j DROP",
            )
        return (
            f"-p tcp -m tcp ! --tcp-flags {SYN_ONLY} -j RETURN",
            *self.unless_trusted(),
            f"{self.hit('ban')} -j DROP",
            f"-p tcp {self.hit('shun')} -j DROP",
        )

    def refused(self) -> tuple[str, ...]:
        """What a blocked source's SYN gets if the policy says more than silence."""
        unreachable = "icmp-admin-prohibited" if self.family == 4 else "icmp6-adm-prohibited"
        kind = "tcp-reset" if self.ruleset.blocking == "reset" else unreachable
        return (
            *self.unless_trusted(),
            f"-p tcp {self.hit('ban')} -j REJECT --reject-with {kind}",
            f"-p tcp {self.hit('shun')} -j REJECT --reject-with {kind}",
        )

    def classify(self) -> tuple[str, ...]:
        """Most packets belong to connections that need nothing more: they leave first."""
        diverts = self.ruleset.diverts
        settled = marks.GUARDED | marks.PROVEN
        if Divert.HANDSHAKE in diverts:
            settled |= marks.TRUSTED
        rules = [f"-p tcp -m tcp --tcp-flags {SYN_ONLY} -g {PREFIX}-syn"]
        if Divert.CLOSE in diverts:
            rules.append(f"-p tcp -m tcp ! --tcp-flags FIN,RST NONE -j {PREFIX}-close")
        if Divert.SMALL_WINDOW in diverts:
            rules.append(self.small_window())
        rules += [
            f"-m connmark --mark {bits(settled)} -j RETURN",
            "-m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN",
            f"-m connmark ! --mark 0x0/0x{marks.CONDEMNED:x} -j RETURN",
            *self.unless_trusted(),
            f"{self.hit('ban')} -j DROP",
            f"-m conntrack --ctstate INVALID,NEW -g {PREFIX}-invalid",
        ]
        plain_ack = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK"
        guarded = f"-m connmark --mark {bits(marks.GUARDED)}"
        return (*rules, f"{plain_ack} {guarded} -j {PREFIX}-first")

    def in_scope(self, chain_set: str = "ports", ports: frozenset[int] | None = None) -> list[str]:
        """Rules that leave the chain if the target is not protected."""
        scope = self.ruleset.scope
        rules = []
        if scope.destinations:
            rules.append(f"{negated(self.in_set('dst', 'dst'))} -j RETURN")
        if scope.ports is not None or ports is not None:
            rules.append(f"-p tcp -m set ! --match-set {PREFIX}-{chain_set} dst -j RETURN")
        return rules

    def syn(self) -> tuple[str, ...]:
        rules = [*self.unless_trusted(), *self.in_scope()]
        if self.ruleset.blocking != "drop":  # they are answered later, in the filter table
            rules += [f"{self.hit(name)} -j RETURN" for name in ("ban", "shun")]
        rules += [
            f"-m conntrack --ctstate NEW -j CONNMARK --set-xmark {bits(marks.GUARDED)}",
        ]
        counted = self.ruleset.kernel_rule
        if counted or Divert.SYN in self.ruleset.diverts:
            if self.ruleset.bans and not counted:
                rules.append(
                    f"{self.in_set('proven')} -j MARK --set-xmark {bits(marks.TO_QUEUE_PROVEN)}"
                )
            rules.append(f"-j {PREFIX}-count" if counted else f"-j {PREFIX}-queue")
        return tuple(rules)

    def first_ack(self) -> tuple[str, ...]:
        """The kernel accepted the client's ACK of the SYN-ACK: its address is real."""
        known = f"-j MARK --set-xmark {bits(marks.TO_QUEUE_KNOWN | marks.TO_QUEUE_PROVEN)}"
        rules = ["-m conntrack ! --ctstate ESTABLISHED -j RETURN"]
        if self.ruleset.bans:
            rules.append(f"-j SET --add-set {PREFIX}-proven{self.family} src --exist")
        rules.append(f"-j CONNMARK --set-xmark {bits(marks.PROVEN)}")
        if Divert.HANDSHAKE in self.ruleset.diverts:
            # While nobody answers, a connection tries again with each packet, up to this many.
            enough = f"-m connbytes --connbytes {self.ruleset.inspect_packets + 2}"
            enough += " --connbytes-mode packets --connbytes-dir original"
            trusted = bits(marks.TRUSTED)
            rules += [
                f"{enough} -j CONNMARK --set-xmark {trusted}",
                f"-m connmark --mark {trusted} -j RETURN",
                known,
                f"-j {PREFIX}-queue",
            ]
        return tuple(rules)

    def close(self) -> tuple[str, ...]:
        if Divert.CLOSE not in self.ruleset.diverts:
            return ()
        settled = marks.GUARDED | marks.PROVEN
        state = marks.TO_QUEUE_KNOWN | marks.TO_QUEUE_PROVEN
        wanted = self.ruleset.ports_needing(Divert.CLOSE)
        rules = [
            f"-m connmark ! --mark 0x0/0x{marks.CONDEMNED:x} -j RETURN",
            f"-m connmark ! --mark {bits(settled)} -j RETURN",
            "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
        ]
        if wanted is not None:
            rules.append(f"-p tcp -m set ! --match-set {PREFIX}-close-ports dst -j RETURN")
        return (*rules, f"-j MARK --set-xmark {bits(state)}", f"-j {PREFIX}-queue")

    def reset_out(self) -> tuple[str, ...]:
        """A server's RST also ends a connection, and no client's segment may follow it."""
        rules = [
            "-p tcp -m tcp ! --tcp-flags RST RST -j RETURN",
            f"-m connmark ! --mark 0x0/0x{marks.CONDEMNED:x} -j RETURN",
            f"-m connmark ! --mark {bits(marks.GUARDED | marks.PROVEN)} -j RETURN",
            "-m conntrack --ctdir ORIGINAL -j RETURN",
        ]
        if self.ruleset.ports_needing(Divert.CLOSE) is not None:
            rules.append(f"-p tcp -m set ! --match-set {PREFIX}-close-ports src -j RETURN")
        state = marks.TO_QUEUE_KNOWN | marks.TO_QUEUE_PROVEN | marks.TO_QUEUE_OUTBOUND
        return (*rules, f"-j MARK --set-xmark {bits(state)}", f"-j {PREFIX}-queue-out")

    def small_window(self) -> str:
        """The window is the last half of the TCP header's fourth word; unscaled as it stands."""
        largest = max(rule.window for rule in self.ruleset.rules)
        where = "0x0>>0x16&0x3c@0xc&0xffff" if self.family == 4 else "0x34&0xffff"
        most = f"0x{min(largest, 0xFFFF):x}"
        return (
            f"-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK -m connmark --mark"
            f' {bits(marks.GUARDED | marks.PROVEN)} -m u32 --u32 "{where}=0x0:{most}"'
            f" -j {PREFIX}-window"
        )

    def window(self) -> tuple[str, ...]:
        if Divert.SMALL_WINDOW not in self.ruleset.diverts:
            return ()
        proven = f"-j MARK --set-xmark {bits(marks.TO_QUEUE_PROVEN)}"
        return (
            f"-m connmark ! --mark 0x0/0x{marks.CONDEMNED:x} -j RETURN",
            *self.unless_trusted(),
            proven,
            f"-j {PREFIX}-queue",
        )

    def invalid(self) -> tuple[str, ...]:
        """The tracker calls a segment INVALID for its flags or because it fits no connection."""
        diverts = self.ruleset.diverts
        rules = []
        if Divert.STRAY in diverts or Divert.BAD_FLAGS in diverts:
            if self.ruleset.bans:
                rules.append(
                    f"{self.in_set('proven')} -j MARK --set-xmark {bits(marks.TO_QUEUE_PROVEN)}"
                )
            rules = [*self.in_scope(), *rules]
        if Divert.BAD_FLAGS in diverts and Divert.STRAY not in diverts:
            rules += [f"-p tcp -m tcp --tcp-flags {f} -j {PREFIX}-queue" for f in _IMPOSSIBLE]
        if Divert.STRAY in diverts:
            rules.append(f"-j MARK --set-xmark {bits(marks.TO_QUEUE_STRAY)}")
            rules.append(f"-j {PREFIX}-queue")
        return tuple(rules)

    def queue(self, client: str) -> tuple[str, ...]:
        """One queue per worker, chosen by bits of the client's address ("source" or "destination").

        Everything that is counted per source or per prefix so meets in one process.
        """
        bypass = " --queue-bypass" if self.ruleset.fail_open else ""
        if len(self.queues) == 1:
            return (f"-j NFQUEUE --queue-num {self.queues[0]}{bypass}",)
        where, mask = self.steering_word(client), len(self.queues) - 1
        return tuple(
            f'-m u32 --u32 "{where}&0x{mask:x}=0x{index:x}" -j NFQUEUE --queue-num {number}{bypass}'
            for index, number in enumerate(self.queues)
        )

    def steering_word(self, client: str) -> str:
        """The u32 expression whose low bits are the last ones of the widest counted prefix."""
        rules = self.ruleset.rules
        if self.family == 4:
            start = 12 if client == "source" else 16
            length = min([self.ruleset.source_ipv4, *(rule.ipv4_length for rule in rules)])
        else:
            start = 8 if client == "source" else 24
            length = min([self.ruleset.source_ipv6, *(rule.ipv6_length for rule in rules)])
        whole_bytes = -(-length // 8)
        return f"0x{start + whole_bytes - 4:x}>>0x{whole_bytes * 8 - length:x}"


def interface_names(ruleset: RuleSet) -> list[str]:
    """Return the protected interfaces as iptables names them: a glob ends in "+"."""
    return [name.replace("*", "+") for name in ruleset.scope.interfaces]


def negated(match: str) -> str:
    """Return a match on a set turned into its opposite."""
    return match.replace("-m set ", "-m set ! ", 1)
