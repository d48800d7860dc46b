"""Bans and shuns as elements of kernel sets.

The sets say who is banned now: the comment of each element holds its kind and the rule that asked
for it, so `ban list` works after a crash and beside a running guard.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from rstguard.engine.address import Prefix, is_v6, parse_prefix
from rstguard.engine.ruleset import RULE_NAME, SECOND
from rstguard.engine.verdict import Ban, Shun
from rstguard.kernel import KernelError
from rstguard.kernel.command import run
from rstguard.kernel.names import BAN_SETS, SHUN_SETS

Kind = Literal["ban", "shun"]

MAX_SECONDS = 2_147_483
"""Longest time the kernel keeps an element, just under 25 days (IPSET_MAX_TIMEOUT)."""

_LINE = re.compile(r'add (\S+) (\S+)(?: timeout (\d+))?(?:.*? comment "([^"]*)")?')


class Element(NamedTuple):
    """One banned or shunned source.

    `rule` is the policy's rule, a name of 1-48 letters, digits, "-", "_" and "."; it is "" only in
    a listing, for an element that somebody added by hand without a comment.  `remaining` is in
    seconds (1-2,147,483), or None for ever.  `keep_existing` is a ban that drops new SYNs only and
    leaves the source's connections alone: it lives in the set of the shunned.
    """

    source: Prefix
    kind: Kind
    rule: str
    remaining: int | None
    keep_existing: bool = False

    @property
    def set_name(self) -> str:
        """The set that holds the element."""
        shunned = self.kind == "shun" or self.keep_existing
        return (SHUN_SETS if shunned else BAN_SETS)[is_v6(self.source.network)]

    @property
    def lasts(self) -> float:
        """Seconds that remain, as a number that compares: infinite for ever."""
        return float("inf") if self.remaining is None else self.remaining

    @property
    def comment(self) -> str:
        """What the kernel keeps beside the element, such as ``ban syn-rate``.

        Raises:
            ValueError: the rule's name is none that a policy could hold.
        """
        if not RULE_NAME.fullmatch(self.rule):
            raise ValueError(f"{self.rule!r} is no rule name (1-48 letters, digits, -, _ and .)")
        return f"{self.kind} {self.rule}"


def element_of(effect: Ban | Shun) -> Element:
    """Return the element that a decision's effect asks for, its time rounded up to seconds."""
    seconds = min(max(1, -(-effect.duration // SECOND)), MAX_SECONDS)
    if isinstance(effect, Ban):
        return Element(effect.source, "ban", effect.rule, seconds, effect.keep_existing)
    return Element(effect.source, "shun", effect.rule, seconds)


def listing(name: str, sources: Collection[Prefix] | None = None) -> list[Element]:
    """Return the elements of one ban or shun set, or those of them that `sources` names.

    Raises:
        KernelError: there is no such set, or it may not be read.
    """
    in_shun_set = name in SHUN_SETS
    lines = ipset("save", name).splitlines()[1:]
    if sources is not None:
        wanted = {str(source) for source in sources}
        lines = [line for line in lines if line.split(" ", 3)[2] in wanted]
    return [_parsed(line, in_shun_set) for line in lines]


def ipset(*arguments: str, text: str = "") -> str:
    """Run the `ipset` command with `text` as its input and return what it printed.

    Raises:
        KernelError: it is not installed, or it failed.
    """
    try:
        return run(["ipset", *arguments], text)
    except KernelError as problem:
        if "peration not permitted" in str(problem):
            raise KernelError(
                "reading and changing the kernel's sets needs root (CAP_NET_ADMIN): use sudo"
            ) from problem
        raise


def _parsed(line: str, in_shun_set: bool) -> Element:
    found = _LINE.match(line)
    if found is None:
        raise KernelError(f"ipset lists an element that rstguard cannot read: {line}")
    _, source, seconds, comment = found.groups()
    kind, _, rule = (comment or "").partition(" ")
    if kind not in ("ban", "shun"):
        kind, rule = ("shun" if in_shun_set else "ban"), ""
    banned = kind == "ban"
    return Element(
        parse_prefix(source),
        "ban" if banned else "shun",
        rule,
        int(seconds or 0) or None,
        banned and in_shun_set,
    )
