"""SYN cookies: the kernel answers SYNs in a server's place, and passes on who returns one.  Pure.

Whose SYNs are answered is decided in PREROUTING: in raw all of a service that has more a second
than its SYN budget says (`rstguard.kernel.syn_budget`), which are kept from the tracker, and those
of shunned sources (`rstguard.kernel.challenge`); in mangle those of a service with too many
handshakes open (`rstguard.kernel.half_open`).  From there the way is nearly one:

- filter INPUT and FORWARD: SYNPROXY answers the first (the others behind all rules there, in the
  table "security"), and takes the ACKs that carry a cookie.
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
- The ACK that brings a cookie back is the first that the tracker sees of its connection: INVALID
  with tcp_loose=0, and NEW where it takes up connections that it has not seen begin.

The window of a cookie is zero, so that no data comes before the server is asked.  If the ACK that
brings it back is lost, a client that has something to say asks again and again whether the window
is open, with segments that bear no cookie any more (`rstguard.engine.segment.cookie_reminder`), and
SYNPROXY drops them: at the second one the client is reminded to send the ACK once more.  It takes
such a segment for the ACK if the cookie then means a larger segment size, and numbers are off by
one for good.  Of IPv6 that shows where it is most likely: a client of 1440 bytes seems to be one of
jumbo frames, whose first SYN to the server is dropped therefore, and he is reminded.  (An IPv4
client of less than 1460, or an IPv6 one of less than 1440, waits in vain as he would behind
SYNPROXY alone.)

Where the tracker takes up connections, a segment of an older one, whose entry was lost, looks like
the ACK of a cookie, and SYNPROXY would drop it.  A cookie comes in a bare ACK; so segments with
data pass beside it, a few a second of each source that was proven lately.  The data of a new
connection that arrives while its server is still asked fits no state of the entry there is: it is
INVALID, and SYNPROXY's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rstguard.engine.offers import JUMBO_MSS
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import challenge, dnat, forgotten, half_open, half_open_dnat, syn_budget
from rstguard.kernel.chains import Plan
from rstguard.kernel.counting import syns
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Labels, Marks
from rstguard.kernel.matching import SYN_ACK, UNTRACKED, interface_names, negated
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.proof import has_payload, label
from rstguard.kernel.services import SYN, Known, Services

LOG_GROUP = 5640
"""NFLOG group of the sampled SYN-ACKs, of the SYNs that came too late for their cookie, and of ACKs
that ask whether a cookie's window is still zero."""
MOST_REMINDED = 200
"""Of those so many a second, so that nobody has the guard answer a flood of them."""
_LOG_BYTES = 160  # IPv6 header, one extension header, TCP header with all options
_ACK_ALONE = "--tcp-flags FIN,SYN,RST,ACK ACK"
_PLAIN_ACK = f"-p tcp -m tcp {_ACK_ALONE}"
_JUMBO = f"-p tcp -m tcpmss --mss {JUMBO_MSS}:65535"
_TIMESTAMP = 8  # TCPOPT_TIMESTAMP
_NO_SOCKET = "-m owner ! --socket-exists"


def wanted(ruleset: RuleSet) -> bool:
    """Tell whether a policy may have cookies given out, for whichever reason."""
    return syn_budget.in_force(ruleset) or challenge.in_force(ruleset)


