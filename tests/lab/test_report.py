"""From measured values to figures: fixed input, figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from rstguard.lab.client import Request
from rstguard.lab.containment import held_contained, rate_contained
from rstguard.lab.innocents import Innocent
from rstguard.lab.observer import Held, Observation, Sample
from rstguard.lab.report import (
    Guard,
    Half,
    Innocents,
    Legitimate,
    Reached,
    Result,
    document,
    guard_lines,
    legitimate,
    percentile,
    reached,
    sum_up,
    table,
)
from rstguard.lab.scenarios import find

SYN_FLOOD = find("syn-flood")  # at most 50 SYNs in a second
HOARD = find("idle-hoard")  # at most 100 connections held
POISON = find("poisoned-window")  # no connection lost
SCAN = find("scan-fast")  # at most one open port found
PROOF = find("forged-proof")  # at most 1 % of the legitimate requests failed
NOBODY = Legitimate(0, 0, 0.0, None, None, {})


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.0),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 102)), 99, 100),
        (list(range(1, 101)), 100, 100),
    ],
)
def test_a_percentile_is_the_nearest_rank(
    values: list[float], percent: float, expected: float
) -> None:
    assert percentile(values, percent) == expected


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_only_requests_that_began_under_attack_count() -> None:
    requests = [
        Request(9.9, 5.0, "a", "timed out"),
        Request(10.0, 0.002, "a", ""),
        Request(11.0, 0.004, "b", ""),
        Request(12.0, 3.0, "b", "timed out"),
        Request(19.9, 0.1, "a", "reset"),
        Request(20.0, 0.1, "a", "refused"),
    ]
    assert legitimate(requests, 10.0, 20.0) == Legitimate(
        requests=4,
        succeeded=2,
        success_percent=50.0,
        p50_ms=2.0,
        p99_ms=4.0,
        failures={"timed out": 1, "reset": 1},
    )


def test_no_requests_are_no_success() -> None:
    assert legitimate([], 0, 1) == Legitimate(0, 0, 0.0, None, None, {})


def syns(*per_tenth: int) -> list[Sample]:
    return [Sample(index / 10, count, count) for index, count in enumerate(per_tenth)]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        pytest.param(syns(*[5] * 50), 0.0, id="never over the limit"),
        pytest.param(syns(*[100] * 50), None, id="to the end"),
        pytest.param(syns(*[100] * 10, *[0] * 40), 1.0, id="until they end"),
        pytest.param(syns(*[0] * 30, 250, *[0] * 30), 3.1, id="one burst"),
        pytest.param(syns(*[100] * 5, *[0] * 20, *[100] * 20), None, id="it came back"),
        pytest.param([], 0.0, id="nothing seen"),
    ],
)
def test_a_rate_is_contained_when_no_later_second_is_over(
    samples: list[Sample], expected: float | None
) -> None:
    assert rate_contained(samples, 0.0, SYN_FLOOD) == expected


@pytest.mark.parametrize(
    ("established", "expected"),
    [
        ([0, 50, 100], 0.0),
        ([0, 101, 100], 2.0),
        ([500, 90, 500, 80, 0], 3.0),
        ([0, 500, 500], None),
        ([], 0.0),
    ],
)
def test_held_connections_are_contained_after_the_last_time_over(
    established: list[int], expected: float | None
) -> None:
    held = [Held(float(index), count, 0) for index, count in enumerate(established)]
    assert held_contained(held, 0.0, 100) == expected


def test_time_to_contain_counts_from_the_first_packet_at_the_server() -> None:
    seen = Observation(
        [Sample(9.0, 99, 99), Sample(11.0, 0, 0), Sample(12.0, 300, 150), Sample(13.0, 10, 5)],
        [Held(12.0, 150, 7), Held(13.0, 300, 0), Held(14.0, 80, 0), Held(15.0, 60, 0)],
    )
    assert reached(seen, HOARD, 10.0, 15.0, NOBODY) == Reached(
        packets=310,
        syns=155,
        most_held=300,
        most_half_open=7,
        held_at_end=80,
        seconds_to_contain=2.0,
    )


@pytest.mark.parametrize(("lost", "contained"), [(0, 0.0), (1, None)])
def test_lost_connections_of_innocents_are_not_contained(
    lost: int, contained: float | None
) -> None:
    fared = Innocents(4, lost, refused=0)
    seen = reached(Observation([], []), POISON, 0.0, 1.0, NOBODY, fared)
    assert seen.seconds_to_contain == contained


@pytest.mark.parametrize(("learned", "contained"), [(0, 0.0), (1, 0.0), (2, None), (None, None)])
def test_a_scan_is_contained_by_the_open_ports_that_it_finds(
    learned: int | None, contained: float | None
) -> None:
    seen = reached(Observation([], []), SCAN, 0.0, 1.0, NOBODY, None, learned)
    assert (seen.learned, seen.seconds_to_contain) == (learned, contained)


@pytest.mark.parametrize(("success", "contained"), [(99.0, 0.0), (98.9, None)])
def test_failed_requests_are_not_contained(success: float, contained: float | None) -> None:
    honest = replace(NOBODY, success_percent=success)
    seen = reached(Observation([], []), PROOF, 0.0, 1.0, honest)
    assert seen.seconds_to_contain == contained


def test_innocents_are_counted_by_what_they_have_and_what_they_get() -> None:
    fared = [
        Innocent("a", keeps, served)
        for keeps, served in ((True, True), (False, True), (False, False))
    ]
    assert sum_up(fared) == Innocents(3, lost=2, refused=1)


def half(*, success: float, contained: float | None, guard: Guard | None = None) -> Half:
    good = Legitimate(1000, int(success * 10), success, 1.5, 20.25, {"timed out": 3})
    return Half(8.0, good, Reached(1234, 1000, 50, 5, 0, contained), guard)


GUARD = Guard(
    12.5,
    {"packets": 5, "shun": {"syn-rate": 3}, "reset": {}, "verdict.drop": 1200},
    [{"source": "192.0.2.66", "kind": "shun", "rule": "syn-rate", "remaining_s": 9}],
    [],
)


BANS = [
    {"source": source, "kind": kind}
    for source, kind in (
        ("192.0.2.66", "ban"),
        ("100.65.0.1", "shun"),
        ("100.66.0.1", "ban"),
        ("2001:db8:ba01:1::/64", "ban"),
        ("172.16.1.1", "ban"),
        ("2001:db8:c1::/64", "ban"),
    )
]


def test_a_result_without_problems_passes() -> None:
    result = Result(
        SYN_FLOOD,
        half(success=1.0, contained=None),
        half(success=99.0, contained=0.1, guard=GUARD),
    )
    assert result.problems == []
    written = json.loads(json.dumps(document([result])))
    assert written["passed"] is True
    (scenario,) = written["scenarios"]
    assert scenario["name"] == "syn-flood"
    assert scenario["contained_when"] == "at most 50 attack SYNs a second reach the server"
    assert scenario["without"]["guard"] is None
    assert scenario["without"]["reached"]["seconds_to_contain"] is None
    assert scenario["with"]["legitimate"]["success_percent"] == 99.0
    assert scenario["with"]["guard"]["cpu_percent"] == 12.5


@pytest.mark.parametrize(
    ("without", "guarded", "words"),
    [
        (None, half(success=98.9, contained=0.1, guard=GUARD), "98.9 %"),
        (None, half(success=100.0, contained=None, guard=GUARD), "not contained"),
        (0.5, half(success=100.0, contained=0.1, guard=GUARD), "attack was none"),
        (
            None,
            half(success=100.0, contained=0.1, guard=Guard(1.0, {}, [], ["set rstguard-ban4"])),
            "left behind: set rstguard-ban4",
        ),
        (
            None,
            replace(half(success=100.0, contained=0.0), innocents=Innocents(9, 0, 2)),
            "0 connections lost, 2 refused",
        ),
        (
            None,
            half(success=100.0, contained=0.1, guard=Guard(1.0, {}, BANS, [])),
            "what others did: 100.66.0.1, 2001:db8:c1::/64",
        ),
    ],
)
def test_what_fell_short_is_named(without: float | None, guarded: Half, words: str) -> None:
    result = Result(SYN_FLOOD, half(success=1.0, contained=without), guarded)
    (problem,) = result.problems
    assert words in problem
    assert document([result])["passed"] is False


def test_a_run_that_failed_does_not_pass() -> None:
    result = Result(SYN_FLOOD, error="nmap is missing: apt-get install nmap.")
    assert result.problems == ["nmap is missing: apt-get install nmap."]
    assert Result(SYN_FLOOD, half(success=1.0, contained=None)).problems


def test_the_table_shows_both_halves() -> None:
    result = Result(
        SYN_FLOOD, half(success=1.0, contained=None), half(success=100, contained=0.1, guard=GUARD)
    )
    console = Console(width=120, file=StringIO())
    assert isinstance(console.file, StringIO)
    console.print(table(result))
    cells = [row.strip("│").split("│") for row in console.file.getvalue().splitlines()]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    assert rows["legitimate success"] == ["1.0 %", "100.0 %"]
    assert rows["contained"] == ["never", "after 0.10 s"]
    assert rows["processor time of the guard"] == ["", "12.5 %"]


def test_the_table_shows_how_innocents_fared() -> None:
    without = replace(half(success=100.0, contained=None), innocents=Innocents(20, 20, 3))
    guarded = replace(half(success=100.0, contained=0.0), innocents=Innocents(20, 0, 0))
    console = Console(width=120, file=StringIO())
    assert isinstance(console.file, StringIO)
    console.print(table(Result(POISON, without, guarded)))
    shown = console.file.getvalue()
    assert "20 of 20" in shown
    assert "3 of 20" in shown
    assert "0 of 20" in shown


def test_what_the_guard_did_is_told_in_lines() -> None:
    assert guard_lines(GUARD) == [
        "shun: 3 by syn-rate",
        "packets dropped on a worker's word: 1,200",
        "shun: 192.0.2.66 by syn-rate, 9 s to go",
    ]


def test_of_very_many_bans_some_are_shown() -> None:
    assert guard_lines(replace(GUARD, bans=GUARD.bans * 12))[-2:] == [
        "shun: 192.0.2.66 by syn-rate, 9 s to go",
        "and 2 more",
    ]


def test_hand_written_rules_have_a_column_of_their_own_and_no_say() -> None:
    without, guarded = half(success=1.0, contained=None), half(success=100.0, contained=0.1)
    result = Result(SYN_FLOOD, without, replace(guarded, guard=GUARD), written=without)
    console = Console(width=120, file=StringIO())
    assert isinstance(console.file, StringIO)
    console.print(table(result))
    (head,) = (row for row in console.file.getvalue().splitlines() if "hand-written rules" in row)
    assert head.index("without") < head.index("hand-written rules") < head.index("with rstguard")
    (scenario,) = document([result])["scenarios"]
    assert scenario["hand_written"]["legitimate"]["success_percent"] == 1.0
    assert result.problems == []
