"""Propose limits: what honest sources showed in a capture, or to the running guard, with a margin.

In a capture a source looks productive if it brought a connection to a good end with data both
ways, or still holds one on which both ends have spoken.  The running guard has it from the kernel's
table: a sweep met a connection of the source, open or lately closed, on which both ends have sent
data (one that ends in a RST counts there, too).  Whoever attacks with whole connections (password
guessing, say) looks productive as well: the highest sources are named, for a person to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

from rstguard.engine.gauges import LARGEST_COUNT, Gauges, is_learned
from rstguard.engine.large import advice
from rstguard.engine.ruleset import RATE_MEASURES, SECOND, Measure, Rule, RuleSet
from rstguard.engine.shown import Shown, sum_up
from rstguard.policy.quantities import DAY, HOUR, MINUTE, duration_text
from rstguard.replay.capture import open_capture
from rstguard.replay.carrying import Carrying
from rstguard.replay.play import BASE, Replay
from rstguard.replay.run import Progress, play

TIMES = frozenset({Measure.IDLE, Measure.AGE})
_LONGEST = 30 * DAY
_HIGHEST_NAMED = 3
_LONG_ENOUGH = 4
"""What was watched tells of a time if it is so many times as long."""
_RANKS = (("99 %", 990), ("99.9 %", 999), ("highest", 1000))
"""What candidate limits are made of, in thousandths of the sources."""
_TAKEN = "99.9 %"

_STEPS = (10, 15, 20, 30, 40, 50, 60, 80)
_DURATIONS = tuple(
    count * unit
    for unit, counts in (
        (SECOND, (1, 2, 3, 5, 10, 15, 20, 30, 45)),
        (MINUTE, (1, 2, 3, 5, 10, 15, 20, 30, 45)),
        (HOUR, (1, 2, 3, 6, 12)),
        (DAY, (1, 2, 3, 7, 14, 30)),
    )
    for count in counts
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A limit that one could set, and whom it would have hit in this time, at most."""

    basis: str
    limit: int
    hits: int
    productive_hits: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """What was learned for one rule.

    `values` are what the productive sources showed, lowest first; for `slow` highest first, as
    the least is what counts.  `taken` is the candidate that is proposed, None to keep the limit of
    the base policy, for the reason `kept`.  `highest` are the sources that showed most.
    """

    rule: Rule
    values: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    taken: Candidate | None
    kept: str
    highest: tuple[tuple[str, int], ...]

    def at(self, thousandths: int) -> int:
        """Return what so many thousandths of the sources do not exceed."""
        return percentile(self.values, thousandths)


class Carrier(NamedTuple):
    """A source that carries `percent` of all proven connections, so many of them, at a sweep."""

    source: str
    percent: int
    connections: int

    @property
    def advice(self) -> str:
        """What an administrator can say of it."""
        return advice(self.source, self.percent)


@dataclass(frozen=True, slots=True)
class Lesson:
    """All proposals, and what they were learned from; `length` is in nanoseconds.

    `capture` is its name, or "" if the running guard was asked.  `packets` are those of the
    capture, or those that came to the guard.  `carriers` are the sources that carry a large share
    of all connections (`rstguard.engine.large`), the largest first; `notes` are what else a reader
    of the limits should know.
    """

    capture: str
    packets: int
    length: int
    productive: int
    margin: float
    proposals: tuple[Proposal, ...]
    carriers: tuple[Carrier, ...]
    notes: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """All that a reader of the limits should know."""
        return (*self.notes, *(one.advice for one in self.carriers))


def learn(ruleset: RuleSet, file: Path, margin: float, progress: Progress | None = None) -> Lesson:
    """Measure a capture by the rules of a policy; `margin` is the factor to honest sources.

    Raises:
        CaptureError: the file is no capture, or cannot be read.
    """
    gauges = Gauges(ruleset)
    carrying = Carrying(gauges, ruleset)
    replay = Replay(ruleset, judge=gauges, sweeping=carrying)
    with open_capture(file) as capture:
        play(capture, [replay], progress)
    length = max(0, replay.now - BASE)
    productive = replay.productive
    shown = {
        gauge.rule.name: sum_up(gauge.rule, gauge.shown, productive) for gauge in gauges.gauges
    }
    large = sorted(carrying.found.values(), key=lambda one: (-one.share, one.source))
    notes = [capture.damage, left_out_text(gauges.left_out)]
    return Lesson(
        capture.name,
        capture.frames,
        length,
        len({*map(replay.source_key, productive)}),
        margin,
        tuple(propose(rule, shown.get(rule.name), length, margin) for rule in ruleset.rules),
        tuple(Carrier(str(one.source), one.share, one.connections) for one in large),
        tuple(filter(None, notes)),
    )


def lesson_of_guard(ruleset: RuleSet, told: Mapping[str, Any], margin: float) -> Lesson:
    """Return what the running guard has learned; `told` is its answer to "learned"."""
    shown = {row["rule"]: _shown(row) for row in told["rules"]}
    length = round(told["seconds"] * SECOND)
    notes = [*told["notes"], left_out_text(told["left_out"])]
    return Lesson(
        "",
        told["packets"],
        length,
        told["productive"],
        margin,
        tuple(propose(rule, shown.get(rule.name), length, margin) for rule in ruleset.rules),
        tuple(
            Carrier(row["source"], row["percent"], row["connections"])
            for row in told["large_sources"]
        ),
        tuple(filter(None, notes)),
    )