def with_cookies(plan: Plan, ruleset: RuleSet, family: int, known: Known) -> Plan:
    """Return a policy's plan with what gives out cookies, for services whose offers are known."""
    if not wanted(ruleset):
        return plan
    services = Services(ruleset, family, known)
    build, behind = _Build(services), bool(services.translated.here)
    chains = {table: dict(of_table) for table, of_table in plan.chains.items()}
    raw, mangle, filters = chains["raw"], chains["mangle"], chains["filter"]
    raw[f"{PREFIX}-answer"] = build.answer()
    raw[f"{PREFIX}-opening"] = build.opening()
    mangle[f"{PREFIX}-proved"] = build.proved(admits=f"{PREFIX}-admit" in mangle)
    mangle |= build.remind()
    if ruleset.kernel_rule:
        mangle[f"{PREFIX}-returned"] = syns(ruleset, family, returned=True)
    mangle[f"{PREFIX}-joined"] = build.joined()
    on_interfaces = build.on_interfaces
    mangle[f"{PREFIX}-offers"] = on_interfaces(f"-o {{}} -j {PREFIX}-sample")
    mangle[f"{PREFIX}-sample"] = build.sample()
    mangle[f"{PREFIX}-heard"] += (dnat.heard(services.marks),)
    mangle[f"{PREFIX}-answers-dnat"] = dnat.sample(build.log)
    filters[f"{PREFIX}-cookies"] = on_interfaces(f"-i {{}} -j {PREFIX}-proxy")
    filters[f"{PREFIX}-proxy"] = build.proxy()
    filters |= build.acked()
    if behind:
        mangle[f"{PREFIX}-bearer"] = dnat.bearer(services)
    if syn_budget.in_force(ruleset):
        # An ACK with a cookie belongs to no connection yet, and is no stray.
        searched = f"{_PLAIN_ACK} {syn_budget.engaged(family)} -j RETURN"
        bearing = dnat.searched(services, syn_budget.engaged(family))
        mangle[f"{PREFIX}-invalid"] = (*bearing, searched, *mangle[f"{PREFIX}-invalid"])
    if syn_budget.has_rate(ruleset):
        raw[f"{PREFIX}-raw"] += on_interfaces(f"-i {{}} {SYN} -j {PREFIX}-budget")
        raw[f"{PREFIX}-budget"] = syn_budget.budget(services)
        raw[f"{PREFIX}-over"] = syn_budget.over(services)
        if behind:
            raw[f"{PREFIX}-over-dnat"] = dnat.over(services, syn_budget.note(services))
        before, to_queue = _before_queue(mangle)
        bound = syn_budget.bound(services) if to_queue else ()
        mangle[f"{PREFIX}-syn"] = (f"{UNTRACKED} -j RETURN", *before, *bound, *to_queue)
    counted = half_open.chains(services) if syn_budget.has_count(ruleset) else {}
    jumps = _jumps(services.marks)
    if counted:
        _count(mangle, services)
        mangle |= counted
        filters |= half_open.freeing(services)
        if half_open_dnat.counted(services).here:
            raw[f"{PREFIX}-raw"] += on_interfaces(f"-i {{}} {SYN} -j {PREFIX}-full")
            raw[f"{PREFIX}-full"] = half_open_dnat.answered(services)
            raw[f"{PREFIX}-over"] = syn_budget.over(services)
        jumps += half_open.answering(services.marks)
    if challenge.in_force(ruleset):
        _challenge(chains, services.challengeable)
    if challenge.in_force(ruleset) or counted:
        chains["security"] = build.behind_others(bool(counted))
        jumps += _behind_others(services)
    return replace(plan, chains=chains, jumps=(*plan.jumps, *jumps))


def _challenge(chains: dict[str, dict[str, tuple[str, ...]]], services: Services) -> None:
    raw, mangle, filters = chains["raw"], chains["mangle"], chains["filter"]
    raw[f"{PREFIX}-blocked"] = challenge.blocked(services)
    raw[f"{PREFIX}-challenge"] = (*dnat.challenge(services), *challenge.challenge(services))
    raw[f"{PREFIX}-answered"] = challenge.answered(services)
    mangle[f"{PREFIX}-syn"] = (*challenge.begun(services), *mangle[f"{PREFIX}-syn"])
    bearing = dnat.searched(services, challenge.challenged(services))
    strays = (*bearing, *challenge.invalid(services))
    mangle[f"{PREFIX}-invalid"] = (*strays, *mangle[f"{PREFIX}-invalid"])
    if (refused := filters.get(f"{PREFIX}-refused")) is not None:
        filters[f"{PREFIX}-refused"] = challenge.refused(services, refused)
    if services.led.here:
        raw[f"{PREFIX}-untracked"] = dnat.untracked(services)


