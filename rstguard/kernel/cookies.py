"""The SYN budget: above it the kernel answers a service's SYNs with SYN cookies.  Pure.

The way of a connection while its service is over budget (numbers: hook priorities need no knowing):

- raw PREROUTING: hashlimit counts the SYNs of each service.  With --hashlimit-rate-match it is a
  switch, not a valve (rateinfo_recalc in net/netfilter/xt_hashlimit.c): over the rate within the
  running second or in the last one, *every* SYN matches.  Those are noted in the set
  rstguard-engaged and kept from the tracker.
- filter INPUT and FORWARD: SYNPROXY answers them, and takes the ACKs that carry a cookie.
- OUTPUT: for each of those ACKs it opens the connection to the server, with the client's address as
  source.  That SYN is what the engine judges, as a SYN and as a completed handshake in one.

Three things the kernel does not do by itself, each found by trial on 6.18:

- SYNPROXY's own SYN-ACK goes through the tracker.  If a client's port was used shortly before, it
  meets the old entry and is rewritten by that one's sequence offset (nf_ct_seq_adjust): the client
  then acknowledges a cookie that nobody gave out.  So these SYN-ACKs are kept from the tracker.
- With time stamps SYNPROXY's ACK to the server echoes a wrong one (synproxy_tstamp_adjust turns it
  though it is right already).  Linux since 6.15 refuses such an ACK (tcp_check_req, TSEcrRejected),
  and whoever waits for the server's first word waits a second or more.  Hence no time stamp in it.
- A packet of SYNPROXY is known by what no other has: no socket, and a SYN also a connection
  template before the tracker has seen it, which matches as state NEW in the raw table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rstguard.engine.address import address_text, is_v6
from rstguard.engine.offers import Offer, Service
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel.chains import Plan
from rstguard.kernel.counting import LARGEST_RATE, gate, syns, table_size
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.matching import SYN_ACK, SYN_ONLY, interface_names, negated
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.proof import label

ENGAGED_SECONDS = 60
"""How long after its last cookie a service's ACKs are still searched for cookies."""
LOG_GROUP = 5640
"""NFLOG group of the sampled SYN-ACKs, and of the SYNs that came too late for their cookie."""
_LOG_BYTES = 160  # IPv6 header, one extension header, TCP header with all options
_BOUND_SECONDS = 2
"""How long the count of a service without cookies is kept after its last SYN."""

_SYN = f"-p tcp -m tcp --tcp-flags {SYN_ONLY}"
_PLAIN_ACK = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK ACK"
_TIMESTAMP = 8  # TCPOPT_TIMESTAMP
_NO_SOCKET = "-m owner ! --socket-exists"

Known = Mapping[Service, Offer]


def in_force(ruleset: RuleSet) -> bool:
    """Tell whether the policy has a budget that may act: one that observes changes nothing."""
    return ruleset.syn_budget is not None and ruleset.enforce


def engaged_set(family: int) -> str:
    """Return the name of the set of services that were lately over budget."""
    return set_name("engaged", family)


def with_budget(plan: Plan, ruleset: RuleSet, family: int, known: Known) -> Plan:
    """Return a policy's plan with its SYN budget, for the services whose offers are known."""
    if not in_force(ruleset):
        return plan
    of_family = {s: o for s, o in known.items() if is_v6(s.address) == (family == 6)}
    build = _Build(ruleset, family, of_family)
    chains = {table: dict(of_table) for table, of_table in plan.chains.items()}
    raw, mangle, filters = chains["raw"], chains["mangle"], chains["filter"]
    raw[f"{PREFIX}-raw"] += build.on_interfaces(f"-i {{}} {_SYN} -j {PREFIX}-budget")
    raw[f"{PREFIX}-budget"] = build.budget()
    raw[f"{PREFIX}-over"] = build.over()
    raw[f"{PREFIX}-answer"] = build.answer()
    raw[f"{PREFIX}-opening"] = build.opening()
    *before, last = mangle[f"{PREFIX}-syn"]
    to_queue = (f"-j {PREFIX}-syns", f"-j {PREFIX}-count")
    bound = build.bound() if last in to_queue else ()
    untracked = "-m conntrack --ctstate UNTRACKED -j RETURN"
    mangle[f"{PREFIX}-syn"] = (untracked, *before, *bound, last)
    # An ACK with a cookie belongs to no connection yet, and is no stray.
    mangle[f"{PREFIX}-invalid"] = (
        f"{_PLAIN_ACK} {build.engaged()} -j RETURN",
        *mangle[f"{PREFIX}-invalid"],
    )
    mangle[f"{PREFIX}-proved"] = build.proved()
    if ruleset.kernel_rule:
        mangle[f"{PREFIX}-returned"] = syns(ruleset, family, returned=True)
    mangle[f"{PREFIX}-joined"] = build.joined()
    mangle[f"{PREFIX}-offers"] = build.on_interfaces(f"-o {{}} -j {PREFIX}-sample")
    mangle[f"{PREFIX}-sample"] = build.sample()
    filters[f"{PREFIX}-cookies"] = build.on_interfaces(f"-i {{}} -j {PREFIX}-proxy")
    filters[f"{PREFIX}-proxy"] = build.proxy()
    return replace(plan, chains=chains, jumps=(*plan.jumps, *_jumps(build.marks)))


