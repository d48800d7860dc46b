"""``rstguard lab`` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rstguard", "lab", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def test_list_shows_every_scenario() -> None:
    done = lab("list", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 22


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no-such"], "There is no scenario 'no-such'"),
        (["slowloris", "--seconds", "1"], "slowloris shows nothing in 1 s"),
    ],
)
def test_a_wrong_request_is_answered_in_a_sentence(words: list[str], sentence: str) -> None:
    done = lab("run", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert done.stdout == ""


@pytest.mark.netns
def test_a_port_scan_is_contained_and_the_clients_do_not_notice() -> None:
    done = lab("run", "port-scan", "--json", "--seconds", "3", "--beside")
    assert done.returncode == 0, done.stdout + done.stderr
    (scenario,) = json.loads(done.stdout)["scenarios"]
    without, guarded = scenario["without"], scenario["with"]
    assert guarded["legitimate"]["success_percent"] >= 99
    assert guarded["reached"]["syns"] < without["reached"]["syns"] / 10
    assert scenario["hand_written"]["reached"]["syns"] < without["reached"]["syns"]
    assert guarded["reached"]["seconds_to_contain"] is not None
    assert [ban["source"] for ban in guarded["guard"]["bans"]] == ["192.0.2.66"]
    assert guarded["guard"]["leftovers"] == []


@pytest.mark.netns
def test_innocents_and_other_rules_keep_going_under_attacks_on_the_guard() -> None:
    done = lab("run", "poisoned-window", "forged-resets", "cap", "--json", "--seconds", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    poisoned, forged, cap = json.loads(done.stdout)["scenarios"]
    for scenario, innocents in ((poisoned, 20), (forged, 40)):
        assert scenario["without"]["innocents"]["lost"] > innocents // 2
        assert scenario["with"]["innocents"] == {"innocents": innocents, "lost": 0, "refused": 0}
    assert cap["with"]["guard"]["counts"]["capped"] == {"ssh-rate": 1}
    bans = {(row["kind"], row["source"]) for row in cap["with"]["guard"]["bans"]}
    assert {("ban", "192.0.2.66"), ("shun", "2001:db8:ba00::/48")} <= bans