def _before_queue(mangle: dict[str, tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the rules that SYNs meet, and the last of them if it leads to the queue."""
    rules = mangle[f"{PREFIX}-syn"]
    if rules[-1] in (f"-j {PREFIX}-syns", f"-j {PREFIX}-count"):
        return rules[:-1], rules[-1:]
    return rules, ()


def _count(mangle: dict[str, tuple[str, ...]], services: Services) -> None:
    """Lead what begins and ends a handshake to the count of those that are open."""
    marks = services.marks
    before, to_queue = _before_queue(mangle)
    answered = (f"-m connmark --mark {m} -j RETURN" for m in (marks.bearer, marks.awaiting))
    mangle[f"{PREFIX}-syn"] = (*before, f"-j {half_open.SYNS}", *answered, *to_queue)
    begins = f"-m connmark --mark {marks.guarded}"
    proven = f"{begins} -j CONNMARK --set-xmark {marks.proven}"
    first = mangle[f"{PREFIX}-first"]
    at = first.index(proven)
    reused = label(Labels(services.ruleset.labels).reused)
    ends = (
        f"{begins} {reused} -j {half_open.BRIEFLY}",
        f"{begins} {reused.replace('--label', '! --label')} -j {half_open.DONE}",
    )
    mangle[f"{PREFIX}-first"] = (*first[:at], *ends, *first[at:])
    syn, *others = mangle[f"{PREFIX}-classify"]
    gone = f"-p tcp -m tcp --tcp-flags RST RST {begins} -j {half_open.GIVEN_UP}"
    mangle[f"{PREFIX}-classify"] = (syn, gone, *others)
    no_answer, *others = mangle[f"{PREFIX}-sample"]
    mangle[f"{PREFIX}-sample"] = (no_answer, f"{begins} -j {half_open.HELD}", *others)
    mangle[f"{PREFIX}-anew"] += (half_open.lying(services.family),)
    mangle[f"{PREFIX}-confirm"] += (f"-j {half_open.BEGUN}",)


def _behind_others(services: Services) -> tuple[Jump, ...]:
    last = [Jump("security", hook, SYN, f"{PREFIX}-last") for hook in ("INPUT", "FORWARD")]
    return (*last, *((dnat.admitting(services.marks),) if _admits(services) else ()))


def _admits(services: Services) -> bool:
    """Tell whether what SYNPROXY opens is looked at."""
    challenges = challenge.in_force(services.ruleset) and services.challengeable.led.here
    return bool(challenges or half_open_dnat.counted(services).here)


def _jumps(marks: Marks) -> tuple[Jump, ...]:
    opening = f"-m mark --mark {marks.to_queue_known}"
    begun = "-m conntrack --ctstate ESTABLISHED --ctdir ORIGINAL"
    unsaved = f"{SYN} -m mark ! --mark {marks.none} -m connmark --mark {marks.established}"
    lost = "-p tcp -m tcp --tcp-flags FIN,RST NONE -m conntrack --ctstate INVALID,UNTRACKED"
    taken_up = f"{_PLAIN_ACK} -m conntrack --ctstate NEW"
    template = "-m conntrack --ctstate NEW"
    return (
        Jump("raw", "OUTPUT", f"{SYN_ACK} {_NO_SOCKET}", f"{PREFIX}-answer"),
        Jump("raw", "OUTPUT", f"{SYN} {template} {_NO_SOCKET}", f"{PREFIX}-opening"),
        Jump("mangle", "OUTPUT", f"{SYN} {opening} {_NO_SOCKET}", f"{PREFIX}-proved", last=True),
        Jump(
            "mangle",
            "OUTPUT",
            f"{_PLAIN_ACK} {begun} -m connmark --mark {marks.established}",
            f"{PREFIX}-joined",
            last=True,
        ),
        Jump("mangle", "POSTROUTING", SYN_ACK, f"{PREFIX}-offers", last=True),
        Jump("mangle", "POSTROUTING", unsaved, f"{PREFIX}-save"),
        *(
            Jump("filter", hook, match, f"{PREFIX}-cookies")
            for hook in ("INPUT", "FORWARD")
            for match in (lost, taken_up)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Build:
    """The rules of that way, for one policy and address family."""

    services: Services

    @property
    def ruleset(self) -> RuleSet:
        return self.services.ruleset

    @property
    def family(self) -> int:
        return self.services.family

    @property
    def marks(self) -> Marks:
        return self.services.marks

    def on_interfaces(self, rule: str) -> tuple[str, ...]:
        return tuple(rule.format(name) for name in interface_names(self.ruleset))

    def behind_others(self, counted: bool) -> dict[str, tuple[str, ...]]:
        """The table "security": SYNs that all other rules have let pass, and that get a cookie."""
        services, challenges = self.services, challenge.in_force(self.ruleset)
        # Others may write that into any connection's mark.
        full = f"-m connmark --mark {self.marks.bearer} {syn_budget.engaged(self.family)}"
        shunned = challenge.shunned(services) if challenges else ()
        able = services.challengeable
        too_many = (f"{full} -g {PREFIX}-give", *half_open_dnat.last(services)) if counted else ()
        found = {
            f"{PREFIX}-last": (*too_many, *shunned),
            f"{PREFIX}-give": (*(dnat.give(able) if challenges else ()), *challenge.give(able)),
        }
        if half_open_dnat.counted(services).here:
            found[f"{PREFIX}-passed"] = half_open_dnat.passed(services)
        if _admits(services):
            of_shunned = dnat.admit(able) if challenges else ()
            found[f"{PREFIX}-admit"] = (*of_shunned, *half_open_dnat.admit(services))
        return found

    def answer(self) -> tuple[str, ...]:
        return self.services.for_each("-j CT --notrack", towards=False)

    def opening(self) -> tuple[str, ...]:
        return self.services.for_each(f"-j MARK --set-xmark {self.marks.to_queue_known}")

    def proved(self, admits: bool) -> tuple[str, ...]:
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
            *self.mistaken(),
            f"-m connmark --mark {marks.unguarded} -j CONNMARK --set-xmark {marks.proven}",
        ]
        if admits:  # here it is counted; who is refused is told by who hears of it
            rules.append(f"-j {PREFIX}-admit")
            rules.append(f"-m connmark ! --mark {marks.uncondemned} -j DROP")
        rules.append(f"-j SET --add-set {set_name('proven', self.family)} src --exist")
        rules.append(label(Labels(self.ruleset.labels).confirmed, add=True))
        if self.ruleset.kernel_rule:
            rules.append(f"-j {PREFIX}-returned")
        if {Divert.SYN, Divert.HANDSHAKE} & self.ruleset.diverts:
            rules.append(f"-j {PREFIX}-queue")
        else:
            rules.append(f"-j MARK --set-xmark {marks.none}")
        return tuple(rules)

    def mistaken(self) -> tuple[str, ...]:
        """Lead SYNPROXY's SYN of a client that seems to have jumbo frames aside, once."""
        if self.family == 4:
            return ()
        known = f"-m set --match-set {set_name('reminded', self.family)} src,src"
        return (f"{_JUMBO} {negated(known)} -g {PREFIX}-mistaken",)

    def remind(self) -> dict[str, tuple[str, ...]]:
        """What is led aside there."""
        if self.family == 4:
            return {}
        rules = (
            f"-j SET --add-set {set_name('reminded', self.family)} src,src --exist",
            f"-j NFLOG --nflog-group {LOG_GROUP} --nflog-size {_LOG_BYTES}",
            "-j DROP",
        )
        return {f"{PREFIX}-mistaken": rules}

    def joined(self) -> tuple[str, ...]:
        """SYNPROXY's ACK to the server, which must not wait in the queue.

        It is sent before the tracker is told by how much to shift what follows (nf_ct_seqadj_init);
        sent later, it would be shifted as well.
        """
        return (f"-p tcp -j TCPOPTSTRIP --strip-options {_TIMESTAMP}",)

    def sample(self) -> tuple[str, ...]:
        """One SYN-ACK a second of each service, and one of those that offer a window scale.

        Those of a service behind DNAT bear another address here: see `rstguard.kernel.dnat`.
        SYN-ACKs of no connection, which connmark does not match, are not sampled: SYNPROXY's own
        would confirm what is believed already.
        """
        rules = [
            "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
            f"-m connmark --mark {self.marks.unguarded} -j RETURN",
            "-m conntrack --ctstate DNAT -j RETURN",
        ]
        budget = self.ruleset.syn_budget
        if not self.ruleset.challenge and budget is not None and budget.ports is not None:
            rules.append(f"-p tcp -m set ! --match-set {set_name('budget-ports')} src -j RETURN")
        return (*rules, *self.log("", LOG_GROUP))

    def log(self, of: str, group: int) -> tuple[str, ...]:
        """Rich and poor SYN-ACKs apart, lest a flood of poor SYNs hide what is offered to others.

        Up to one of each a second and service; `of` names the counts.
        """
        return tuple(
            f"-p tcp -m tcp {offers} -m hashlimit --hashlimit-upto 1/sec --hashlimit-burst 1"
            " --hashlimit-mode srcip,srcport"
            f" --hashlimit-name {PREFIX}-{of}{kind}{self.family}"
            f" -j NFLOG --nflog-group {group} --nflog-size {_LOG_BYTES}"
            for kind, offers in (("rich", "--tcp-option 3"), ("poor", "! --tcp-option 3"))
        )

    def proxy(self) -> tuple[str, ...]:
        """What belongs to no connection, is neither FIN nor RST, and may have to do with cookies.

        It goes to an engaged service, or comes from a challenged source.  Of it SYNPROXY takes the
        former's SYNs and the ACKs that bring a cookie back, and drops the others.
        """
        engaged = ""
        if syn_budget.in_force(self.ruleset):
            engaged = f" {negated(syn_budget.engaged(self.family))}"
        if challenge.in_force(self.ruleset):
            challenged = f" {negated(challenge.challenged(self.services))}"
            rules = [f"{SYN}{engaged} -j RETURN", f"-p tcp{engaged}{challenged} -j RETURN"]
        else:
            rules = [f"-p tcp{engaged} -j RETURN"]
        older = (
            f"{_PLAIN_ACK} -m conntrack --ctstate NEW {self.services.in_set('proven')}"
            f" {has_payload(self.family)} {forgotten.few(self.family, 'beside')} -j RETURN"
        )
        trusted = self.services.unless_trusted()  # they are given none
        if challenge.in_force(self.ruleset):
            rules = [*dnat.proxy(self.services), *rules]
        acked = self.services.for_each(f"{_ACK_ALONE} -j {PREFIX}-acked")
        proxied = self.services.for_each_offer("-j SYNPROXY")
        return (*trusted, *rules, older, *(acked if self.family == 4 else ()), *proxied)

    def acked(self) -> dict[str, tuple[str, ...]]:
        """The second ACK that comes without a connection: the first was none of a cookie."""
        if self.family == 6:
            return {}
        acked = f"{set_name('acked', self.family)} src,src"
        few = (
            f"-m hashlimit --hashlimit-upto {MOST_REMINDED}/sec --hashlimit-burst {MOST_REMINDED}"
            f" --hashlimit-name {PREFIX}{self.family}-reminded"
        )
        told = f"-j NFLOG --nflog-group {LOG_GROUP} --nflog-size {_LOG_BYTES}"
        rules = (
            f"-m set --match-set {acked} {few} {told}",
            f"-j SET --add-set {acked} --exist",
        )
        return {f"{PREFIX}-acked": rules}