def _jumps(marks: Marks) -> tuple[Jump, ...]:
    opening = f"-m mark --mark {marks.to_queue_known}"
    begun = "-m conntrack --ctstate ESTABLISHED --ctdir ORIGINAL"
    unsaved = f"-m conntrack --ctdir ORIGINAL -m mark ! --mark {marks.none}"
    lost = "-p tcp -m tcp --tcp-flags FIN,RST NONE -m conntrack --ctstate INVALID,UNTRACKED"
    template = "-m conntrack --ctstate NEW"
    return (
        Jump("raw", "OUTPUT", f"{SYN_ACK} {_NO_SOCKET}", f"{PREFIX}-answer"),
        Jump("raw", "OUTPUT", f"{_SYN} {template} {_NO_SOCKET}", f"{PREFIX}-opening"),
        Jump("mangle", "OUTPUT", f"{_SYN} {opening}", f"{PREFIX}-proved", last=True),
        Jump(
            "mangle",
            "OUTPUT",
            f"{_PLAIN_ACK} {begun} -m connmark --mark {marks.established}",
            f"{PREFIX}-joined",
            last=True,
        ),
        Jump("mangle", "POSTROUTING", SYN_ACK, f"{PREFIX}-offers", last=True),
        Jump("mangle", "POSTROUTING", f"-p tcp {unsaved}", f"{PREFIX}-save"),
        Jump("filter", "INPUT", lost, f"{PREFIX}-cookies"),
        Jump("filter", "FORWARD", lost, f"{PREFIX}-cookies"),
    )


