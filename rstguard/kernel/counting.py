"""What the kernel counts by itself, as rules: only what is too many goes on to the queue.  Pure."""

from __future__ import annotations

from rstguard.engine.ruleset import SECOND, Per, Rule, RuleSet
from rstguard.kernel.marks import Marks
from rstguard.kernel.names import PREFIX

UNITS = {SECOND: "sec", 60 * SECOND: "min", 3600 * SECOND: "hour", 86400 * SECOND: "day"}
"""Periods that hashlimit knows, in nanoseconds, and their names."""
RETURNED = "-returned"
"""What the name of a table ends with that counts SYNs of clients which returned a SYN cookie."""
LARGEST_RATE = 1_000_000
"""What hashlimit can count in a second (XT_HASHLIMIT_SCALE_v2)."""
_ENTRIES = 1 << 20
"""Sources or services that hashlimit's table holds, of 136 bytes each.  Full, it drops new ones."""
_BUCKETS = 1 << 16
"""Its chains: by default there are 8192, and a full one would be searched through 128 entries."""
_MICROSECONDS = 1_000_000
"""In a second: hashlimit keeps the time between two packets in whole ones (user2credits)."""


def syns(ruleset: RuleSet, family: int, returned: bool = False) -> tuple[str, ...]:
    """Return the rules that count SYNs per source, or none.

    Those of clients that `returned` a SYN cookie are counted apart: what anybody can forge must not
    use up what the owner of the address may send.

    The bucket is refilled once a jiffy, and a packet that is too many takes nothing from it, as in
    the engine's (hashlimit_mt_common in net/netfilter/xt_hashlimit.c).  More SYNs than the table
    could remember go to the engine before they reach it.
    """
    rule = ruleset.kernel_rule
    if rule is None:
        return ()
    apart = RETURNED if returned else ""
    table = table_of(rule, family) + apart
    within = (
        f"-m hashlimit --hashlimit-upto {rule.limit}/{UNITS[rule.period]}"
        f" --hashlimit-burst {rule.burst} {kept_in(rule, family, table)} -j RETURN"
    )
    over = f"-j MARK --set-xmark {Marks(ruleset.marks).to_queue_over}"
    queue = f"-j {PREFIX}-queue"
    return (f"{gate(f'{PREFIX}{family}-count{apart}', _lives(rule))} {queue}", within, over, queue)


def table_of(rule: Rule, family: int, of: str = "") -> str:
    """Return the name of the hashlimit table: it lives on under it, so another rate has another.

    `of` tells it from those of the same rate that are of something else.
    """
    length = _length(rule, family)
    return f"{PREFIX}{family}{of}-{rule.limit}-{rule.period // SECOND}-{rule.burst}-{length}"


def kept_in(rule: Rule, family: int, table: str) -> str:
    """Return the options by which hashlimit counts whom a rule counts, in a table of this name.

    As iptables prints them: a mask comes last, and of a whole address not at all.
    """
    table = f"--hashlimit-name {table} {table_size(_lives(rule), rule.period // SECOND)}"
    if rule.per is Per.SERVICE:
        return f"--hashlimit-mode dstip,dstport {table}"
    side = "dst" if rule.per is Per.DESTINATION else "src"
    return f"--hashlimit-mode {side}ip {table}{_mask(family, side, _length(rule, family))}"


def up_to(
    family: int, of: str, most: tuple[int, int], side: str = "src", ipv6_length: int = 128
) -> str:
    """Match up to so many packets a second, and at once, of each address; `of` names the count.

    `side` is "src" or "dst".  Of IPv6 so many bits are one address.
    """
    length = 32 if family == 4 else ipv6_length
    return (
        f"-m hashlimit --hashlimit-upto {most[0]}/sec --hashlimit-burst {most[1]}"
        f" --hashlimit-mode {side}ip --hashlimit-name {PREFIX}{family}-{of} {table_size(1)}"
        f"{_mask(family, side, length)}"
    )


def _mask(family: int, side: str, length: int) -> str:
    whole = length == (32 if family == 4 else 128)
    return "" if whole else f" --hashlimit-{side}mask {length}"


def _length(rule: Rule, family: int) -> int:
    return rule.ipv4_length if family == 4 else rule.ipv6_length


def _lives(rule: Rule) -> int:
    """Return after how many idle seconds a source has its whole burst again."""
    return max(1, -(-rule.refill // SECOND))


def table_size(lives: int, usually: int = 1) -> str:
    """Return the options of a hashlimit table whose entries live for this many idle seconds.

    `usually` is how long they do by themselves, the seconds of the rate's unit: iptables does not
    print that.
    """
    size = f"--hashlimit-htable-size {_BUCKETS} --hashlimit-htable-max {_ENTRIES}"
    return size if lives == usually else f"{size} --hashlimit-htable-expire {1000 * lives}"


def gate(name: str, lives: int) -> str:
    """Return the match of what is more than such a table could remember.

    What is new to a full table would be dropped (hashlimit_mt_common).
    """
    most = _most_a_second(lives)
    return (
        f"-m hashlimit --hashlimit-above {most}/sec --hashlimit-burst {most}"
        f" --hashlimit-name {name}-{most}"
    )


def printed_alike(rate: int) -> int:
    """Return a rate a second, at most this, that hashlimit prints as it reads it."""
    return _MICROSECONDS // -(-_MICROSECONDS // rate)


def _most_a_second(lives: int) -> int:
    """Return how many new entries a second the table can take that keeps each for `lives` seconds.

    An entry may stay a second longer, until the table is next searched for old ones, and as many as
    in a second may come at once.
    """
    microseconds_apart = -(-_MICROSECONDS * (lives + 2) // _ENTRIES)
    return _MICROSECONDS // microseconds_apart
