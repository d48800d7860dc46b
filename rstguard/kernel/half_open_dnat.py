"""Open handshakes of services behind DNAT: counted like others', answered in another place.  Pure.

They are counted by `rstguard.kernel.half_open`, in PREROUTING, where the service's own address is
still there.  What is too many cannot be answered behind the rules of others, as a cookie holds for
addresses that nobody has translated (`rstguard.kernel.dnat`); answered in front of them, it would
open a way around what they forbid.  So it takes two SYNs:

- *The first* of a source goes through all rules and is dropped behind them, in the table
  "security".  Two sets note whose it was, and to which server it would have come; a third that
  this server is full, which its places are freed by.
- *The next*, which a client sends a second later, is answered in raw, and so are all of the source
  for `ADMITTED_SECONDS`.  What SYNPROXY then opens must be in the second set.

Sources proven lately pass beside, and one SYN in two seconds, which shows where the service is.
Only services that lead to one server are counted, and only where the SYN budget has no rate: that
one is answered in raw for every source.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from rstguard.kernel import dnat, syn_budget
from rstguard.kernel.counting import up_to
from rstguard.kernel.matching import negated
from rstguard.kernel.names import PREFIX, set_name
from rstguard.kernel.services import Services

BESIDE: Final = 4
"""SYNs a second of a source proven lately that pass beside cookies."""


def counted(services: Services) -> Services:
    """Return those of the services that are counted here."""
    budget, ruleset = services.ruleset.syn_budget, services.ruleset
    if budget is None or not syn_budget.has_count(ruleset) or syn_budget.has_rate(ruleset):
        return replace(services, known={})
    ports, led = budget.ports, services.led.here
    return replace(
        services, known={s: o for s, o in led.items() if ports is None or s.port in ports}
    )


def passed_set(family: int) -> str:
    """Return the name of the set of sources whose SYN no rule was against."""
    return set_name("passed", family)


def beside(services: Services, of: str) -> str:
    """Match the SYNs that pass beside cookies; `of` names the count."""
    length = services.ruleset.source_ipv6
    few = up_to(services.family, of, (BESIDE, BESIDE), ipv6_length=length)
    return f"{services.in_set('proven')} {few}"


def answered(services: Services) -> tuple[str, ...]:
    """SYNs in raw PREROUTING: of services that are full those of sources that may have a cookie."""
    full = f"-m set --match-set {syn_budget.full_set(services.family)} dst,dst"
    passed = f"-m set --match-set {passed_set(services.family)} src"
    return (
        *syn_budget.exempt(services),
        f"{negated(full)} -j RETURN",
        f"{beside(services, 'few-raw')} -j RETURN",
        *counted(services).for_each(f"{passed} -g {PREFIX}-over"),
    )


def over(services: Services) -> tuple[str, ...]:
    """What is too many, in mangle PREROUTING."""
    return (
        "-m conntrack --ctstatus CONFIRMED -j DROP",
        f"{dnat.ask(services.family)} -j RETURN",
        f"-j CONNMARK --set-xmark {services.marks.awaiting}",
    )


def last(services: Services) -> tuple[str, ...]:
    """The same in the table "security", if no rule was against it."""
    awaiting = f"-m connmark --mark {services.marks.awaiting}"
    return counted(services).for_each_origin(f"{awaiting} -g {PREFIX}-passed")


def passed(services: Services) -> tuple[str, ...]:
    """The chain that it comes to there."""
    return (
        f"-j SET --add-set {passed_set(services.family)} src --exist",
        f"-j SET --add-set {syn_budget.full_set(services.family)} dst,dst --exist",
        f"-j SET --add-set {dnat.admitted_set(services.family)} src,dst,dst --exist",
        "-j DROP",
    )


def admit(services: Services) -> tuple[str, ...]:
    """SYNPROXY's SYN, translated: no rule must have been against the client's."""
    admitted = f"-m set --match-set {dnat.admitted_set(services.family)} src,dst,dst"
    return counted(services).for_each_origin(f"{negated(admitted)} -j DROP")
