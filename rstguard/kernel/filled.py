"""One set as it should be, and the sets that the chains fill with what they learn.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rstguard.engine.admission import admitting
from rstguard.engine.ruleset import Divert, RuleSet
from rstguard.kernel import admission, challenge, dnat, forgotten, ingress, oneway, syn_budget
from rstguard.kernel.names import set_name

MOST: Final = 1_048_576
"""Sources that a set holds."""
# A set that rules fill cannot grow: only an addition from user space makes the kernel rehash
# (mtype_add in ip_set_hash_gen.h; tried on 6.18: hashsize 64 stopped at 64 x 12 elements).  One
# MiB of empty buckets holds a million sources with 12 places each.
FIXED: Final = "hashsize 131072"
_ACKED_SECONDS: Final = 10
_MOST_ACKED: Final = 65_536
"""How long it is remembered who sent an ACK that may bear a cookie, or was reminded to, and of how
many (`rstguard.kernel.cookies`)."""


@dataclass(frozen=True, slots=True)
class SetSpec:
    """One set as it should be.

    `options` are those of `ipset create` in which a present set must agree, `sizing` those in
    which it need not.  `members` are exactly what it should hold, as `ipset add` takes them;
    None if what it holds now is to be kept.
    """

    name: str
    type: str
    options: str
    sizing: str = ""
    members: tuple[str, ...] | None = None


def learned(digit: int, family: str, ruleset: RuleSet) -> list[SetSpec]:
    """Return the sets of one address family: `digit` is 4 or 6, `family` what ipset calls it."""
    specs = [*_forgotten(digit, family, ruleset), *_oneway(digit, family)]
    specs += _counting(digit, family, ruleset)
    if challenge.in_force(ruleset) or syn_budget.has_count(ruleset):
        specs.append(_admitted(digit, family))
    if challenge.in_force(ruleset) or syn_budget.in_force(ruleset):
        options = f"family {family} maxelem {_MOST_ACKED} timeout {_ACKED_SECONDS}"
        sizing = f"hashsize {_MOST_ACKED // 4} forceadd"
        name = set_name("acked" if digit == 4 else "reminded", digit)
        specs.append(SetSpec(name, "hash:ip,port", options, sizing))
    return [*specs, *_inside(digit, family)] if ruleset.enforce else specs


def _counting(digit: int, family: str, ruleset: RuleSet) -> list[SetSpec]:
    """Return the sets of `rstguard.kernel.admission`."""
    rules = admitting(ruleset)
    if not rules:
        return []
    listened = f"family {family} maxelem 65536 timeout 0"
    specs = [SetSpec(admission.counting_set(digit), "hash:net", listened)]
    for rule in rules:
        kind, options = admission.options(rule, family, admission.lives(ruleset))
        name, sizing = admission.live_set(rule, digit), f"hashsize {admission.MOST // 8}"
        specs.append(SetSpec(name, kind, options, sizing))
    return specs


def _forgotten(digit: int, family: str, ruleset: RuleSet) -> list[SetSpec]:
    """Return the sets of `rstguard.kernel.forgotten`."""
    options = f"family {family} maxelem {forgotten.MOST_SERVING} timeout"
    sizing = f"hashsize {forgotten.MOST_SERVING // 4} forceadd"
    serving = f"{options} {forgotten.SERVING_SECONDS}"
    specs = [SetSpec(forgotten.serving_set(digit), "hash:ip,port", serving, sizing)]
    if Divert.STRAY in ruleset.diverts:
        large = f"family {family} maxelem {MOST} timeout"
        names = {
            "answered": f"{options} {forgotten.ANSWERED_SECONDS}",
            "lost": f"{large} {forgotten.LOST_SECONDS}",
            "grace": f"{large} {forgotten.GRACE_SECONDS}",
        }
        for name, its_options in names.items():
            its_sizing = sizing if name == "answered" else f"{FIXED} forceadd"
            specs.append(SetSpec(set_name(name, digit), "hash:ip", its_options, its_sizing))
    return specs


def _oneway(digit: int, family: str) -> list[SetSpec]:
    """Return the sets of `rstguard.kernel.oneway`."""
    options, sizing = f"family {family} maxelem {oneway.MOST} timeout", oneway.MOST // 4
    return [
        SetSpec(
            set_name(name, digit),
            "hash:ip,port",
            f"{options} {seconds}",
            f"hashsize {sizing} forceadd",
        )
        for name, seconds in oneway.SECONDS.items()
    ]


def _admitted(digit: int, family: str) -> SetSpec:
    """Return the set of `rstguard.kernel.dnat`."""
    options = f"family {family} maxelem {dnat.MOST_ADMITTED} timeout {dnat.ADMITTED_SECONDS}"
    sizing = f"hashsize {dnat.MOST_ADMITTED // 4} forceadd"
    return SetSpec(dnat.admitted_set(digit), "hash:ip,port,ip", options, sizing)


def _inside(digit: int, family: str) -> list[SetSpec]:
    """Return the sets of `rstguard.kernel.ingress`."""
    options = f"family {family} maxelem {ingress.MOST_INSIDE} timeout {ingress.INSIDE_SECONDS}"
    brief = f"family {family} maxelem {ingress.MOST_INSIDE} timeout {ingress.DOUBT_SECONDS}"
    # Nobody asks which they are: it is enough that the set is not empty.
    replaced = f"family {family} maxelem 64 timeout {ingress.REPLACED_SECONDS}"
    sizing = f"hashsize {ingress.MOST_INSIDE // 4} forceadd"
    return [
        SetSpec(ingress.inside_set(digit), "hash:ip", options, sizing),
        SetSpec(ingress.translated_set(digit), "hash:ip,port", options, sizing),
        SetSpec(ingress.doubt_set(digit), "hash:ip,port,ip", brief, sizing),
        SetSpec(ingress.replaced_set(digit), "hash:ip,port,ip", replaced, "hashsize 64 forceadd"),
    ]
