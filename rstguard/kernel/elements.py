"""Bans and shuns as elements of kernel sets.

The sets say who is banned now: the comment of each element holds its kind and the rule that asked
for it, so `ban list` works after a crash and beside a running guard.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from rstguard.engine.address import V6, Prefix, is_v6
from rstguard.engine.ruleset import RULE_NAME, SECOND
from rstguard.engine.verdict import Ban, Shun
from rstguard.kernel import NotPermitted
from rstguard.kernel.command import Commands
from rstguard.kernel.names import BAN_SETS, GATE_SETS, SHUN_SETS

Kind = Literal["ban", "shun"]

MAX_SECONDS = 2_147_483
"""Longest time the kernel keeps an element, just under 25 days (IPSET_MAX_TIMEOUT)."""
EVERYTHING: Final = {
    4: (Prefix(0, 1), Prefix(1 << 31, 1)),  # a set holds no prefix of length 0
    6: (Prefix(V6, 1), Prefix(V6 | 1 << 127, 1)),
}
"""What a set holds that is to hold every address of a family."""


class Element(NamedTuple):
    """One banned or shunned source.

    `rule` is the policy's rule, a name of 1-48 letters, digits, "-", "_" and "."; it is "" only in
    a listing, for an element that somebody added by hand without a comment.  `remaining` is in
    seconds (1-2,147,483), or None for ever.  `keep_existing` is a ban that drops new SYNs only and
    leaves the source's connections alone, or a shun that drops them whatever they might prove: of
    a gated network, or in a ban's place.  These live in the set of the gated.
    """

    source: Prefix
    kind: Kind
    rule: str
    remaining: int | None
    keep_existing: bool = False

    @property
    def set_name(self) -> str:
        """The set that holds the element."""
        sets = GATE_SETS if self.keep_existing else SHUN_SETS if self.kind == "shun" else BAN_SETS
        return sets[is_v6(self.source.network)]

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
    return Element(effect.source, "shun", effect.rule, seconds, effect.withheld)


def ipset(kernel: Commands, *arguments: str, text: str = "") -> str:
    """Run the `ipset` command with `text` as its input and return what it printed.

    Raises:
        KernelError: it is not installed, or it failed.
    """
    try:
        return kernel.run(["ipset", *arguments], text)
    except NotPermitted as problem:
        raise NotPermitted(
            "reading and changing the kernel's sets needs root (CAP_NET_ADMIN): use sudo"
        ) from problem
