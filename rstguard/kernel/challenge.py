"""A shun that challenges: the kernel answers the source's SYNs with SYN cookies.  Pure.

Anybody can send SYNs in another's name, so a source may be shunned that has done nothing.  To drop
its SYNs would keep out the owner of the address; a cookie he returns and is served, while the
forger never sees it.  Who returns cookies is judged by what he then does, which nobody else can
have done.

Only SYNs to services whose offers are known are answered (`rstguard.engine.offers`), those behind
DNAT in another way (`rstguard.kernel.dnat`); all others of the source are dropped, or refused as
the policy's `blocking` says.  A ban, and what is gated, gets no cookie.  The cost is bounded by a
valve for each service: what is above it is dropped.

What the rest of the firewall forbids a source must stay forbidden: the SYN that SYNPROXY opens
leaves by OUTPUT, and no rule of FORWARD or INPUT sees it.  So a SYN is answered behind those rules,
in the table "security", and is tracked until then: most firewalls let in what is NEW.  It is
consumed there, before its entry is confirmed, so none is left.

The sources that were lately given cookies are in the set rstguard-challenged: their ACKs alone are
searched for them, so the connections of others that the tracker does not know go on.
"""

from __future__ import annotations

from rstguard.engine.ruleset import RuleSet
from rstguard.kernel.matching import interface_names
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.services import Services

MOST_A_SECOND = 125_000
"""Cookies a second that shunned sources of one family may have the kernel give for one service."""
CHALLENGED_SECONDS = 60
"""How long after its last cookie a source's ACKs are still searched for cookies."""

_RST = "--tcp-flags RST RST"
_PLAIN_ACK = "--tcp-flags FIN,SYN,RST,ACK ACK"


def in_force(ruleset: RuleSet) -> bool:
    """Tell whether a policy may challenge: one that observes changes nothing."""
    return ruleset.challenge and ruleset.enforce


def challenged(services: Services) -> str:
    """Match what comes from a source that was lately given a cookie."""
    return services.in_set("challenged")


def blocked(services: Services) -> tuple[str, ...]:
    """What blocked sources send: the chain of raw PREROUTING, see `rstguard.kernel.chains`."""
    hit, drops = services.hit, services.ruleset.blocking == "drop"
    no_syn = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN"
    to_challenge = f"-p tcp {hit('shun')} -g {PREFIX}-challenge"
    if drops:
        gate = f"-p tcp {hit('gate')} -j DROP"
        return (no_syn, *services.covered(), f"{hit('ban')} -j DROP", gate, to_challenge)
    # They are refused in the filter table, all but those that are answered.
    refused = tuple(f"-p tcp {hit(name)} -j RETURN" for name in ("ban", "gate"))
    covered = services.covered()
    return (no_syn, *covered, *refused, to_challenge, "-p tcp -j RETURN", f"{hit('ban')} -j DROP")


def challenge(services: Services) -> tuple[str, ...]:
    """The SYNs of shunned sources."""
    direct = services.untranslated.for_each(valve(services.family, f"{PREFIX}-answered"))
    if services.ruleset.blocking == "drop":
        return (*direct, "-j DROP")
    return (*direct, *services.for_each("-j DROP"))


def valve(family: int, to: str) -> str:
    """Return the rule that sends to a chain as many SYNs to a service as may get a cookie."""
    return (
        f"-m hashlimit --hashlimit-upto {MOST_A_SECOND}/sec --hashlimit-burst {MOST_A_SECOND}"
        f" --hashlimit-mode dstip,dstport --hashlimit-name {PREFIX}{family}-challenge -g {to}"
    )


def note(services: Services) -> str:
    """Return the rule that notes a source that is given a cookie."""
    add = f"-j SET --add-set {set_name('challenged', services.family)} src --exist"
    return f"{add} --timeout {CHALLENGED_SECONDS}"


def answered(services: Services) -> tuple[str, ...]:
    """Those that get a cookie, unless a rule of others is against it."""
    return (note(services),)


def begun(services: Services) -> tuple[str, ...]:
    """What comes to the queue's door: the SYNs of shunned sources need no judging."""
    return (f"{services.hit('shun')} -j RETURN",)


def shunned(services: Services) -> tuple[str, ...]:
    """SYNs that all other rules have let pass."""
    names = interface_names(services.ruleset)
    shun = (f"-i {name} {services.hit('shun')} -g {PREFIX}-give" for name in names)
    return (*services.covered(), *shun)


def give(services: Services) -> tuple[str, ...]:
    """A SYN of a connection that has begun is not answered.

    Nor is one that was translated here: see `rstguard.kernel.dnat`.
    """
    direct = services.untranslated
    return (*direct.for_each_offer("-m conntrack --ctstate NEW -j SYNPROXY"), "-j DROP")


def invalid(services: Services) -> tuple[str, ...]:
    """What fits no connection, of a challenged source.

    An ACK may bear a cookie.  A RST answers a cookie that went to an address whose owner has not
    asked for it: it must neither count as a stray nor use up the queue or the server's time.
    """
    by = challenged(services)
    return (
        *services.for_each(f"{_PLAIN_ACK} {by} -j RETURN"),
        *services.for_each(f"{_RST} {by} -j DROP"),
    )


def refused(services: Services, rules: tuple[str, ...]) -> tuple[str, ...]:
    """Return the rules by which blocked sources are refused, but for a SYN that is answered."""
    *before, shunned = rules
    answered = (*services.for_each("-j RETURN"), *services.led.for_each_origin("-j RETURN"))
    return (*before, *answered, shunned)
