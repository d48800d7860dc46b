"""Handshakes that are still open, counted by the kernel for each service.  Pure.

A server holds a place for each SYN until the client's ACK, or until it gives up: 63 seconds with
Linux's five SYN-ACKs (tcp_synack_retries).  When its places are full it forgets SYNs, whoever sent
them, so two forged ones a second suffice.  What a server can hold nobody but itself knows; what a
budget takes if nothing is said, 128, is less than that of nearly every one.

A set of ipset with `maxelem` is an exact count.  In mangle PREROUTING, before the queue, each SYN
adds its source and port, and the ACK that completes the handshake takes them out.  A set that is
full takes nothing: then the SYN is not passed, but answered by a cookie, and for `FULL_SECONDS` so
is each that follows.  A SYN that is on the list already is a repetition, and passes.  One whose
entry in the tracker is older than its place on the list cannot be answered by a cookie any more
(`rstguard.kernel.cookies`), and is dropped where the list is full.

How long the server waits it shows by repeating its SYN-ACK, at the latest after 32 seconds: each
keeps the place for `OPEN_SECONDS` more.  A host that is asked for a connection which it has not
begun answers with a RST.  Whether the server believes one the gateway cannot know: the tracker
takes any that is in the window (tcp_packet in nf_conntrack_proto_tcp.c, TCP_CONNTRACK_CLOSE), the
server only the exact one (tcp_check_req).  So it only shortens the place to `BRIEF_SECONDS`, in
which a server that still waits repeats its SYN-ACK.

The tracker also takes a first ACK that is too low, which no server does; then the SYN-ACK is
repeated, a second later, on a connection that was taken for begun (`rstguard.kernel.ingress`), and
takes a place anew.  More than `LIES` of these a second have the first ACKs of all who come from
that part of the address space only shorten their places, for `LIED_SECONDS`, as further ACKs of
such a connection always do.  What an honest client completes then becomes free with the first data
of its server, which a handshake that is still open cannot send.

A cookie costs a client without time stamps its window scale, so who was proven lately passes
beside, `half_open_dnat.BESIDE` SYNs a second, into a list of the same size: a service meets at most
twice as many.

The SYN that gets a cookie goes on through the rules of others, marked on its entry in the tracker
(`rstguard.kernel.marks`: `bearer`), and is answered behind them, as those of shunned sources are
(`rstguard.kernel.challenge`): what they forbid stays forbidden.  Of services behind DNAT
`rstguard.kernel.half_open_dnat` tells.

While a service is full, places that nobody will need are freed.  A request socket is ended only by
a RST with the number that its SYN-ACK bears, and REJECT takes that from a *repeated* SYN-ACK, of a
server behind this gateway or of this host.  It must be the second repetition, three seconds after
the SYN: a client far away may answer later than the first.  One whose SYN-ACK was lost repeats its
SYN, which begins the count anew, and none of a source proven lately is ended so.

Each service has lists of its own, up to `MOST_OWN` of one address family; the rest share two.  A
listener for both families has one backlog, and who answers at the same port in the other may be the
same: then each has half of the places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NamedTuple

from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import half_open_dnat
from rstguard.kernel.diversion import given_up
from rstguard.kernel.dnat import ADMITTED_SECONDS, MOST_ADMITTED
from rstguard.kernel.filled import SetSpec
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Marks
from rstguard.kernel.matching import SYN_ACK, negated
from rstguard.kernel.names import PREFIX, set_name, short_id
from rstguard.kernel.services import Known, Services, began_to, goes_to
from rstguard.kernel.syn_budget import full_set, has_count, note

OPEN_SECONDS: Final = 33
"""How long a place is kept behind a SYN or SYN-ACK: the last wait of a server is for 32 seconds
(tcp_synack_retries 5: 1+2+4+8+16+32)."""
BRIEF_SECONDS: Final = 4
"""How long it is kept behind what may have ended the handshake: a SYN-ACK is first repeated after
one second, by older systems after three (RFC 6298, 2.1; RFC 1122, 4.2.3.1)."""
FULL_SECONDS: Final = 5
"""How long a service that is full is taken for full before it is tried again: while it is, the
first two repetitions of a SYN-ACK come."""
REPEATED_SECONDS: Final = 10
"""How long a SYN-ACK is remembered: the first two are repeated after one and two more seconds."""
MOST_REPEATED: Final = 65_536
LIES: Final = 8, 16
"""SYN-ACKs a second, and at once, that are repeated on connections that were taken for begun: so
many are ACKs that were lost behind the gateway."""
LIED_SECONDS: Final = 600
"""How long such ACKs are remembered: nobody gains by a second of them in ten minutes."""
_LIED_FROM: Final = {4: 8, 6: 16}
"""By so many bits of the client's address, as one host may have a large network of them.  No bits
would be simpler, but a set takes no address that is nothing but zeroes (ip_set_hash_ip.c)."""
MOST_OWN: Final = 64
"""Services of one address family with lists of their own."""
SYNS: Final = f"{PREFIX}-half"
"""The chain that SYNs come to."""
DONE: Final = f"{PREFIX}-half-done"
"""The chain that the ACKs come to that complete a handshake."""
ANSWERS: Final = f"{PREFIX}-half-answers"
"""The chain of the table filter that servers' SYN-ACKs come to."""
GIVEN_UP: Final = f"{PREFIX}-half-gone"
"""The chain that RSTs come to."""
BRIEFLY: Final = f"{PREFIX}-half-brief"
"""The chain that what may end one comes to."""
HELD: Final = f"{PREFIX}-half-held"
"""The chain that servers' SYN-ACKs come to as they leave the host."""
BEGUN: Final = f"{PREFIX}-half-begun"
"""The chain that the first data of servers comes to."""
_FREE: Final = f"{PREFIX}-half-free"
_OVER: Final = f"{PREFIX}-half-over"
_OVER_DNAT: Final = f"{_OVER}-dnat"
_MOST_BUCKETS: Final = 1024
"""In a larger table `maxelem` is split among parts (ip_set_hash_gen.h: ahash_numof_locks)."""


