"""`rstguard policy replay` as a user runs it: what it prints, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.replay.captures import Traffic, pcap, write
from tests.replay.commands import run

POLICY = """
version: 1
name: strict
protect: {interfaces: [nowhere0]}
rules:
  - {name: brute, measure: short_connections, ports: [22], shorter_than: 10s, over: 5/m,
     then: ban, for: 10m}
  - {name: idle, measure: idle, ports: [80], over: 10s, then: reset}
"""
BAD, GOOD = "198.51.100.7", "198.51.100.8"


def answer(*words: str | Path) -> Any:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def traffic() -> Traffic:
    traffic = Traffic()
    for number in range(20):
        traffic.visit(number, BAD, source_port=2000 + number, port=22)
    traffic.open(1, GOOD)
    traffic.visit(30, GOOD, source_port=40001)
    return traffic


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "strict.yaml"
    file.write_text(POLICY)
    return file


@pytest.fixture
def capture(tmp_path: Path, traffic: Traffic) -> Path:
    return write(tmp_path, traffic)


def test_tables_say_who_when_by_which_rule_and_why(policy: Path, capture: Path) -> None:
    done = run("replay", policy, capture)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # that the interface is not here does not matter
    text = " ".join(done.stdout.decode().split())
    for words in (
        "171 packets in 30.0 s from 2023-11-14T22:13:20.000+00:00",
        "banned 198.51.100.7 brute 5.020",
        "brute: the source ended connections early more often than the rule allows",
        "198.51.100.8:40000 > 203.0.113.10:80 idle",
    ):
        assert words in text


def test_json_has_the_same(policy: Path, capture: Path) -> None:
    data = answer("replay", policy, capture)
    ban, reset = data["hits"]
    assert (ban["kind"], ban["source"], ban["rule"]) == ("ban", BAD, "brute")
    assert ban["reason"] == "short_connections"
    assert ban["time"] == "2023-11-14T22:13:25.020+00:00"
    assert ban["packets_not_arrived"] > 60
    assert ban["productive_before"] == 5
    assert reset["connection"] == f"{GOOD}:40000 > 203.0.113.10:80"
    assert data["packets"] == 8 * 20 + 3 + 8
    totals = {total["rule"]: total for total in data["totals"]}
    assert totals["brute"]["subjects"] == {"ban": 1}
    assert totals["idle"]["connections_not_arrived"] == 1


def test_events_go_to_a_file_line_by_line(policy: Path, capture: Path, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    run("replay", policy, capture, "--events", events)
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [(line["kind"], line["rule"]) for line in lines] == [("ban", "brute"), ("reset", "idle")]
    assert lines[0]["subject"] == BAD
    assert lines[0]["enforced"]
    done = run("replay", policy, capture, "--events", tmp_path / "none" / "events")
    assert done.returncode == 1
    assert b"cannot be written" in done.stderr


def test_top_cuts_the_tables_and_says_so(policy: Path, tmp_path: Path, traffic: Traffic) -> None:
    for number in range(9):
        traffic.open(1, GOOD, source_port=3000 + number)
    text = run("replay", policy, write(tmp_path, traffic), "--top", "4").stdout.decode()
    assert "and 6 more: --top 0 shows all" in text
    text = run("replay", policy, write(tmp_path, traffic), "--top", "0").stdout.decode()
    assert "more:" not in text
    assert text.count("> 203.0.113.10:80") == 10


def test_mode_replaces_the_policys_own(policy: Path, capture: Path) -> None:
    data = answer("replay", policy, capture, "--mode", "observe")
    assert not data["enforced"]
    assert {hit["packets_not_arrived"] for hit in data["hits"]} == {0}
    assert "only observes" in run("replay", policy, capture, "--mode", "observe").stdout.decode()


def test_against_tells_what_only_one_would_have_hit(
    policy: Path, capture: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.replace("over: 5/m", "over: 8/m").replace("over: 10s", "over: 20m"))
    data = answer("replay", policy, capture, "--against", other)
    differences = data["differences"]
    assert [hit["rule"] for hit in differences["only_first"]] == ["idle"]
    assert differences["only_second"] == []
    (both,) = differences["other_time"]
    assert both["first"]["source"] == both["second"]["source"] == BAD
    assert both["first"]["offset_s"] < both["second"]["offset_s"]
    text = run("replay", policy, capture, "--against", other).stdout.decode()
    assert f"Only {policy} would have hit 1:" in text
    assert "Both would have hit 1, but not at the same time:" in text
    text = run("replay", policy, capture, "--against", policy).stdout.decode()
    assert "do the same to this capture" in text


def test_standard_input_is_read(policy: Path, traffic: Traffic) -> None:
    done = run("replay", policy, "-", data=pcap(traffic.in_order))
    assert done.returncode == 0, done.stderr
    assert b"standard input" in done.stdout
    assert b"198.51.100.7" in done.stdout


def test_a_bad_policy_is_status_4_and_a_bad_capture_status_1(policy: Path, capture: Path) -> None:
    done = run("replay", capture, policy)
    assert done.returncode == 4
    done = run("replay", policy, policy)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("rstguard: ")
    assert len(done.stderr.decode().splitlines()) == 1
    assert run("replay", policy, policy.parent / "none.pcap").returncode == 1


def test_a_broken_capture_is_used_and_told(policy: Path, capture: Path) -> None:
    capture.write_bytes(capture.read_bytes()[:-3])
    done = run("replay", policy, capture)
    assert done.returncode == 0
    assert "breaks off after packet 170" in " ".join(done.stdout.decode().split())


def test_what_the_capture_cannot_tell_is_said(policy: Path, tmp_path: Path) -> None:
    one_way = Traffic()
    one_way.syn(1)
    (note,) = answer("replay", policy, write(tmp_path, one_way))["notes"]
    assert "capture both directions" in note
    policy.write_text(
        POLICY.replace("[nowhere0]", "[nowhere0], ports: [443]").replace("[22]", "[443]")
    )
    (note,) = answer("replay", policy, write(tmp_path, one_way))["notes"]
    assert "protect.destinations" in note


def test_a_policy_that_bans_too_many_is_told_of(policy: Path, tmp_path: Path) -> None:
    policy.write_text(POLICY.replace("version: 1", "version: 1\nbans_per_minute: 2"))
    for most, notes in ((2, 0), (3, 1)):
        traffic = Traffic()
        for source in range(most):
            for number in range(9):
                traffic.visit(number, f"10.0.{source}.1", source_port=2000 + number, port=22)
        data = answer("replay", policy, write(tmp_path, traffic))
        assert [hit["kind"] for hit in data["hits"]] == ["ban"] * most
        assert len(data["notes"]) == notes
    assert "would let it shun instead for a while" in data["notes"][0]
