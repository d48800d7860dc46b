"""Which packets are diverted into which queue: the rules of mangle PREROUTING.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rstguard.engine.address import is_v6
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import counting, ingress, limiting, oneway, proof, thinning
from rstguard.kernel.admission import Admission
from rstguard.kernel.forgotten import Forgotten
from rstguard.kernel.limiting import Limits
from rstguard.kernel.marks import Bits, Labels
from rstguard.kernel.matching import SYN_ONLY, UNTRACKED, Matching
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.proof import MPTCP_OPTION, PLAIN_ACK
from rstguard.kernel.tracker import Tracker

# All combinations that nf_conntrack_proto_tcp.c does not list in tcp_valid_flags, but for SYN+URG,
# which is one, and never comes to these rules.
_IMPOSSIBLE = (
    "FIN,SYN FIN,SYN",
    "SYN,RST SYN,RST",
    "FIN,RST FIN,RST",
    "FIN,ACK FIN",
    "FIN,SYN,RST,ACK NONE",
    "ACK,URG URG",
    "SYN,URG SYN,URG",
    "RST,URG RST,URG",
)


_BARE = {4: 40, 6: 60}
"""Bytes of an IP packet that is a TCP header without options, and nothing else."""


@dataclass(frozen=True, slots=True)
class Diversion(Matching):
    """The rules of each chain; `queues` are the NFQUEUE numbers of the workers."""

    queues: range
    tracker: Tracker

    @property
    def forgotten(self) -> Forgotten:
        """The rules for what the tracker does not know any more."""
        return Forgotten(self.ruleset, self.family, self.tracker)

    @property
    def limits(self) -> Limits:
        """The limits that the kernel keeps by itself."""
        return Limits(self.ruleset, self.family)

    @property
    def admission(self) -> Admission | None:
        """What counts connections as they begin: not where any ACK is taken for the first."""
        return None if self.tracker.liberal else Admission(self)

    def chains(self) -> dict[str, tuple[str, ...]]:
        """Return the chains by name."""
        found = {
            f"{PREFIX}-in": self.on_interfaces(f"{PREFIX}-classify", outbound=False, tcp=True),
            f"{PREFIX}-classify": self.classify(),
            f"{PREFIX}-syn": self.syn(),
            f"{PREFIX}-count": counting.syns(self.ruleset, self.family),
            f"{PREFIX}-first": self.first_ack(),
            f"{PREFIX}-close": self.close(),
            f"{PREFIX}-given-up": self.given_up(),
            f"{PREFIX}-invalid": self.invalid(),
            f"{PREFIX}-oneway": oneway.noted(self),
            f"{PREFIX}-window": self.window(),
            f"{PREFIX}-queue": self.queue("source"),
            **self.narrowed(),
            **self.limits.chains(self.steering("source"), self.queues),
            **self.forgotten.chains(),
        }
        out = self.on_interfaces(f"{PREFIX}-adopt", outbound=True, tcp=True)
        if self.admission:
            found |= self.admission.chains()
            out += self.admission.closing_out()
        out += self.on_interfaces(f"{PREFIX}-answers", outbound=True, tcp=True)
        found |= proof.chains(self)
        if {Divert.CLOSE, Divert.GIVEN_UP} & self.ruleset.diverts:
            out += self.on_interfaces(f"{PREFIX}-reset-out", outbound=True, tcp=True)
            found[f"{PREFIX}-reset-out"] = self.reset_out()
            found[f"{PREFIX}-queue-out"] = self.queue("destination")
        found[f"{PREFIX}-out"] = out
        return found

    def classify(self) -> tuple[str, ...]:
        """Most packets belong to connections that need nothing more: they leave first."""
        diverts = self.ruleset.diverts
        marks = self.marks
        settled = marks.trusted if Divert.HANDSHAKE in diverts else marks.established
        rules = [f"-p tcp -m tcp --tcp-flags {SYN_ONLY} -g {PREFIX}-syn"]
        if self.ruleset.enforce:
            rules.append(self.doubt())
        if self.admission:
            rules += self.admission.closing()
        if Divert.CLOSE in diverts:
            rules.append(f"-p tcp -m tcp ! --tcp-flags FIN,RST NONE -j {PREFIX}-close")
        if Divert.GIVEN_UP in diverts:
            match = f"-p tcp -m tcp --tcp-flags RST RST -m connmark --mark {marks.guarded}"
            rules.append(f"{match} -g {PREFIX}-given-up")
        if Divert.SMALL_WINDOW in diverts:
            rules.append(self.small_window())
        rules += [
            f"-m connmark --mark {settled} -j RETURN",
            "-m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN",
            f"-m connmark ! --mark {marks.uncondemned} -j RETURN",
            *self.unless_trusted(),
            *self.covered(),
            f"{self.hit('ban')} -j DROP",
            f"-m conntrack --ctstate INVALID,NEW -g {PREFIX}-invalid",
        ]
        guarded = f"-m connmark ! --mark {marks.unguarded}"
        rules.append(f"{UNTRACKED} -j RETURN")  # it counts what others keep from the tracker
        return (*rules, f"{PLAIN_ACK} {guarded} -j {PREFIX}-first")

    def syn(self) -> tuple[str, ...]:
        """New SYNs: from here on their connections are guarded."""
        rules = [*self.unless_trusted(), *self.in_scope()]
        if self.ruleset.strip_mptcp and self.ruleset.enforce:
            rules.append(f"-p tcp -j TCPOPTSTRIP --strip-options {MPTCP_OPTION}")
        marks = self.marks
        # What is on it and its packet by now, others have set.
        first = "-m conntrack --ctstate NEW ! --ctstatus CONFIRMED"
        rules.append(f"-m mark ! --mark {marks.none} -j {PREFIX}-foreign")
        begins = f"-m conntrack --ctstate NEW -m connmark --mark {marks.unguarded}"
        guard = [
            f"{first} -j CONNMARK --set-xmark {Bits(marks.guarded.value, marks.mask)}",
            f"{begins} -j CONNMARK --set-xmark {marks.guarded}",
        ]
        if self.ruleset.blocking != "drop":  # they are answered later, in the filter table
            blocked = [f"{self.hit(name)} -j RETURN" for name in ("ban", "gate", "shun")]
            rules += [*blocked, *guard] if self.ruleset.covers_all else [*guard, *blocked]
        else:
            rules += guard
        rules += [*ingress.replacing(self), *oneway.asked(self)]
        counted = self.ruleset.kernel_rule
        if counted or Divert.SYN in self.ruleset.diverts:
            if self.ruleset.bans and not counted:
                rules.append(f"{self.in_set('proven')} -j MARK --set-xmark {marks.to_queue_proven}")
            rules.append(f"-j {PREFIX}-count" if counted else f"-j {PREFIX}-syns")
        return tuple(rules)

    def first_ack(self) -> tuple[str, ...]:
        """The kernel accepted the client's ACK of the SYN-ACK: its address is probably real.

        The state ESTABLISHED says only that both ends were heard: wrong ACKs that the tracker
        ignores (NFCT_TCP_IGNORE in nf_conntrack_proto_tcp.c) bear it too.  ASSURED is set by the
        ACK that completes the handshake.
        """
        marks = self.marks
        wrong = "-m conntrack ! --ctstatus ASSURED"
        rules = [*proof.suspects(self, wrong), f"{wrong} -j RETURN"]
        first = f"-m connmark --mark {marks.guarded}"
        if self.admission:
            rules += self.admission.first(first)
        if not self.tracker.liberal:  # or any number would have done
            rules += proof.likely(self, first)
        rules += [*ingress.translated(self, first), *oneway.translated(self, first)]
        rules.append(f"{first} -j CONNMARK --set-xmark {marks.proven}")
        if Divert.HANDSHAKE in self.ruleset.diverts:
            # While nobody answers, a connection tries again with each packet, up to this many.
            # An entry that is used again has counted the packets of others, too.
            own = f'-m connlabel ! --label "{Labels(self.ruleset.labels).reused}"'
            enough = f"{own} -m connbytes --connbytes {self.ruleset.inspect_packets + 2}"
            enough += " --connbytes-mode packets --connbytes-dir original"
            rules += [
                f"{enough} -j CONNMARK --set-xmark {marks.trusted}",
                f"-m connmark --mark {marks.trusted} -j RETURN",
                *self.known(),
                f"-j {PREFIX}-queue",
            ]
        return tuple(rules)

    def close(self) -> tuple[str, ...]:
        """FINs and RSTs of guarded connections, of the ports that ask for them."""
        if Divert.CLOSE not in self.ruleset.diverts:
            return ()
        marks = self.marks
        wanted = self.ruleset.ports_needing(Divert.CLOSE)
        rules = [
            f"-m connmark ! --mark {marks.uncondemned} -j RETURN",
            f"-m connmark ! --mark {marks.established} -j RETURN",
            "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
        ]
        if wanted is not None:
            rules.append(f"-p tcp -m set ! --match-set {set_name('close-ports')} dst -j RETURN")
        limits = self.limits.limits(limiting.RESETS)
        return (*rules, *limits, *self.known(), f"-j {PREFIX}-queue")

    def given_up(self) -> tuple[str, ...]:
        """A client's RST before its handshake is over, as it answers a SYN-ACK it awaits not."""
        if Divert.GIVEN_UP not in self.ruleset.diverts:
            return ()
        return (
            *given_up(self),
            f"-j MARK --set-xmark {self.marks.to_queue_given_up}",
            f"-j {PREFIX}-queue",
        )

    def known(self) -> list[str]:
        """What the reader is told of a connection whose handshake is over."""
        return [f"-j MARK --set-xmark {self.marks.to_queue_bare}", *proof.bits(self)]

    def doubt(self) -> str:
        """A RST or FIN that the tracker took may not have reached the server, or not been believed.

        The sweeper looks what became of the connection (`rstguard.sweeper.doubts`), unless the
        server closes it (`rstguard.kernel.ingress`).  Only in the client's name must a RST bear the
        exact number to end the entry: in the server's, behind a SYN in the client's, any will do
        (tcp_packet in nf_conntrack_proto_tcp.c), and whoever forged the two would have the guard
        finish an innocent's connection.
        """
        marks = self.marks
        return (
            f"-p tcp -m tcp ! --tcp-flags FIN,RST NONE -m connmark --mark {marks.established}"
            f" -m conntrack --ctstate ESTABLISHED --ctdir ORIGINAL"
            f" -j {PREFIX}-doubt"
        )

    def reset_out(self) -> tuple[str, ...]:
        """A server's RST also ends a connection, and no client's segment may follow it.

        It bears no bit of ours: who reads the queue knows it by the hook, and takes the connection
        for proven.  With a RST the server also answers each ACK that somebody tries out.
        """
        marks, diverts = self.marks, self.ruleset.diverts
        rules = [
            "-p tcp -m tcp ! --tcp-flags RST RST -j RETURN",
            f"-m connmark ! --mark {marks.uncondemned} -j RETURN",
            "-m conntrack --ctdir ORIGINAL -j RETURN",
        ]
        if Divert.GIVEN_UP in diverts:
            # The RST of a REJECT rule shares an entry that is not yet in the table: no queue takes
            # such a packet (nf_ct_drop_unconfirmed in nfnetlink_queue.c).
            match = f"-m conntrack --ctstatus CONFIRMED -m connmark --mark {marks.guarded}"
            rules.append(f"{match} -j MARK --set-xmark {marks.to_queue_given_up}")
            rules.append(f"{match} -j {PREFIX}-queue-out")
        if Divert.CLOSE not in diverts:
            return tuple(rules)
        rules.append(f"-m connmark ! --mark {marks.established} -j RETURN")
        rules += proof.unless_proven(self)
        if self.ruleset.ports_needing(Divert.CLOSE) is not None:
            rules.append(f"-p tcp -m set ! --match-set {set_name('close-ports')} src -j RETURN")
        return (*rules, f"-j MARK --set-xmark {marks.none}", f"-j {PREFIX}-queue-out")

    def small_window(self) -> str:
        """The window is the last half of the TCP header's fourth word; unscaled as it stands."""
        largest = max(rule.window for rule in self.ruleset.rules)
        where = "0x0>>0x16&0x3c@0xc&0xffff" if self.family == 4 else "0x34&0xffff"
        most = f"0x{min(largest, 0xFFFF):x}"
        return (
            f"-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK -m connmark --mark"
            f' {self.marks.established} -m u32 --u32 "{where}=0x0:{most}"'
            f" -j {PREFIX}-window"
        )

    def window(self) -> tuple[str, ...]:
        """ACKs that advertise a small window, of trusted connections too."""
        if Divert.SMALL_WINDOW not in self.ruleset.diverts:
            return ()
        marks = self.marks
        return (
            f"-m connmark ! --mark {marks.uncondemned} -j RETURN",
            *self.unless_trusted(),
            f"-j MARK --set-xmark {marks.none}",
            *proof.bits(self, likely=False),
            f"-j {PREFIX}-queue",
        )

    def invalid(self) -> tuple[str, ...]:
        """The tracker calls a segment INVALID for its flags or because it fits no connection."""
        rules = proof.suspects(self)
        if Divert.BAD_FLAGS in self.ruleset.diverts:
            rules += [f"-p tcp -m tcp --tcp-flags {f} -g {PREFIX}-flags" for f in _IMPOSSIBLE]
        rules += self.forgotten.strays()
        return (*self.in_scope(), *rules) if rules else ()

    def queue(self, client: str) -> tuple[str, ...]:
        """One queue per worker, chosen by bits of the client's address ("source" or "destination").

        Everything that is counted per source or per prefix so meets in one process.
        """
        return tuple(
            f"{match}{self.to_queue(number)}"
            for match, number in zip(self.steering(client), self.queues, strict=True)
        )

    def narrowed(self) -> dict[str, tuple[str, ...]]:
        """The ways into the queues that an overrun worker can narrow."""
        chains: dict[str, tuple[str, ...]] = {}
        for index, number in enumerate(self.queues):
            to_queue = self.to_queue(number)
            syns = thinning.syns(self.ruleset, self.family, index, to_queue)
            chains[f"{PREFIX}-syns-{index}"] = syns
            strays = thinning.strays(self.family, index, to_queue)
            chains[f"{PREFIX}-strays-{index}"] = strays
        for name, before in (("syns", ()), ("strays", self.stray_marks())):
            ways = enumerate(self.steering("source"))
            chains[f"{PREFIX}-{name}"] = (
                *before,
                *(f"{match}-g {PREFIX}-{name}-{index}" for index, match in ways),
            )
        return chains

    def stray_marks(self) -> tuple[str, ...]:
        """What the reader of the queue is told of a segment that fits no connection."""
        rules = [f"-j MARK --set-xmark {self.marks.to_queue_stray}"]
        if self.ruleset.bans:
            proven = self.in_set("proven")
            rules.append(f"{proven} -j MARK --set-xmark {self.marks.to_queue_proven}")
        return tuple(rules)

    def to_queue(self, number: int) -> str:
        """Return the target of a queue."""
        bypass = " --queue-bypass" if self.ruleset.fail_open else ""
        return f"-j NFQUEUE --queue-num {number}{bypass}"

    def steering(self, client: str) -> tuple[str, ...]:
        """Return for each queue what matches the packets whose client belongs to it."""
        if len(self.queues) == 1:
            return ("",)
        where, mask = self.steering_word(client), len(self.queues) - 1
        return tuple(
            f'-m u32 --u32 "{where}&0x{mask:x}=0x{index:x}" ' for index in range(len(self.queues))
        )

    def steering_word(self, client: str) -> str:
        """The u32 expression whose low bits are the last ones of the widest counted prefix."""
        if self.family == 4:
            start = 12 if client == "source" else 16
        else:
            start = 8 if client == "source" else 24
        length = _widest(self.ruleset, self.family)
        whole_bytes = -(-length // 8)
        return f"0x{start + whole_bytes - 4:x}>>0x{whole_bytes * 8 - length:x}"


def worker_of(ruleset: RuleSet, client: int, queues: range) -> int:
    """Return the queue that the rules choose for a client, a tagged address (`Diversion.queue`)."""
    queues = queues_for(ruleset, queues)
    v6 = is_v6(client)
    shift = (128 if v6 else 32) - _widest(ruleset, 6 if v6 else 4)
    return queues[client >> shift & (len(queues) - 1)]


def queues_for(ruleset: RuleSet, queues: range) -> range:
    """Return those of the workers' queues that a policy uses.

    What is counted per target comes from all sources, so one worker must see it all.
    """
    return queues[:1] if any(rule.of_target for rule in ruleset.rules) else queues


def _widest(ruleset: RuleSet, family: int) -> int:
    """Return the length of the widest prefix that something is counted by."""
    rules = ruleset.rules
    if family == 4:
        return min([ruleset.source_ipv4, *(rule.ipv4_length for rule in rules)])
    return min([ruleset.source_ipv6, *(rule.ipv6_length for rule in rules)])


def given_up(matching: Matching) -> tuple[str, ...]:
    """Return the rules by which leaves the chain what is no client's RST that ends a handshake.

    One that ends no connection is INVALID to the tracker, and goes no further here.  An answer to a
    SYN-ACK that nobody awaits is bare.  With an option the tracker takes it all the same, but a
    server refuses a signature that it has no key for, or an old time stamp, and goes on with the
    handshake.
    """
    return (
        f"-m length ! --length {_BARE[matching.family]} -j RETURN",
        "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
        "-m conntrack --ctdir REPLY -j RETURN",
    )
