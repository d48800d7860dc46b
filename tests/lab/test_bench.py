"""The comparison of guards: what its figures say, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rstguard.lab.bench.counting import Arrivals, contained
from rstguard.lab.bench.floods import FLOODS, trafgen_packet
from rstguard.lab.bench.measure import Run
from rstguard.lab.bench.peers import GATEWAY, PEERS, configuration
from rstguard.lab.bench.report import chart, document, goals, markdown, spread
from rstguard.lab.report import Legitimate
from rstguard.policy.load import parse

BENCH = [sys.executable, "-m", "rstguard", "lab", "bench"]


def run(
    peer: str, served: int = 100, p99: float = 2.0, flood: str = "forged", turn: int = 0
) -> Run:
    fared = Legitimate(100, served, float(served), 1.0, p99, {})
    return Run(flood, peer, turn, fared, fared, 100_000, 300, 5.0, 0.2, 4.0)


def test_goals_compare_runs_of_the_same_round() -> None:
    runs = [run("rstguard", p99=2.0 + turn, turn=turn) for turn in range(3)]
    runs += [run("iptables", p99=2.0 * (2.0 + turn), turn=turn) for turn in (2, 1, 0)]
    found = {goal.name: goal for goal in goals(runs)}
    ratio = found["forged: p99 of known clients, rstguard / iptables"]
    assert (ratio.low, ratio.value, ratio.high, ratio.met) == (0.5, 0.5, 0.5, True)
    assert found["forged: at the server"].value == pytest.approx(0.3)
    assert not goals([run("rstguard", served=98)])[0].met


def test_a_flood_outside_the_budget_must_serve_no_fewer_than_without() -> None:
    pair = [run("rstguard", 99, flood="outside"), run("none", 100, flood="outside")]
    assert next((goal.value, goal.met) for goal in goals(pair)) == (-1.0, False)


def test_not_contained_once_is_not_contained() -> None:
    def seen(*counts: int) -> list[Arrivals]:
        return [Arrivals(1 + 0.02 * number, count) for number, count in enumerate(counts)]

    calm = [0] * 10
    assert contained(seen(*calm, 500, 500, *calm)) == 0.04
    assert contained(seen(*calm, 500, *calm, 11, *calm)) == 0.24
    assert contained(seen(*calm, 500, 500)) is None
    assert contained(seen(*calm, 3, *calm, 3)) == 0
    assert spread([0.2, None]) == "in 1 of 2: 0.2"
    assert spread([None]) == "-"
    assert spread([1.0, 3.0, 2.0]) == "2.0 (1.0 to 3.0)"


def test_tables_chart_and_json_hold_every_run() -> None:
    runs = [run(peer.name, flood=flood.name) for peer in PEERS for flood in FLOODS]
    assert len(json.loads(json.dumps(document(runs)))["runs"]) == len(runs)
    rows = [line for line in markdown(runs).splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + len(FLOODS) + len(runs) + len(goals(runs))
    assert rows[1] == "| forged |" + " 100 %, 2.0 ms |" * len(PEERS)
    drawn = ET.fromstring(chart(runs))  # noqa: S314 - our own text
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == len(runs)


def test_every_peer_shows_its_configuration() -> None:
    shown = subprocess.run([*BENCH, "--show-configs"], capture_output=True, text=True, check=True)
    for peer in PEERS:
        for name in peer.files:
            assert configuration(name) in shown.stdout
    assert configuration(GATEWAY) in shown.stdout
    assert parse(configuration("rstguard.yaml"), "bench").policy.name == "bench"
    assert "drnd(3)" in trafgen_packet(FLOODS[0], "02:00:00:00:00:01")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--flood", "sea"], "There is no flood 'sea'; there are forged, "),
        (["--peer", "luck"], "There is no peer 'luck'; there are none, rstguard"),
    ],
)
def test_unknown_names_are_answered_with_those_there_are(words: list[str], sentence: str) -> None:
    done = subprocess.run([*BENCH, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(sentence)


@pytest.mark.netns
def test_a_short_round_through_the_command(tmp_path: Path) -> None:
    """One source, so that the server stands it: both guards serve honest clients."""
    words = ["--flood", "one-source", "--peer", "rstguard", "--peer", "iptables"]
    words += ["--rounds", "1", "--seconds", "2", "--json", "--out", str(tmp_path / "bench.json")]
    words += ["--table", str(tmp_path / "bench.md"), "--chart", str(tmp_path / "bench.svg")]
    done = subprocess.run([*BENCH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "bench.json").read_text())
    assert [row["peer"] for row in told["runs"]] == ["rstguard", "iptables"]
    for row in told["runs"]:
        assert row["sent"] > 2000
        assert row["arrived_percent"] < 10
        assert row["known"]["requests"] > 20
        # SYNPROXY with time stamps makes one connection in a hundred wait: the other is no measure.
        least = 99 if row["peer"] == "rstguard" else 90
        assert min(row[kind]["success_percent"] for kind in ("known", "new")) >= least
    assert "one-source" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.svg").stat().st_size > 500
