"""What is known of sources beyond their counts: past offences, and blocks already ordered.

Both tables are bounded (`rstguard.engine.limiter.Memory`); an entry that falls out favours the
source: its next ban is a first one, or a block is ordered a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rstguard.engine.address import Prefix
from rstguard.engine.limiter import Memory
from rstguard.engine.rules import REASONS
from rstguard.engine.ruleset import SECOND, Rule, RuleSet
from rstguard.engine.verdict import Ban, Reason, Shun

_LONGEST_PROGRESSION = 64


class Offence(NamedTuple):
    """How many `times` a source was banned by a rule that escalates; `age` in nanoseconds."""

    rule: str
    source: Prefix
    times: int
    age: int


class Sources:
    """Turns a crossed rule into a ban or a shun of its source, once."""

    def __init__(self, ruleset: RuleSet) -> None:
        self.ruleset = ruleset
        self._offences: Memory[tuple[int, int]] = Memory()
        self._ordered: Memory[tuple[bool, int]] = Memory()  # by whether enforced, and source

    def block(self, source: Prefix, proven: bool, rule: Rule, now: int) -> tuple[Ban | Shun, ...]:
        """Return the ban or shun to carry out now, or nothing if it was ordered a moment ago.

        A source is banned only if it is `proven` to own its address; a forged SYN may bear
        anybody's, so the rest is shunned.  A shun does not stand in the way of a later ban.  While
        the policy is enforced an order is repeated after a second: a packet that still arrives
        then shows that the kernel does not block its source.
        """
        # What an observing policy would have done is not done: it does not quiet an enforcing one.
        ordered = self._ordered.get((self.ruleset.enforce, source))
        if ordered is not None and now < ordered[1] and (ordered[0] or not proven):
            return ()
        effect: Ban | Shun
        withheld = proven and rule.name in self.ruleset.capped
        if proven and not withheld:
            duration, offence = self._duration(source, rule, now)
            reason = REASONS[rule.measure]
            effect = Ban(source, duration, rule.name, reason, rule.keep_existing, offence)
        else:
            duration = self.ruleset.shun_duration
            effect = Shun(source, duration, rule.name, REASONS[rule.measure], withheld)
        quiet = min(duration, SECOND) if self.ruleset.enforce else duration
        self._ordered.put((self.ruleset.enforce, source), (proven, now + quiet))
        return (effect,)

    def shun(self, source: Prefix, name: str, reason: Reason, now: int) -> tuple[Shun, ...]:
        """Return a shun that no rule asks for, or nothing if it was ordered a moment ago."""
        ordered = self._ordered.get((self.ruleset.enforce, source))
        if ordered is not None and now < ordered[1]:
            return ()
        self._ordered.put((self.ruleset.enforce, source), (False, now + SECOND))
        return (Shun(source, self.ruleset.shun_duration, name, reason),)

    def restore(self, offences: Iterable[Offence], now: int) -> None:
        """Remember offences of an earlier time."""
        for rule, source, count, age in offences:
            self._offences.put((rule, source), (count, now - age))

    def _duration(self, source: Prefix, rule: Rule, now: int) -> tuple[int, int]:
        """Return how long this ban lasts, longer for each one remembered, and which it is."""
        if rule.escalate is None:
            return rule.duration, 0
        key = (rule.name, source)
        count, last = self._offences.get(key) or (0, now)
        ordered = self._ordered.get((self.ruleset.enforce, source))
        if now - last > rule.escalate.memory:
            count = 0
        if ordered is not None and ordered[0] and count and now - last < 2 * SECOND:
            count -= 1  # the same ban ordered again, not a new offence
        offence = min(count + 1, _LONGEST_PROGRESSION)
        self._offences.put(key, (offence, now))
        return int(min(rule.duration * rule.escalate.factor**count, rule.escalate.up_to)), offence
