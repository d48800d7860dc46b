"""SYN cookies for services behind DNAT, whoever translates and however.  Pure.

A cookie holds for the addresses of the segment that it answers, and the tracker's first look at the
connection is at the ACK that brings it back.  So SYN and ACK must come to SYNPROXY untranslated,
and the SYN by which it opens the connection must be translated as the client's would have been;
the tracker then does the rest.  Three things are needed beside `rstguard.kernel.cookies`:

- *The SYN* is kept from the tracker, and so is not translated.
- *The ACK* fits no connection.  With tcp_loose=0 it is INVALID, which nobody translates.  With 1 it
  is NEW: in mangle PREROUTING its entry is given the mark `Marks.bearer`, and a chain of our own
  (nf_tables, type nat), in front of everybody else's, translates it to what it is.  SYNPROXY
  consumes it, and the entry is gone.
- *SYNPROXY's SYN* goes through OUTPUT, where other programs' rules for PREROUTING are not asked.  A
  chain of our own there translates it to where the service's connections were seen to go
  (`rstguard.engine.targets`).

That is learned from the SYN-ACKs of connections that SYNPROXY has not opened: they are caught where
they still bear the server's address, and the tracker tells what the client had addressed.  So that
it stays known while a service is over budget, one SYN in `ASK_SECONDS` goes the usual way; where
no such connection is answered any more the service is soon taken for unknown.

What the rest of the firewall forbids a source must stay forbidden (`rstguard.kernel.challenge`),
but here a SYN cannot be answered behind it.  So of a shunned source's SYNs one in `ADMIT_SECONDS`
goes the usual way, up to the end of all rules, and is dropped there: the set rstguard-admitted
notes which server it would have come to.  All others are answered at once.  What SYNPROXY then
opens must be in that set: else the rules are against it, or lead elsewhere by now, and it is
dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from rstguard.engine.address import is_v6
from rstguard.engine.offers import Offer
from rstguard.engine.service import Service
from rstguard.kernel import KernelError, forgotten, tables
from rstguard.kernel.challenge import challenged, note, valve
from rstguard.kernel.jumps import Jump
from rstguard.kernel.marks import Marks
from rstguard.kernel.matching import UNTRACKED, negated
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.nftables import (
    MARK_OF_CONNECTION,
    Chain,
    Rule,
    goes_to,
    is_exactly,
    is_of,
    leave,
    one_in,
    send_to,
)
from rstguard.kernel.proof import has_payload
from rstguard.kernel.seam import Kernel
from rstguard.kernel.services import SYN, Known, Services

log = logging.getLogger(__name__)

LOG_GROUP: Final = 5641
"""NFLOG group of the sampled SYN-ACKs, with the server's address and port."""
ASK_SECONDS: Final = 2
"""A service over budget is asked so often where it is."""
LAPSE_SECONDS: Final = 8
"""A service over budget that has not answered for so long is unknown."""
ADMIT_SECONDS: Final = 2
"""A shunned source's SYN goes the usual way so often: its client repeats it after one second."""
ADMITTED_SECONDS: Final = 10
MOST_ADMITTED: Final = 262_144
TABLE: Final = f"{PREFIX}-dnat"
"""The nf_tables table of the two chains that translate."""
_BEFORE_OTHERS: Final = -101  # NF_IP_PRI_NAT_DST - 1
_PRE_ROUTING, _LOCAL_OUT = 0, 3  # linux/netfilter.h, enum nf_inet_hooks
_EXACT: Final = "--tcp-flags FIN,SYN,RST,ACK"


def heard(marks: Marks) -> str:
    """Return the rule for SYN-ACKs of servers: of connections that SYNPROXY has not opened."""
    translated = "-m conntrack --ctstate DNAT"
    return f"-m connmark --mark {marks.guarded} {translated} -j {PREFIX}-answers-dnat"


def sample(log: Callable[[str, int], tuple[str, ...]]) -> tuple[str, ...]:
    """Return the chain that they come to; `log` makes the rules that sample them."""
    return (
        "-m conntrack ! --ctstate ESTABLISHED -j RETURN",
        *log("dnat-", LOG_GROUP),
    )


def over(services: Services, add: str) -> tuple[str, ...]:
    """SYNs above the budget; `add` notes that their service is over it."""
    return (add, f"{ask(services.family)} -j RETURN", "-j CT --notrack")


def ask(family: int) -> str:
    """Match one SYN in `ASK_SECONDS` to each service."""
    return _one_in(family, "ask", ASK_SECONDS, "dstip,dstport")


def challenge(services: Services) -> tuple[str, ...]:
    """SYNs of shunned sources, in raw PREROUTING."""
    admit = _one_in(services.family, "admit", ADMIT_SECONDS, "srcip,dstip,dstport")
    led, answered = services.led, valve(services.family, f"{PREFIX}-untracked")
    return (*led.for_each(f"{admit} -j RETURN"), *led.for_each(answered))


def untracked(services: Services) -> tuple[str, ...]:
    """Those of them that get a cookie."""
    return (note(services), "-j CT --notrack")