def sets(ruleset: RuleSet, family: int, known: Known) -> list[SetSpec]:
    """Return the sets of one address family (4 or 6): the lists, and what is full."""
    if not has_count(ruleset):
        return []
    of, services = "inet" if family == 4 else "inet6", Services(ruleset, family, known)
    full = f"family {of} maxelem 65536 timeout {FULL_SECONDS}"
    again = f"family {of} maxelem {MOST_REPEATED} timeout {REPEATED_SECONDS}"
    lists = dict.fromkeys(_lists(services).values())
    passed = f"family {of} maxelem {MOST_ADMITTED} timeout {ADMITTED_SECONDS}"
    sizing = f"hashsize {MOST_ADMITTED // 4} forceadd"
    return [
        SetSpec(full_set(family), "hash:ip,port", full, "hashsize 1024"),
        SetSpec(half_open_dnat.passed_set(family), "hash:ip", passed, sizing),
        _lied(family, of),
        *(
            SetSpec(name, "hash:ip,port,ip", again, f"hashsize {MOST_REPEATED // 4} forceadd")
            for name in _repeated(family)
        ),
        *(
            SetSpec(
                name,
                "hash:ip,port",
                f"family {of} maxelem {each.most} timeout {OPEN_SECONDS}",
                f"hashsize {min(_MOST_BUCKETS, 1 << (each.most - 1).bit_length())}",
            )
            for each in lists
            for name in (each.name, each.beside)
        ),
    ]


def _lied(family: int, of: str) -> SetSpec:
    bits = _LIED_FROM[family]
    options = f"family {of} maxelem 65536 netmask {bits} timeout {LIED_SECONDS}"
    return SetSpec(set_name("lied", family), "hash:ip", options, "hashsize 256 forceadd")


def lying(family: int) -> str:
    """Return the rule for SYN-ACKs that are repeated though the tracker has taken an ACK."""
    rate, burst = LIES
    return (
        f"-m hashlimit --hashlimit-above {rate}/sec --hashlimit-burst {burst}"
        f" --hashlimit-name {PREFIX}{family}-lies"
        f" -j SET --add-set {set_name('lied', family)} dst --exist"
    )


def names(services: Services) -> dict[Service, tuple[str, str, int]]:
    """Return the names of the two lists of each service that is counted; some services share them.

    The first is the one that fills, the second that of sources proven lately, which pass beside;
    the number is how many either holds.
    """
    if not has_count(services.ruleset):
        return {}
    lists = _lists(services)
    return {service: (each.name, each.beside, each.most) for service, each in lists.items()}


def chains(services: Services) -> dict[str, tuple[str, ...]]:
    """Return the chains of the table mangle, none if there is no service to count for.

    SYNs, whose entry is marked as guarded by now, come to `SYNS`; what leaves it with `bearer` on
    its entry is to be answered.  SYN-ACKs come to `HELD`, what may end a handshake to the others.
    """
    lists = _lists(services)
    if not lists:
        return {}
    return {
        SYNS: (
            *(
                f"-m conntrack --ctstatus CONFIRMED -j SET --del-set {name} src,src,dst"
                for name in _repeated(services.family)
            ),
            *(f"{goes_to(service)} -g {each.chain}" for service, each in lists.items()),
        ),
        DONE: (f"{services.in_set('lied')} -g {BRIEFLY}", *_forgetting(lists, "src")),
        BEGUN: (f"{negated(services.in_set('lied', 'dst'))} -j RETURN", *_forgetting(lists, "dst")),
        BRIEFLY: tuple(
            f"{goes_to(service)} {_listed(name, 'src')} {_keep(name, 'src', BRIEF_SECONDS)}"
            for service, each in lists.items()
            for name in (each.name, each.beside)
        ),
        GIVEN_UP: (*given_up(services), f"-j {BRIEFLY}"),
        HELD: tuple(itertools.chain(*(_held(*each) for each in lists.items()))),
        **{each.chain: _counting(services, each) for each in lists.values()},
        _OVER: (
            "-m conntrack --ctstatus CONFIRMED -j DROP",
            f"-j CONNMARK --set-xmark {services.marks.bearer}",
        ),
        _OVER_DNAT: half_open_dnat.over(services),
    }


