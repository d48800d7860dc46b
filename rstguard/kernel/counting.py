"""What the kernel counts by itself, as rules: only what is too many goes on to the queue.  Pure."""

from __future__ import annotations

from rstguard.engine.ruleset import SECOND, Measure, Rule, RuleSet
from rstguard.kernel import marks

PREFIX = "rstguard"
_UNITS = {SECOND: "sec", 60 * SECOND: "min", 3600 * SECOND: "hour", 86400 * SECOND: "day"}
_SOURCES = 1 << 20
"""Sources that hashlimit's table holds: `rstguard.policy.offload` sees to it that they are enough.

Full, it would drop the SYNs of new sources.
"""


def bits(value: int) -> str:
    """Return some mark bits as the value and mask of an iptables match or target."""
    return f"0x{value:x}/0x{value:x}"


def _length(rule: Rule, family: int) -> int:
    return rule.ipv4_length if family == 4 else rule.ipv6_length


def syns(ruleset: RuleSet, family: int) -> tuple[str, ...]:
    """Return the rules that count SYNs per source, or none.

    The bucket is refilled once a jiffy, and a packet that is too many takes nothing from it, as in
    the engine's (hashlimit_mt_common in net/netfilter/xt_hashlimit.c).
    """
    rule = ruleset.kernel_rule(Measure.SYN_RATE)
    if rule is None:
        return ()
    length = _length(rule, family)
    expire = max(1000, rule.period * rule.burst // rule.limit // 1_000_000)
    # A table lives on under its name: another rate needs another name.
    table = f"{PREFIX}{family}-{rule.limit}-{rule.period // SECOND}-{rule.burst}-{length}"
    within = (
        f"-m hashlimit --hashlimit-upto {rule.limit}/{_UNITS[rule.period]}"
        f" --hashlimit-burst {rule.burst} --hashlimit-mode srcip --hashlimit-srcmask {length}"
        f" --hashlimit-name {table} --hashlimit-htable-max {_SOURCES}"
        f" --hashlimit-htable-expire {expire} -j RETURN"
    )
    over = f"-j MARK --set-xmark {bits(marks.TO_QUEUE_OVER)}"
    return (within, over, f"-j {PREFIX}-queue")


def held(ruleset: RuleSet, family: int) -> tuple[str, ...]:
    """Return the rules that count connections per source at their first ACK, or none.

    A connection is in the kernel's list once, until it is closed or forgotten
    (net/netfilter/nf_conncount.c).
    """
    rule = ruleset.kernel_rule(Measure.CONNECTIONS)
    if rule is None:
        return ()
    over = marks.TO_QUEUE_OVER | marks.TO_QUEUE_KNOWN | marks.TO_QUEUE_PROVEN
    above = (
        f"-p tcp -m connlimit --connlimit-above {rule.limit}"
        f" --connlimit-mask {_length(rule, family)} --connlimit-saddr"
        f" -j MARK --set-xmark {bits(over)}"
    )
    return (above, f"-m mark --mark {bits(marks.TO_QUEUE_OVER)} -j {PREFIX}-queue")