def _shown(row: Mapping[str, Any]) -> Shown:
    amounts = tuple((amount, good, others) for amount, good, others in row["amounts"])
    return Shown(amounts, tuple((name, amount) for name, amount in row["highest"]))


def left_out_text(count: int) -> str:
    """Return what it means that sources had to make room for others, or ""."""
    if not count:
        return ""
    return f"{count:,} times a source that showed little was forgotten: limits err on the wide side"


def propose(rule: Rule, shown: Shown | None, length: int, margin: float) -> Proposal:
    """Return what sources have shown about a rule's limit, in so many nanoseconds."""
    if shown is None or not is_learned(rule):
        said = "what holds under pressure alone" if rule.when_pressed else "this measure"
        return Proposal(rule, (), (), None, f"{said} is not learned", ())
    amounts = shown.amounts[:: -1 if rule.measure is Measure.SLOW else 1]
    values = [amount for amount, productive, _ in amounts for _ in range(productive)]
    kept = _why_kept(rule, values, length)
    candidates = []
    for basis, thousandths in _RANKS if values else ():
        limit = limit_for(rule.measure, percentile(values, thousandths), margin)
        hit = [counts for amount, *counts in amounts if crosses(rule.measure, amount, limit)]
        productive = sum(good for good, _ in hit)
        candidates.append(Candidate(basis, limit, sum(map(sum, hit)), productive))
    taken = next((one for one in candidates if one.basis == _TAKEN and not kept), None)
    return Proposal(rule, tuple(values), tuple(candidates), taken, kept, shown.highest)


def _why_kept(rule: Rule, values: list[int], length: int) -> str:
    """Return why the limit of the base is better kept, or ""."""
    if not values:
        return "no productive source shows any of it"
    wanted = {Measure.IDLE: rule.limit, Measure.AGE: rule.limit, Measure.SLOW: rule.after}
    if length < _LONG_ENOUGH * wanted.get(rule.measure, 0):
        return (
            f"the time is too short to tell: it takes {_LONG_ENOUGH} times "
            f"{duration_text(wanted[rule.measure])}"
        )
    if rule.measure is Measure.SLOW and not values[-1]:
        return "some productive source shows less than 1 B/s"
    return ""


def percentile(values: tuple[int, ...] | list[int], thousandths: int) -> int:
    """Return the value at a rank: the nearest that so many thousandths do not exceed."""
    rank = -(-len(values) * thousandths // 1000)
    return values[max(0, rank - 1)] if values else 0


def crosses(measure: Measure, amount: int, limit: int) -> bool:
    """Tell whether what a source showed may cross a limit."""
    if measure is Measure.SLOW:
        return amount < limit
    return amount >= limit if measure in TIMES else amount > limit


def limit_for(measure: Measure, amount: int, margin: float) -> int:
    """Return a limit that a person would write, `margin` away from what was shown."""
    if measure is Measure.SLOW:
        return max(1, _rounded(floor(amount / margin), down=True))
    wanted = max(1, ceil(amount * margin))
    if measure in TIMES:
        return next((step for step in _DURATIONS if step >= wanted), _LONGEST)
    limit = _rounded(wanted, down=False)
    counts = (Measure.HALF_OPEN, Measure.DISTINCT_PORTS, Measure.DISTINCT_HOSTS)
    return min(limit, LARGEST_COUNT if measure in counts else 10_000_000)


def _rounded(value: int, *, down: bool) -> int:
    """Return the next number of one digit or so: 1, 15, 200, 3000."""
    if value < 10:
        return value
    scale: int = 10 ** (len(str(value)) - 2)
    steps = [step * scale for step in (*_STEPS, 100)]
    if down:
        return max(step for step in steps if step <= value)
    return min(step for step in steps if step >= value)


def quantity(rule: Rule, amount: int) -> str:
    """Return an amount of a rule's measure as a policy file writes it."""
    if rule.measure is Measure.BYTE_RATE or rule.measure is Measure.SLOW:
        for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
            if amount >= 10 * size or (amount >= size and amount % size == 0):
                return f"{amount // size} {unit}/s"
        return f"{amount} B/s"
    if rule.measure in TIMES:
        return duration_text(amount // SECOND * SECOND or SECOND)
    if rule.measure in RATE_MEASURES:
        return f"{amount}/{duration_text(rule.period).removeprefix('1')}"
    return str(amount)


def lesson_data(lesson: Lesson) -> dict[str, Any]:
    """Return a lesson as plain values for JSON."""
    return {
        "capture": lesson.capture or None,
        "packets": lesson.packets,
        "seconds": round(lesson.length / SECOND, 6),
        "productive_sources": lesson.productive,
        "margin": lesson.margin,
        "notes": list(lesson.notes),
        "large_sources": [{**one._asdict(), "advice": one.advice} for one in lesson.carriers],
        "rules": [
            {
                "rule": one.rule.name,
                "measure": one.rule.measure.value,
                "productive_sources": len(one.values),
                "limit": quantity(one.rule, one.taken.limit) if one.taken else None,
                "kept_because": one.kept,
                "candidates": [
                    {
                        "basis": candidate.basis,
                        "limit": quantity(one.rule, candidate.limit),
                        "would_hit": candidate.hits,
                        "of_them_productive": candidate.productive_hits,
                    }
                    for candidate in one.candidates
                ],
                "highest": [
                    {"source": name, "shown": quantity(one.rule, amount)}
                    for name, amount in one.highest
                ],
            }
            for one in lesson.proposals
        ],
    }