def _forgetting(lists: Mapping[Service, _Lists], end: str) -> tuple[str, ...]:
    """Take a client off the lists whose handshake is over; `end` as for `_listed`."""
    match = goes_to if end == "src" else began_to
    return tuple(
        f"{match(service)} -j SET --del-set {name} {end},{end}"
        for service, each in lists.items()
        for name in (each.name, each.beside)
    )


def _held(service: Service, lists: _Lists) -> tuple[str, ...]:
    """A SYN-ACK of a service, which waits for an ACK, whatever the tracker believes."""
    beside = _listed(lists.beside, "dst")
    return (
        f"{began_to(service)} {beside} {_keep(lists.beside, 'dst')}",
        f"{began_to(service)} {negated(beside)} {_keep(lists.name, 'dst')}",
    )


def _listed(name: str, end: str) -> str:
    """Match who is on a list; `end` is src for what a client sent, dst for what is sent to it."""
    return f"-m set --match-set {name} {end},{end}"


def _keep(name: str, end: str, seconds: int = OPEN_SECONDS) -> str:
    """Put it there for so many seconds from now."""
    timeout = f" --timeout {seconds}" if seconds != OPEN_SECONDS else ""
    return f"-j SET --add-set {name} {end},{end} --exist{timeout}"


def freeing(services: Services) -> dict[str, tuple[str, ...]]:
    """Return the chains of the table filter that end what a full service waits for in vain."""
    once, again = (f"{name} dst,dst,src" for name in _repeated(services.family))
    full = f"-m set --match-set {full_set(services.family)} src,src"
    note_it = f"-j SET --add-set {once} --exist"
    free = (
        f"{began_to(service)} -j SET --del-set {each.name} dst,dst"
        for service, each in _lists(services).items()
    )
    return {
        ANSWERS: (
            f"{negated(full)} {note_it}",
            f"{negated(full)} -j RETURN",
            f"{services.in_set('proven', 'dst')} -j RETURN",
            f"-m set --match-set {again} -g {_FREE}",
            f"-m set --match-set {once} -j SET --add-set {again} --exist",
            note_it,
        ),
        _FREE: (*free, "-p tcp -j REJECT --reject-with tcp-reset"),
    }


def answering(marks: Marks) -> tuple[Jump, ...]:
    """Return what leads SYN-ACKs of servers there, behind this gateway and of this host."""
    match = f"{SYN_ACK} -m connmark --mark {marks.guarded}"
    return tuple(Jump("filter", hook, match, ANSWERS) for hook in ("FORWARD", "OUTPUT"))


def _repeated(family: int) -> tuple[str, str]:
    """Return the sets of whom a SYN-ACK was sent, and of whom it was repeated."""
    return set_name("once", family), set_name("again", family)


class _Lists(NamedTuple):
    """The two lists of one or more services, the chain that fills them, where more go, how many."""

    name: str
    beside: str
    chain: str
    over: str
    most: int


def _lists(services: Services) -> dict[Service, _Lists]:
    budget, family = services.ruleset.syn_budget, services.family
    if budget is None or budget.half_open is None:
        return {}
    ports, most = budget.ports, budget.half_open
    both = {service.port for service in replace(services, family=10 - family).here}
    here = [s for s in services.untranslated.here if ports is None or s.port in ports]
    behind = half_open_dnat.counted(services).here
    found = {}
    for at, service in enumerate([*here, *behind]):
        rest = "rest-dnat" if service in behind else "rest"
        own = at < MOST_OWN
        shared = own and service.port in both
        # By another name, as a set keeps the size it was made with.
        one = short_id(f"{service} shared" if shared else str(service)) if own else rest
        found[service] = _Lists(
            f"{set_name('half', family)}-{one}",
            f"{set_name('beside', family)}-{one}",
            f"{SYNS}-{one}",
            _OVER_DNAT if service in behind else _OVER,
            most // 2 if shared else most,
        )
    return found


def _counting(services: Services, lists: _Lists) -> tuple[str, ...]:
    family = services.family
    listed, beside = (_listed(name, "src") for name in lists[:2])
    full = f"{full_set(family)} dst,dst"
    return (
        f"{listed} -j RETURN",
        f"{half_open_dnat.beside(services, 'few')} {_keep(lists.beside, 'src')}",
        f"{beside} -j RETURN",
        f"-m set --match-set {full} -g {lists.over}",
        _keep(lists.name, "src"),
        f"{listed} -j RETURN",
        f"-j SET --add-set {full} --exist",
        note(services),
        f"-g {lists.over}",
    )
