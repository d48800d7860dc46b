"""Services of which only one side is seen: what does and does not come by, noted by rules.  Pure.

Where a server's answers take another way (direct server return, asymmetric routes), the tracker
never sees a SYN-ACK: clients' ACKs and data are INVALID to it, and nothing tells them from strays
but that their service was asked by a SYN and has not answered.

==========================  =====================================================================
set (4 and 6: per family)   holds services, by address and port as clients know them, that
==========================  =====================================================================
rstguard-asked4, -asked6    a SYN came for in the last minute, or a segment that is noted below,
                            while they had not answered; a refusal takes them out
rstguard-answers4, -6       were seen to answer a SYN in the last minute; translated ones, whose
                            answers bear another address, whose handshake was completed in 5 days
rstguard-oneway4, -oneway6  were asked and did not answer, and whose clients went on all the same
                            in the last ten seconds
==========================  =====================================================================

A forger can send SYNs and ACKs, but not keep a service's SYN-ACKs from passing: one of them in a
minute, to anybody, and the service is two-sided.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rstguard.engine.address import parse_address
from rstguard.engine.service import Service
from rstguard.kernel import NotThere
from rstguard.kernel.command import Commands
from rstguard.kernel.counters import hits
from rstguard.kernel.elements import ipset
from rstguard.kernel.matching import SYN_ACK, Matching, negated
from rstguard.kernel.names import PREFIX, set_name

MOST: Final = 65_536
"""Services of each set and family; of more, any one makes room."""
ANSWERED_SECONDS: Final = 60
"""How long after its last SYN-ACK a service is surely two-sided.  A Linux server repeats those of
half-open connections after 1, 3, 7, 15 and 31 seconds (tcp_synack_retries)."""
ONEWAY_SECONDS: Final = 10
_TRANSLATED_SECONDS: Final = 432_000
_GOES_ON: Final = (
    "-p tcp -m tcp --tcp-flags SYN,RST,ACK ACK",
    "-p tcp -m tcp --tcp-flags FIN,SYN,RST RST",
)
"""What a client sends that believes in its connection, in combinations that are possible."""

ASKED: Final = "asked"
ANSWERS: Final = "answers"
ONEWAY: Final = "oneway"
SECONDS: Final = {ASKED: ANSWERED_SECONDS, ANSWERS: ANSWERED_SECONDS, ONEWAY: ONEWAY_SECONDS}


def _add(matching: Matching, name: str, way: str) -> str:
    return f"-j SET --add-set {set_name(name, matching.family)} {way},{way} --exist"


def asked(matching: Matching) -> list[str]:
    """Return the rule for the SYNs of guarded connections."""
    unanswered = negated(matching.in_set(ANSWERS, "dst,dst"))
    return [f"{unanswered} {_add(matching, ASKED, 'dst')}"]


def answered(matching: Matching) -> tuple[str, ...]:
    """Return the rules for SYN-ACKs of guarded connections.

    What came between its SYN and this one, perhaps on purpose, has said nothing.
    """
    forget = f"-j SET --del-set {set_name(ONEWAY, matching.family)} src,src"
    return (_add(matching, ANSWERS, "src"), forget)


def refused(matching: Matching) -> str:
    """Return the rule for RSTs of servers: who refuses is heard here, and strays are strays."""
    return (
        "-p tcp -m tcp --tcp-flags RST RST -m conntrack --ctdir REPLY"
        f" -m connmark --mark {matching.marks.guarded}"
        f" -j SET --del-set {set_name(ASKED, matching.family)} src,src"
    )


def translated(matching: Matching, first: str) -> list[str]:
    """Return the rule for the first ACK of a connection, which `first` matches.

    Its SYN-ACK bore the address that the service was translated to.
    """
    add = f"{_add(matching, ANSWERS, 'dst')} --timeout {_TRANSLATED_SECONDS}"
    return [f"{first} -m conntrack --ctstate DNAT {add}"]


def strays(matching: Matching) -> list[str]:
    """Return the rules for what fits no connection: that of a one-sided service is no stray."""
    match = f"{matching.in_set(ASKED, 'dst,dst')} {negated(matching.in_set(ANSWERS, 'dst,dst'))}"
    return [f"{flags} {match} -g {PREFIX}-oneway" for flags in _GOES_ON]


def noted(matching: Matching) -> tuple[str, ...]:
    """Return the chain for it: it passes, and is counted for no rule."""
    return (_add(matching, ONEWAY, "dst"), _add(matching, ASKED, "dst"))


def noted_so_far(printed: Iterable[str]) -> int:
    """Return how many packets the rules of that chain have counted, by ``iptables-save -c``."""
    there = (hit for text in printed for hit in hits(text))
    return sum(hit.packets for hit in there if hit.chain == f"{PREFIX}-oneway")


def answer(matching: Matching) -> str:
    """Return the rule that finds the SYN-ACKs of guarded connections."""
    guarded = f"-m connmark ! --mark {matching.marks.unguarded}"
    return f"{SYN_ACK} -m conntrack --ctdir REPLY {guarded} -j {PREFIX}-heard"


def services(kernel: Commands, name: str = ONEWAY) -> list[Service]:
    """Return the services that one of the sets holds; none if there is no guard here.

    Raises:
        KernelError: the sets may not be read.
    """
    found = []
    for family in (4, 6):
        try:
            lines = ipset(kernel, "save", set_name(name, family)).splitlines()
        except NotThere:
            continue
        for line in lines:
            words = line.split()
            if words[0] == "add":
                address, _, port = words[2].partition(",tcp:")
                found.append(Service(parse_address(address), int(port)))
    return sorted(found)
