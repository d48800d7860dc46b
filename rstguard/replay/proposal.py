"""The policy file that learned limits are written to: the base policy, its limits replaced.

What the base says stays as it is, comments too.  Before each rule stands why its limit is what it
is, and whom other limits would have hit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rstguard.engine.ruleset import RATE_MEASURES, SECOND, Measure
from rstguard.policy.load import parse
from rstguard.policy.quantities import duration_text
from rstguard.replay.learn import Lesson, Proposal, quantity

_WIDTH = 4096  # a rule stays on one line
_LARGEST_BURST = 10_000_000


def everywhere(text: str) -> str:
    """Return a sample policy without its example addresses, so that it fits any capture."""
    data, yaml = _read(text)
    data.pop("trusted", None)
    data["protect"] = {"interfaces": list(data["protect"]["interfaces"])}
    return _written(yaml, data)


def policy_text(base: str, lesson: Lesson) -> str:
    """Return the text of the proposed policy.

    Raises:
        PolicyError: `base` is no valid policy.
    """
    data, yaml = _read(base)
    for number, (rule, proposal) in enumerate(zip(data["rules"], lesson.proposals, strict=True)):
        _replace(rule, proposal)
        comment = "\n".join(_why(proposal, lesson.margin))
        data["rules"].yaml_set_comment_before_after_key(number, before=comment, indent=2)
    text = "".join(f"# {line}".rstrip() + "\n" for line in _head(lesson)) + "\n"
    text += _written(yaml, data)
    parse(text, "the proposed policy")
    return text


def _read(text: str) -> tuple[Any, YAML]:
    yaml = YAML()
    yaml.width = _WIDTH
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml.load(text), yaml


def _written(yaml: YAML, data: Any) -> str:
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def _replace(rule: Any, proposal: Proposal) -> None:
    taken = proposal.taken
    if taken is None:
        return
    compiled = proposal.rule
    key = "under" if compiled.measure is Measure.SLOW else "over"
    limit = quantity(compiled, taken.limit)
    rule[key] = int(limit) if limit.isdecimal() else limit
    if "burst" in rule and compiled.measure in RATE_MEASURES:
        # The base allows so many times its limit at once; so does the proposal.
        burst = max(1, min(compiled.burst * taken.limit // compiled.limit, _LARGEST_BURST))
        rule["burst"] = f"{burst} B" if compiled.measure is Measure.BYTE_RATE else burst


def _head(lesson: Lesson) -> Iterator[str]:
    seconds = duration_text(lesson.length // SECOND * SECOND)
    name = Path(lesson.capture).name if lesson.capture else "what the running guard saw"
    yield f"Limits proposed from {name}: {lesson.packets:,} packets in {seconds},"
    sources = "source that looks" if lesson.productive == 1 else "sources that look"
    yield f"{lesson.productive:,} {sources} productive. Each limit is what 99.9 % of"
    yield f"those do not exceed, times {lesson.margin:g}, rounded. How many a limit would have hit"
    yield "is what it is at most: bursts are left out of account. Read who showed most of all:"
    yield "whoever guesses passwords looks productive, too. A limit far below the base's wants a"
    yield "longer capture." if lesson.capture else "longer time."
    yield from (f"Note: {note}." for note in lesson.remarks)


def _why(proposal: Proposal, margin: float) -> Iterator[str]:
    rule, count = proposal.rule, len(proposal.values)
    least = rule.measure is Measure.SLOW
    yield ""
    if proposal.values:
        shown = ", ".join(
            f"{name} {quantity(rule, proposal.at(thousandths))}"
            for name, thousandths in (("half", 500), ("99 %", 990), ("99.9 %", 999), ("all", 1000))
        )
        sources = "source shows" if count == 1 else "sources show"
        word = "at least" if least else "at most"
        yield f"{rule.name}: {count:,} productive {sources} {word}: {shown}."
    if proposal.highest:
        named = ", ".join(f"{name} {quantity(rule, shown)}" for name, shown in proposal.highest)
        yield f"  {'Least' if least else 'Most'} of all: {named}."
    sign = "/" if least else "x"
    before = quantity(rule, rule.limit)
    for candidate in proposal.candidates:
        mark = f"  <- taken; the base has {before}" if candidate is proposal.taken else ""
        yield (
            f"  {quantity(rule, candidate.limit):>8} ({candidate.basis} {sign} {margin:g}) would "
            f"have hit {candidate.hits:,}, {candidate.productive_hits:,} of them productive{mark}"
        )
    if proposal.kept:
        yield f"{rule.name}: the limit of the base is kept: {proposal.kept}."