@dataclass(frozen=True, slots=True)
class _Build:
    """The budget's rules for one policy and address family."""

    ruleset: RuleSet
    family: int
    known: Known

    @property
    def marks(self) -> Marks:
        return Marks(self.ruleset.marks)

    def on_interfaces(self, rule: str) -> tuple[str, ...]:
        return tuple(rule.format(name) for name in interface_names(self.ruleset))

    def engaged(self) -> str:
        return f"-m set --match-set {engaged_set(self.family)} dst,dst"

    def for_each(self, rule: str, towards: bool = True) -> tuple[str, ...]:
        """Return a rule for each known service, in the direction towards it or from it."""
        way, port = ("-d", "--dport") if towards else ("-s", "--sport")
        return tuple(
            f"{way} {address_text(s.address)} -p tcp -m tcp {port} {s.port} {rule}"
            for s in self.known
        )

    def budget(self) -> tuple[str, ...]:
        """Only SYNs come here.  Who is blocked or trusted goes the usual way."""
        budget = self.ruleset.syn_budget
        assert budget is not None
        rate = min(budget.rate, LARGEST_RATE)
        # A table lives on with its old rate under its name: another rate needs another name.
        table = f"{PREFIX}{self.family}-{rate}"
        over = (
            f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst 1"
            f" --hashlimit-mode dstip,dstport --hashlimit-name {table}"
            f" --hashlimit-rate-match --hashlimit-rate-interval 1 -j {PREFIX}-over"
        )
        rules = self.for_each(over)
        exempt = []
        if self.ruleset.scope.trusted:
            exempt.append("trusted")
        if self.ruleset.blocking != "drop":  # they are answered later, in the filter table
            exempt += ["ban", "shun"]
        names = (set_name(name, self.family) for name in exempt)
        return (*(f"-m set --match-set {name} src -j RETURN" for name in names), *rules)

    def bound(self) -> tuple[str, ...]:
        """The SYNs of a service without cookies that are too many for the queue.

        The engine does not see them; they pass or not as when it is overrun.  So do those that are
        too many for the table.  Where every port is protected a host counts as one service.
        """
        budget = self.ruleset.syn_budget
        assert budget is not None
        rate = min(budget.rate, LARGEST_RATE)
        mode = "dstip" if self.ruleset.scope.ports is None else "dstip,dstport"
        verdict = "RETURN" if self.ruleset.fail_open else "DROP"
        name = f"{PREFIX}{self.family}-queue"
        rule = (
            f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst {rate}"
            f" --hashlimit-mode {mode} --hashlimit-name {name}-{rate}"
            f" {table_size(_BOUND_SECONDS)} -j {verdict}"
        )
        return (f"{gate(f'{name}-all', _BOUND_SECONDS)} -j {verdict}", rule)

    def over(self) -> tuple[str, ...]:
        add = f"-j SET --add-set {engaged_set(self.family)} dst,dst --exist"
        return (f"{add} --timeout {ENGAGED_SECONDS}", "-j CT --notrack")

    def answer(self) -> tuple[str, ...]:
        return self.for_each("-j CT --notrack", towards=False)

    def opening(self) -> tuple[str, ...]:
        return self.for_each(f"-j MARK --set-xmark {self.marks.to_queue_known}")

    def proved(self) -> tuple[str, ...]:
        """SYNPROXY's SYN, which must begin a new connection in the tracker.

        It does not if an earlier SYN of the client's went the usual way and was never answered:
        SYNPROXY cannot take over an entry that it has not made, and client and server would never
        agree on a sequence number.  All that can be done is to tell the client.
        """
        marks = self.marks
        begun = f"-m connmark --mark {marks.guarded}"
        rules = [
            f"{begun} -j NFLOG --nflog-group {LOG_GROUP} --nflog-size {_LOG_BYTES}",
            f"{begun} -j DROP",
            f"-m connmark --mark {marks.unguarded} -j CONNMARK --set-xmark {marks.proven}",
        ]
        if self.ruleset.bans:
            rules.append(f"-j SET --add-set {set_name('proven', self.family)} src --exist")
            rules.append(label(Labels(self.ruleset.labels).confirmed, add=True))
        if self.ruleset.kernel_rule:
            rules.append(f"-j {PREFIX}-returned")
        if {Divert.SYN, Divert.HANDSHAKE} & self.ruleset.diverts:
            rules.append(f"-j {PREFIX}-queue")
        else:
            rules.append(f"-j MARK --set-xmark {marks.none}")
        return tuple(rules)

    def joined(self) -> tuple[str, ...]:
        """SYNPROXY's ACK to the server, which must not wait in the queue.

        It is sent before the tracker is told by how much to shift what follows (nf_ct_seqadj_init);
        sent later, it would be shifted as well.
        """
        return (f"-p tcp -j TCPOPTSTRIP --strip-options {_TIMESTAMP}",)

    def sample(self) -> tuple[str, ...]:
        """One SYN-ACK a second of each service, and one of those that offer a window scale.

        Apart, lest a flood of poor SYNs hide what the server offers others.  A service behind a
        destination translation is not sampled and so never answered for: the connection that
        SYNPROXY opens would not be translated.
        """
        rules = [
            f"-m connmark --mark {self.marks.unguarded} -j RETURN",
            "-m conntrack --ctstate DNAT -j RETURN",
        ]
        budget = self.ruleset.syn_budget
        if budget is not None and budget.ports is not None:
            rules.append(f"-p tcp -m set ! --match-set {set_name('budget-ports')} src -j RETURN")
        for kind, offers in (("rich", "--tcp-option 3"), ("poor", "! --tcp-option 3")):
            rules.append(
                f"-p tcp -m tcp {offers} -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1"
                " --hashlimit-mode srcip,srcport"
                f" --hashlimit-name {PREFIX}-{kind}{self.family}"
                f" -j NFLOG --nflog-group {LOG_GROUP} --nflog-size {_LOG_BYTES}"
            )
        return tuple(rules)

    def proxy(self) -> tuple[str, ...]:
        """What belongs to no connection, is neither FIN nor RST, and goes to an engaged service.

        Of the rest SYNPROXY takes the ACKs that bring a cookie back, and drops the others.
        """
        rules = [f"-p tcp {negated(self.engaged())} -j RETURN"]
        rules += [
            f"-d {address_text(s.address)} -p tcp -m tcp --dport {s.port} -j SYNPROXY {_options(o)}"
            for s, o in self.known.items()
        ]
        return tuple(rules)


def _options(offer: Offer) -> str:
    """Window scale and SACK travel in the time stamp's cookie: without one they cannot be had."""
    options = f"--mss {offer.mss}"
    if offer.timestamps:
        options += " --timestamp"
        options += " --sack-perm" if offer.sack else ""
        options += f" --wscale {offer.scale}" if offer.scale >= 0 else ""
    return options
