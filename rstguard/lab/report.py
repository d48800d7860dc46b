"""Figures of a run, and how they are shown: pure, from measured values to table and JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from rich.table import Table

from rstguard.lab.client import Request
from rstguard.lab.containment import contained_when, held_contained, rate_contained
from rstguard.lab.innocents import Innocent
from rstguard.lab.observer import Observation
from rstguard.lab.scenarios import FAILED, HELD, LEARNED, LOST, Scenario
from rstguard.lab.topology import ATTACKER, ATTACKERS, ATTACKERS6

_TOLD = (
    ("verdict.drop", "packets dropped on a worker's word"),
    ("ended_by_ban", "connections ended with their source's ban"),
    ("confirmed", "resets confirmed by the connection table"),
    ("outlived", "connections ended that only the gateway believed to be over"),
    ("forged_resets", "forged RSTs found out and dropped"),
    ("window_cured", "connections freed from a window that was moved"),
)
"""Counts of ``rstguard status`` that are shown as one number."""
WITHOUT, WRITTEN, GUARDED = "without", "hand-written rules", "with rstguard"
"""What an attack can meet."""
_MOST_BANS = 10
"""Bans and shuns that are shown one by one."""


@dataclass(frozen=True, slots=True)
class Legitimate:
    """How the legitimate clients fared; latencies in milliseconds, of successes only."""

    requests: int
    succeeded: int
    success_percent: float
    p50_ms: float | None
    p99_ms: float | None
    failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class Reached:
    """What of the attack reached the server.

    `learned` is how many open ports it found, None if it looked for none.  `seconds_to_contain`
    counts from the attack's first packet at the server; None: not contained.
    """

    packets: int
    syns: int
    most_held: int
    most_half_open: int
    held_at_end: int
    seconds_to_contain: float | None
    learned: int | None = None


@dataclass(frozen=True, slots=True)
class Innocents:
    """How those fared at whose cost the attack was made.

    Each had a connection: `lost` of these carry no data afterwards, and `refused` innocents get no
    new one.
    """

    innocents: int
    lost: int
    refused: int


@dataclass(frozen=True, slots=True)
class Guard:
    """What the guard says that it did, and the processor time it used (% of one core)."""

    cpu_percent: float
    counts: dict[str, Any]
    bans: list[dict[str, Any]]
    leftovers: list[str]


@dataclass(frozen=True, slots=True)
class Half:
    """One half of a scenario: without the guard (`guard` is None) or with it."""

    seconds: float
    legitimate: Legitimate
    reached: Reached
    guard: Guard | None = None
    innocents: Innocents | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A scenario's two halves, or the sentence that says why it could not run.

    `written` is how hand-written rules fared beside them, if that was asked for.
    """

    scenario: Scenario
    without: Half | None = None
    guarded: Half | None = None
    error: str = ""
    written: Half | None = None
    problems: list[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "problems", _problems(self))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` (0 < p <= 100) of the values do not exceed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def legitimate(requests: Sequence[Request], begin: float, end: float) -> Legitimate:
    """Sum up the requests that began while the attack went on."""
    during = [request for request in requests if begin <= request.start < end]
    good = [request.seconds * 1000 for request in during if not request.failure]
    return Legitimate(
        requests=len(during),
        succeeded=len(good),
        success_percent=round(100 * len(good) / len(during), 2) if during else 0.0,
        p50_ms=round(percentile(good, 50), 2) if good else None,
        p99_ms=round(percentile(good, 99), 2) if good else None,
        failures=dict(Counter(request.failure for request in during if request.failure)),
    )


def sum_up(innocents: Sequence[Innocent]) -> Innocents:
    """Sum up how the innocents fared."""
    return Innocents(
        innocents=len(innocents),
        lost=sum(not one.keeps for one in innocents),
        refused=sum(not one.served for one in innocents),
    )


def reached(
    seen: Observation,
    scenario: Scenario,
    begin: float,
    end: float,
    honest: Legitimate,
    innocents: Innocents | None = None,
    learned: int | None = None,
) -> Reached:
    """Sum up what the server saw between begin and end of the attack."""
    samples = [sample for sample in seen.samples if begin <= sample.time < end]
    held = [row for row in seen.held if begin <= row.time < end]
    first = next((sample.time for sample in samples if sample.packets), begin)
    contained: float | None
    if scenario.measure == HELD:
        contained = held_contained(held, first, scenario.limit)
    elif scenario.measure == LOST:
        contained = 0.0 if innocents and innocents.lost <= scenario.limit else None
    elif scenario.measure == LEARNED:
        contained = 0.0 if learned is not None and learned <= scenario.limit else None
    elif scenario.measure == FAILED:
        contained = 0.0 if 100 - honest.success_percent <= scenario.limit else None
    else:
        contained = rate_contained(samples, first, scenario)
    return Reached(
        packets=sum(sample.packets for sample in samples),
        syns=sum(sample.syns for sample in samples),
        most_held=max((row.established for row in held), default=0),
        most_half_open=max((row.half_open for row in held), default=0),
        held_at_end=held[-1].established if held else 0,
        seconds_to_contain=None if contained is None else round(contained, 2),
        learned=learned,
    )


def document(results: Sequence[Result]) -> dict[str, Any]:
    """Return the value that ``--json`` prints."""
    return {
        "passed": all(not result.problems for result in results),
        "scenarios": [
            {
                "name": result.scenario.name,
                "summary": result.scenario.summary,
                "contained_when": contained_when(result.scenario),
                "without": asdict(result.without) if result.without else None,
                "with": asdict(result.guarded) if result.guarded else None,
                **({"hand_written": asdict(result.written)} if result.written else {}),
                "problems": result.problems,
            }
            for result in results
        ],
    }


def table(result: Result) -> Table:
    """Return a scenario's figures as a table, with a column for each half."""
    shown = Table(title=f"{result.scenario.name}: {result.scenario.summary}", title_justify="left")
    shown.add_column("")
    columns = []
    halves = (result.without, result.written, result.guarded)
    for met, half in zip((WITHOUT, WRITTEN, GUARDED), halves, strict=True):
        if half:
            shown.add_column(met, justify="right")
            columns.append(_column(half))
    for label in columns[0] if columns else ():
        shown.add_row(label, *(column[label] for column in columns))
    return shown


def guard_lines(guard: Guard) -> list[str]:
    """Return what was reset, shunned, banned, gated and capped, one line each."""
    lines = [
        f"{what}: " + ", ".join(f"{count} by {rule}" for rule, count in by_rule.items())
        for what in ("reset", "shun", "ban", "gated", "capped")
        if isinstance(by_rule := guard.counts.get(what), dict) and by_rule
    ]
    lines += [f"{text}: {guard.counts[name]:,}" for name, text in _TOLD if guard.counts.get(name)]
    lines += [
        f"{ban.get('kind')}: {ban.get('source')} by {ban.get('rule')}, "
        f"{ban.get('remaining_s')} s to go"
        for ban in guard.bans[:_MOST_BANS]
    ]
    if (more := len(guard.bans) - _MOST_BANS) > 0:
        lines.append(f"and {more} more")
    return lines


def _column(half: Half) -> dict[str, str]:
    good, seen = half.legitimate, half.reached
    return {
        "legitimate success": f"{good.success_percent:.1f} %",
        "legitimate p50 / p99": f"{_ms(good.p50_ms)} / {_ms(good.p99_ms)}",
        "legitimate failures": ", ".join(f"{n} {why}" for why, n in good.failures.items())
        or "none",
        "attack packets at server": f"{seen.packets:,}",
        "attack SYNs at server": f"{seen.syns:,}",
        "attacker held, most / at end": f"{seen.most_held:,} / {seen.held_at_end:,}",
        "attacker half-open, most": f"{seen.most_half_open:,}",
        **({} if seen.learned is None else {"open ports found": str(seen.learned)}),
        **_innocents_rows(half.innocents),
        "contained": _contained(seen.seconds_to_contain),
        "processor time of the guard": f"{half.guard.cpu_percent:.1f} %" if half.guard else "",
    }


def _innocents_rows(fared: Innocents | None) -> dict[str, str]:
    if fared is None:
        return {}
    return {
        "innocents' connections lost": f"{fared.lost} of {fared.innocents}",
        "innocents refused afterwards": f"{fared.refused} of {fared.innocents}",
    }


def _contained(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return f"after {seconds:.2f} s" if seconds else "never over the limit"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _problems(result: Result) -> list[str]:
    if result.error or not result.without or not result.guarded:
        return [result.error or "the scenario did not run to its end"]
    found = []
    good, seen = result.guarded.legitimate, result.guarded.reached
    if result.without.reached.seconds_to_contain is not None:
        found.append("the attack was none: without the guard it stayed below the limit, too")
    if not good.success_percent >= result.scenario.success:
        found.append(f"only {good.success_percent} % of the legitimate requests succeeded")
    if seen.seconds_to_contain is None:
        found.append(f"not contained: that is, {contained_when(result.scenario)}")
    fared = result.guarded.innocents
    if fared and (fared.lost or fared.refused):
        found.append(
            f"innocents: {fared.lost} connections lost, {fared.refused} refused afterwards"
        )
    if banned := _banned_wrongly(result.guarded.guard):
        found.append("banned for what others did: " + ", ".join(banned))
    if result.guarded.guard and result.guarded.guard.leftovers:
        found.append("the guard left behind: " + "; ".join(result.guarded.guard.leftovers))
    return found


def _banned_wrongly(guard: Guard | None) -> list[str]:
    """Return the sources that were banned and are none of the attacker's."""
    bans = guard.bans if guard else []
    sources = [str(ban["source"]) for ban in bans if ban["kind"] == "ban"]
    return [source for source in sources if not _is_attackers(source)]


def _is_attackers(source: str) -> bool:
    network = ip_network(source)
    if isinstance(network, IPv6Network):
        return network.subnet_of(IPv6Network(ATTACKERS6))
    return source == ATTACKER or network.subnet_of(IPv4Network(ATTACKERS))