def _one_in(family: int, name: str, seconds: int, mode: str) -> str:
    a_minute = 60 // seconds
    return (
        f"-m hashlimit --hashlimit-upto {a_minute}/min --hashlimit-burst 1"
        f" --hashlimit-mode {mode} --hashlimit-name {PREFIX}{family}-{name}"
    )


def give(services: Services) -> tuple[str, ...]:
    """The SYN of a shunned source that no rule was against, in the table "security"."""
    new = "-m conntrack --ctstate NEW -m conntrack --ctstate DNAT"
    add = f"-j SET --add-set {admitted_set(services.family)} src,dst,dst --exist"
    return (f"{new} {add}", f"{new} -j DROP") if services.led.here else ()


def admit(services: Services) -> tuple[str, ...]:
    """SYNPROXY's SYN, translated: of a challenged source it must be one that was admitted."""
    admitted = f"-m set --match-set {admitted_set(services.family)} src,dst,dst"
    refused = f"{challenged(services)} {negated(admitted)} -j DROP"
    return services.led.for_each_origin(refused)


def admitting(marks: Marks) -> Jump:
    """Return what leads SYNPROXY's SYNs there."""
    opened = f"-m connmark --mark {marks.established}"
    return Jump("security", "OUTPUT", f"{SYN} {opened}", f"{PREFIX}-admit")


def admitted_set(family: int) -> str:
    """Return the name of the set of clients, and the servers that their SYNs would have reached."""
    return set_name("admitted", family)


def searched(services: Services, of: str) -> tuple[str, ...]:
    """ACKs that may bear a cookie, in mangle PREROUTING; `of` says to or from whom."""
    bears = f"{_EXACT} ACK -m conntrack --ctstate NEW {of} -g {PREFIX}-bearer"
    return services.translated.for_each(bears)


def bearer(services: Services) -> tuple[str, ...]:
    """Such an ACK, taken up by the tracker.  A segment with data may be of an older connection."""
    beside = forgotten.few(services.family, "beside")
    older = f"{services.in_set('proven')} {has_payload(services.family)} {beside}"
    return (f"{older} -j RETURN", f"-j CONNMARK --set-xmark {services.marks.bearer}")


def proxy(services: Services) -> tuple[str, ...]:
    """SYNs that `untracked` has let past, in the filter table."""
    syn = f"{_EXACT} SYN {UNTRACKED} {challenged(services)} -j SYNPROXY"
    return services.led.for_each_offer(syn)


def chains(marks: Marks, known: Known) -> tuple[Chain, ...]:
    """Return the chains of nf_tables for services behind DNAT, of both families."""
    bearer = is_exactly(MARK_OF_CONNECTION, marks.bearer)
    stays = tuple(
        Rule(f"{name}: it may bring a cookie back", is_of(v6) + bearer + leave(v6))
        for name, v6 in (("IPv4", False), ("IPv6", True))
    )
    opened = is_exactly(MARK_OF_CONNECTION, marks.established)
    leads = tuple(
        Rule(
            f"{service} is {target}" + (f", one in {left}" if left > 1 else ""),
            is_of(is_v6(service.address))
            + opened
            + goes_to(service)
            + (one_in(left) if left > 1 else b"")
            + send_to(target),
        )
        for service, offer in known.items()
        for left, target in zip(range(len(offer.to), 0, -1), offer.to, strict=True)
    )
    return (
        Chain("prerouting", _PRE_ROUTING, _BEFORE_OTHERS, "nat", stays),
        Chain("output", _LOCAL_OUT, _BEFORE_OTHERS, "nat", leads),
    )


class Translation:
    """The table that translates, in one namespace: it is made when it is first needed.

    From then on it stays until `remove`, perhaps empty: with a hook goes what waits in a queue.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._made = False
        self.problem = ""
        """Why services behind DNAT get no cookies, or ""."""

    def apply(self, marks: Marks, known: dict[Service, Offer]) -> None:
        """Have connections of known services translated; `problem` says if it cannot be had."""
        if not self._made and not any(offer.to for offer in known.values()):
            return
        try:
            tables.keep(self._kernel, TABLE, chains(marks, known))
            self._made, self.problem = True, ""
        except KernelError as error:
            if not self.problem:
                log.warning("services behind DNAT get no SYN cookies: %s", error)
            self.problem = str(error)

    def usable(self, known: dict[Service, Offer]) -> dict[Service, Offer]:
        """Return the services that can be answered for."""
        if not self.problem:
            return known
        return {service: offer for service, offer in known.items() if not offer.to}

    def missing(self, marks: Marks, known: Known) -> list[str]:
        """Return what of the table is not in the kernel, in words; empty if all is well.

        Raises:
            KernelError: the kernel could not be asked.
        """
        if not self._made:
            return []
        return tables.missing(self._kernel, TABLE, chains(marks, known))

    def remove(self) -> bool:
        """Take the table away, whoever left it; tell whether it was there.

        Raises:
            KernelError: the kernel refused.
        """
        self._made = False
        return self._kernel.remove_table(TABLE)
