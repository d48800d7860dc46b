"""What a replay found, and what only one of two policies would have done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rstguard.engine.address import Prefix
from rstguard.engine.ruleset import SECOND
from rstguard.replay.capture import Capture
from rstguard.replay.hits import KINDS, Hit, Total
from rstguard.replay.play import BASE, Replay

_SAME = SECOND // 1000
"""Two policies act at the same time if they do so within a millisecond."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one policy would have done to a capture.

    `start` is the time of the first packet (nanoseconds since 1970), `length` the time from it to
    the last (nanoseconds).  `hits` come most severe first, then by what they kept away.  `left_out`
    counts what was done but has no record of its own.
    """

    policy: str
    enforce: bool
    capture: str
    start: int
    length: int
    frames: int
    judged: int
    hits: tuple[Hit, ...]
    totals: tuple[Total, ...]
    left_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What only one of two policies hit, and what both hit at different times."""

    first: str
    second: str
    only_first: tuple[Hit, ...]
    only_second: tuple[Hit, ...]
    other_time: tuple[tuple[Hit, Hit], ...]


def report_of(replay: Replay, capture: Capture) -> Report:
    """Return what a replay has found up to now."""
    totals = {rule.name: Total(rule.name) for rule in replay.ruleset.rules} | replay.hits.totals
    return Report(
        policy=replay.ruleset.name,
        enforce=replay.ruleset.enforce,
        capture=capture.name,
        start=replay.start,
        length=max(0, replay.now - BASE),
        frames=capture.frames,
        judged=replay.counts.judged,
        hits=tuple(sorted(replay.hits, key=_rank)),
        totals=tuple(totals.values()),
        left_out=replay.hits.left_out,
        notes=tuple(_notes(replay, capture)),
    )


def _rank(hit: Hit) -> tuple[int, int, int]:
    return KINDS.index(hit.kind), -hit.packets - hit.connections, hit.first


def _notes(replay: Replay, capture: Capture) -> Iterable[str]:
    counts = replay.counts
    if capture.damage:
        yield capture.damage
    if capture.foreign * 2 > capture.frames:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in capture.kinds.most_common(3))
        yield f"{capture.foreign:,} packets are not IP, or of a link type not known here: {kinds}"
    if not counts.packets:
        yield "there is no IP packet in the capture"
    elif not counts.in_scope and not counts.older:
        yield (
            "no connection to what the policy protects is in the capture: do protect.destinations "
            "and protect.ports fit it?"
        )
    elif not counts.answers and not counts.older:
        yield (
            "the protected side says nothing in the capture: no source can prove its address, so "
            "nobody is banned; capture both directions"
        )
    if counts.older:
        yield f"{counts.older:,} connections are older than the capture: their age is not known"
    if counts.unordered:
        yield (
            f"{counts.unordered:,} packets come late: they are judged with the time of the ones "
            "before them"
        )
    for rule, at in replay.capped.items() if replay.ruleset.enforce else ():
        yield (
            f"after {offset(at):,.3f} s rule {rule} bans in more than "
            f"{replay.ruleset.bans_per_minute:,} networks in a minute (bans_per_minute): the guard "
            "would let it shun instead for a while, the replay goes on as before"
        )
    budget = replay.ruleset.syn_budget
    if budget is not None and budget.rate is not None:
        yield "the SYN budget is not replayed: every SYN was judged, as it is below the budget"


def compare(first: Report, second: Report) -> Comparison:
    """Return the differences between what two policies did to one capture."""
    one, other = _earliest(first), _earliest(second)
    both = [(one[key], other[key]) for key in one if key in other]
    return Comparison(
        first.policy,
        second.policy,
        tuple(hit for key, hit in one.items() if key not in other),
        tuple(hit for key, hit in other.items() if key not in one),
        tuple(pair for pair in both if abs(pair[0].first - pair[1].first) >= _SAME),
    )


def _earliest(report: Report) -> dict[tuple[str, object], Hit]:
    """Return the first hit of each source or connection by each kind, whatever the rule."""
    found: dict[tuple[str, object], Hit] = {}
    for hit in report.hits:
        known = found.get((hit.kind, hit.subject))
        if known is None or hit.first < known.first:
            found[hit.kind, hit.subject] = hit
    return found


def offset(time: int) -> float:
    """Return a replay's time as seconds from the first packet."""
    return round((time - BASE) / SECOND, 6)


def capture_time(start: int, time: int) -> str:
    """Return a replay's time as the capture's clock shows it (UTC)."""
    moment = max(0, start + time - BASE)
    try:
        return datetime.fromtimestamp(moment / SECOND, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return f"{moment / SECOND:.3f}"  # a year that no calendar here knows


def hit_data(hit: Hit, start: int) -> dict[str, Any]:
    """Return a hit as plain values for JSON."""
    return {
        "kind": hit.kind,
        "source" if isinstance(hit.subject, Prefix) else "connection": str(hit.subject),
        "rule": hit.rule,
        "reason": hit.reason.code,
        "why": hit.reason.value,
        "time": capture_time(start, hit.first),
        "offset_s": offset(hit.first),
        "last_offset_s": offset(hit.last),
        "times": hit.times,
        "lasts_s": hit.seconds,
        "packets_not_arrived": hit.packets,
        "connections_not_arrived": hit.connections,
        "productive_before": hit.productive,
    }


def event_data(hit: Hit, start: int, now: int, enforced: bool) -> dict[str, Any]:
    """Return one thing that was done as plain values, as the event log writes it."""
    return {
        "time": capture_time(start, now),
        "offset_s": offset(now),
        "kind": hit.kind,
        "subject": str(hit.subject),
        "rule": hit.rule,
        "reason": hit.reason.code,
        "why": hit.reason.value,
        "enforced": enforced,
    }


def report_data(report: Report) -> dict[str, Any]:
    """Return a report as plain values for JSON."""
    return {
        "policy": report.policy,
        "enforced": report.enforce,
        "capture": report.capture,
        "start": capture_time(report.start, BASE),
        "seconds": round(report.length / SECOND, 6),
        "packets": report.frames,
        "judged": report.judged,
        "notes": list(report.notes),
        "totals": [
            {
                "rule": total.rule,
                "times": total.times,
                "subjects": total.subjects,
                "packets_not_arrived": total.packets,
                "connections_not_arrived": total.connections,
            }
            for total in report.totals
        ],
        "hits": [hit_data(hit, report.start) for hit in report.hits],
        "left_out": report.left_out,
    }


def comparison_data(found: Comparison, start: int) -> dict[str, Any]:
    """Return a comparison as plain values for JSON."""
    return {
        "only_first": [hit_data(hit, start) for hit in found.only_first],
        "only_second": [hit_data(hit, start) for hit in found.only_second],
        "other_time": [
            {"first": hit_data(one, start), "second": hit_data(other, start)}
            for one, other in found.other_time
        ],
    }
