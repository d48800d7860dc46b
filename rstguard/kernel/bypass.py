"""Traffic that another program takes out before the guard's rules see it: found by counters.  Pure.

What a protected interface receives is compared with what the first rules count, in bytes, as the
kernel joins segments before (GRO).  Three places are told apart:

- *before* the raw table: XDP, tc, a flowtable, or frames that belong to an interface on top;
- *between* raw and mangle: a rule of another program in mangle PREROUTING accepts it before ours;
- *untracked*: a rule of another program keeps it from the tracker (NOTRACK).

It takes several looks in a row, each with enough traffic, and most of it taken out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from rstguard.kernel import matching
from rstguard.kernel.command import printed_or_nothing
from rstguard.kernel.counters import hits
from rstguard.kernel.links import Link
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel

LOOKS: Final = 3
"""Looks in a row that must show it."""
LEAST: Final = 300_000
"""Bytes in a look: below that it shows nothing."""
_SHARE: Final = 5
"""One part in so many must come by, else it is taken out."""
_MOST_SUSPECTS: Final = 3

BEFORE: Final = "before"
BETWEEN: Final = "between"
UNTRACKED: Final = "untracked"


class Counted(NamedTuple):
    """Bytes so far: received by interfaces, in raw, of TCP there and in mangle, and untracked."""

    received: int
    raw: int
    raw_tcp: int
    mangle_tcp: int
    untracked: int


def count(rules: Iterable[str], links: Iterable[Link]) -> Counted:
    """Return the counters of these interfaces and of the guard's first rules.

    `rules` are what `rstguard.kernel.untracked.COMMANDS` print.
    """
    sums = [0, 0, 0, 0]
    for printed in rules:
        for place, amount in _counters(printed):
            sums[place] += amount
    return Counted(sum(link.received for link in links), *sums)


def _counters(printed: str) -> Iterator[tuple[int, int]]:
    """Yield which counter and how many bytes, of each rule that counts."""
    first = True
    for _, amount, chain, rule in hits(printed):
        if chain == f"{PREFIX}-raw" and rule.endswith(f"-j {PREFIX}-blocked"):
            yield 0, amount
        elif chain == f"{PREFIX}-blocked" and first and rule.startswith("-p tcp"):
            first = False
            yield 1, amount
        elif chain == f"{PREFIX}-in" and rule.endswith(f"-j {PREFIX}-classify"):
            yield 2, amount
        elif chain == f"{PREFIX}-classify" and rule == f"{matching.UNTRACKED} -j RETURN":
            yield 3, amount


class Taken:
    """What looks some seconds apart show."""

    def __init__(self) -> None:
        self._last: Counted | None = None
        self._of = 0
        self._where, self._looks = "", 0
        self.told = ""
        """`BEFORE`, `BETWEEN` or `UNTRACKED`, or ""."""

    def look(self, now: Counted, replaced: int = 0) -> bool:
        """Take in the counters as they are now; tell whether `told` has changed.

        `replaced` says how often the rules were replaced so far: what was counted before that is
        compared with nothing.
        """
        last, self._last = self._last if replaced == self._of else None, now
        self._of = replaced
        news = [a - b for a, b in zip(now, last or now, strict=True)]
        if min(news) < 0:  # an interface was replaced meanwhile
            return False
        where = _where(Counted(*news))
        if where is None:
            return False
        self._looks = self._looks + 1 if where == self._where else 1
        self._where = where
        before = self.told
        if not where or self._looks >= LOOKS:
            self.told = where
        return self.told != before


def _where(news: Counted) -> str | None:
    """Return where traffic is taken out, or "", or None if there was too little to tell."""
    if news.raw_tcp >= LEAST and news.mangle_tcp * _SHARE < news.raw_tcp:
        return BETWEEN
    if news.mangle_tcp >= LEAST and news.untracked * _SHARE > news.mangle_tcp:
        return UNTRACKED
    if news.received >= LEAST:
        return BEFORE if news.raw * _SHARE < news.received else ""
    return None


def sentence(where: str, names: Sequence[str], suspects: Sequence[str]) -> str:
    """Return in words what is wrong and what to do."""
    which = " and ".join(names)
    seen = f" (there is {'; '.join(suspects)})" if suspects else ""
    if where == BEFORE:
        return (
            f"most of what {which} receives does not come to the guard's rules: an XDP program, tc "
            f"or a flowtable takes it out before{seen}, or it belongs to an interface on top such "
            "as a VLAN or a bridge: take it out of there, or name that one under protect: "
            "interfaces"
        )
    if where == BETWEEN:
        return (
            f"most TCP of {which} does not come to the guard's rules in the table mangle: a rule "
            f"of another program accepts or drops it before{seen}: narrow it"
        )
    return (
        f"most TCP of {which} is kept from the connection tracker by another program{seen}, so no "
        "connection of it can be judged: narrow that rule"
    )


def suspects(kernel: Kernel, links: Iterable[Link]) -> list[str]:
    """Return what may be the reason, in words; what cannot be read is left out."""
    found = [f"an XDP program on {link.name}" for link in links if link.xdp]
    found += _rules(kernel, {"raw": _NOTRACK, "mangle": _ENDS}, _TAKES_OUT)
    return found[:_MOST_SUSPECTS]


def zoning(kernel: Kernel) -> list[str]:
    """Return the rules that give zones of the tracker; what cannot be read is left out."""
    return _rules(kernel, {"raw": _ZONE}, _ZONE_OF_NFT)[:_MOST_SUSPECTS]


def _rules(
    kernel: Kernel, of_iptables: Mapping[str, re.Pattern[str]], of_nft: re.Pattern[str]
) -> list[str]:
    """Return the rules of others that patterns are found in, by the table of iptables."""
    found = []
    for tool in ("iptables", "ip6tables"):
        for table, targets in of_iptables.items():
            printed = printed_or_nothing(kernel, (f"{tool}-save", "-t", table))
            found += [
                f"`{tool} -t {table} {line}`"
                for line in printed.splitlines()
                if line.startswith("-A ") and f" {PREFIX}-" not in line and targets.search(line)
            ]
    ruleset = printed_or_nothing(kernel, ("nft", "list", "ruleset"))
    rules = (line.strip() for line in ruleset.splitlines())
    found += [f"`{line}` in nftables" for line in rules if of_nft.search(line)]
    return list(dict.fromkeys(found))


_ZONE: Final = re.compile(r"-j CT .*--zone")
_ZONE_OF_NFT: Final = re.compile(r"\bct zone set\b")
_NOTRACK: Final = re.compile(r"-j (NOTRACK|CT .*--notrack)")
_ENDS: Final = re.compile(r"^-A PREROUTING .*-j (ACCEPT|TPROXY|DROP)")
_TAKES_OUT: Final = re.compile(r"\b(notrack|flow add|flow offload|hook ingress)\b")
