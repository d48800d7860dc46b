"""What other programs do with the guard's bits of marks: found in their rules, and counted.

Marks are shared ground.  What others set on packets and connections of the guard's is lost, or
mistaken for the guard's own where no label tells the two apart; so it is told, with what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from rstguard.kernel.command import Commands, printed_or_nothing
from rstguard.kernel.counters import hits
from rstguard.kernel.names import PREFIX, is_ours

CLEARED, SPARED = "cleared", "spared"
"""What is counted: packets of guarded connections that had bits of others, which were taken off;
segments of connections that only the mark of another program condemns, which went on."""

_SAVES: Final = ("iptables-save", "ip6tables-save")
_RULES: Final = (("ip", "rule"), ("ip", "-6", "rule"))
_ALL_BITS: Final = 0xFFFFFFFF
_VALUE: Final = r"(0x[0-9a-f]+|\d+)(?:/(0x[0-9a-f]+|\d+))?"
_PUT: Final = re.compile(rf"-j (CONNMARK|MARK) --set-xmark {_VALUE}")
_SAVED: Final = re.compile(r"-j CONNMARK --save-mark .*--ctmask (0x[0-9a-f]+)")
_TPROXY: Final = re.compile(rf"--tproxy-mark {_VALUE}")
_MATCHED: Final = re.compile(rf"-m (?:conn)?mark (?:! )?--mark {_VALUE}")
_ROUTED: Final = re.compile(rf"fwmark {_VALUE}")
_NFT_SET: Final = re.compile(r"(meta|ct) mark set (.*)")
_NFT_MATCHED: Final = re.compile(r"(?:meta|ct) mark (?:and |& )?(?:!= |== )?(0x[0-9a-f]+)")
_NUMBER: Final = re.compile(r"(and |& )?\b(0x[0-9a-f]+|\d+)\b")
_COUNTS: Final = {
    (f"{PREFIX}-foreign", "-j MARK"): CLEARED,
    (f"{PREFIX}-condemned", "-m connlabel"): SPARED,
}


class Use(NamedTuple):
    """A rule of another program, where it is, and which bits of marks it sets or asks for."""

    where: str
    rule: str
    bits: int


class Found(NamedTuple):
    """What one look has found: all rules that have to do with marks, and what was counted."""

    uses: tuple[Use, ...]
    counts: Counter[str]

    def overlapping(self, mask: int) -> list[Use]:
        """Return the rules that use some of these bits."""
        return [use for use in self.uses if use.bits & mask]

    def free(self, mask: int) -> int | None:
        """Return eight adjacent bits that no rule uses, as near the top as may be, or None."""
        used = mask
        for use in self.uses:
            used |= use.bits
        places = (0xFF << shift for shift in (*range(24, -1, -8), *range(20, 3, -8)))
        return next((place for place in places if not place & used), None)


def look(commands: Commands) -> Found:
    """Look at the rules of iptables, nft and `ip rule`; what cannot be asked has none."""
    uses: dict[Use, None] = {}
    counts: Counter[str] = Counter()
    for words in _SAVES:
        printed = printed_or_nothing(commands, [words, "-c"])
        uses |= dict.fromkeys(of_iptables(printed))
        counts += _counted(printed)
    for command in _RULES:
        uses |= dict.fromkeys(of_ip_rule(printed_or_nothing(commands, command)))
    uses |= dict.fromkeys(of_nft(printed_or_nothing(commands, ("nft", "list", "ruleset"))))
    return Found(tuple(uses), counts)


def told(found: Found, mask: int) -> list[str]:
    """Return what overlaps with the guard's bits, in sentences without a full stop."""
    overlapping = found.overlapping(mask)
    if not overlapping:
        return []
    free = found.free(mask)
    choose = f"set `marks: {free:#010x}` in the policy" if free else "set `marks:` in the policy"
    first = overlapping[0]
    more = f" and {len(overlapping) - 1} more" if len(overlapping) > 1 else ""
    said = (
        f"another program uses mark bits of the guard's ({mask:#010x}): {first.where}: "
        f"`{first.rule}`{more}; on protected connections the two get in each other's way: {choose}"
        " and restart the guard"
    )
    return [said]


def _counted(printed: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for packets, _, chain, rule in hits(printed):
        for (of, beginning), what in _COUNTS.items():
            if chain == of and rule.startswith(beginning):
                found[what] += packets
    return found


def of_iptables(printed: str) -> Iterator[Use]:
    """Read what iptables-save has printed, but for our own chains.

    A mark that is set whole, as by ``MARK --set-mark 1``, takes no bit of ours from a packet, on
    which there is none yet; but it does from a connection.
    """
    table = ""
    for line in printed.splitlines():
        if line.startswith("*"):
            table = line[1:]
        rule = line[line.find("-A ") :] if "-A " in line else ""
        if not rule or f" {PREFIX}-" in rule:
            continue
        bits = 0
        for target, value, mask in _PUT.findall(rule):
            bits |= _number(value) | (_mask(mask) if target == "CONNMARK" else 0)
        for mask in _SAVED.findall(rule):
            bits |= _number(mask)
        for value, _ in (*_TPROXY.findall(rule), *_MATCHED.findall(rule)):
            bits |= _number(value)
        if bits:
            yield Use(f"iptables, {table}", rule, bits)


def of_ip_rule(printed: str) -> Iterator[Use]:
    """Read what ``ip rule`` has printed."""
    for line in printed.splitlines():
        for value, _ in _ROUTED.findall(line):
            yield Use("ip rule", " ".join(line.split()), _number(value))


def of_nft(printed: str) -> Iterator[Use]:
    """Read what ``nft list ruleset`` has printed, but for tables of iptables and our own."""
    table, skips = "", False
    for line in printed.splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            table = " ".join(words[1:3])
            of_iptables_ = words[1] in ("ip", "ip6") and words[2] in _TABLES_OF_IPTABLES
            skips = of_iptables_ or words[2] == PREFIX or is_ours(words[2])
        if skips or "mark" not in line:
            continue
        if bits := _of_nft_rule(line):
            yield Use(f"nft, {table}", " ".join(words), bits)


_TABLES_OF_IPTABLES: Final = frozenset({"raw", "mangle", "nat", "filter", "security"})


def _of_nft_rule(rule: str) -> int:
    bits = _any(map(_number, _NFT_MATCHED.findall(_NFT_SET.sub("", rule))))
    for field, value in _NFT_SET.findall(rule):
        numbers = _NUMBER.findall(value)
        bits |= _any(_number(number) for kept, number in numbers if not kept)
        whole_mark = field == "ct" and not any(kept for kept, _ in numbers)
        bits |= _ALL_BITS if whole_mark else 0  # it is put there whole, ours with it
    return bits


def _any(numbers: Iterable[int]) -> int:
    bits = 0
    for number in numbers:
        bits |= number
    return bits


def _number(text: str) -> int:
    return int(text, 0) & _ALL_BITS


def _mask(text: str) -> int:
    return _number(text) if text else _ALL_BITS
