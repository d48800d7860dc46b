"""Limits are learned from what honest sources show, and written as a policy that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.gauges import LEARNED
from rstguard.engine.ruleset import SECOND, Measure
from rstguard.engine.wire import ACK, FIN, RST, SYN
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from rstguard.replay.learn import Lesson, Proposal, learn, limit_for, percentile, quantity
from rstguard.replay.proposal import policy_text
from tests.replay.captures import NEXT, Traffic, write
from tests.replay.commands import BASE, LITTLE, RULES, run

HONEST, ATTACKER = "198.51.100.7", "192.0.2.9"


def traffic() -> Traffic:
    """One honest source with a little of everything, and an attacker that never says a word."""
    made = Traffic()
    for number in range(6):
        made.visit(number / 10, HONEST, source_port=2000 + number)
    for number in range(4):
        made.visit(20 + number, HONEST, source_port=2100 + number, port=8000 + number)
    for number in range(3):
        target = f"203.0.113.{number + 20}"
        made.syn(30 + number, HONEST, target=target)
    for number in range(2):
        made.client(40 + number / 10, SYN | FIN, HONEST)
    made.open(41, HONEST, source_port=3000)
    made.client(41.1, RST | ACK, HONEST, source_port=3000, **NEXT)
    for number in range(5):
        made.open(50, HONEST, source_port=4000 + number)
    for second in range(50, 111, 5):
        made.say(second + 0.5, bytes(1000), HONEST, source_port=4000)
        made.answer(second + 0.6, bytes(100), HONEST, source_port=4000)
    for number in range(500):
        made.syn(60 + number / 100, ATTACKER, port=1 + number)
        made.client(70 + number / 100, ACK, ATTACKER, source_port=1 + number)
    return made


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    file = write(tmp_path_factory.mktemp("learn"), traffic())
    return learn(compile_policy(parse(BASE, "base.yaml").policy), file, 2.0)


def of(lesson: Lesson, name: str) -> Proposal:
    return next(one for one in lesson.proposals if one.rule.name == name)


SHOWN = {
    "syn": 6, "net": 19, "rate": 16, "half": 8, "ports": 4, "hosts": 4, "flags": 2, "resets": 1,
    "short": 11, "many": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_the_honest_source_shows_of_each_measure(lesson: Lesson, name: str) -> None:
    assert lesson.productive == 1
    proposal = of(lesson, name)
    assert proposal.values == (SHOWN[name],)
    assert proposal.taken is not None
    assert proposal.taken.limit >= 2 * SHOWN[name]
    assert proposal.taken.productive_hits == 0


def test_the_attacker_is_seen_but_not_learned_from(lesson: Lesson) -> None:
    ports = of(lesson, "ports")
    assert ports.highest[0] == (ATTACKER, 500)
    assert [candidate.hits for candidate in ports.candidates] == [1, 1, 1]
    assert of(lesson, "stray").kept == "no productive source shows any of it"
    assert of(lesson, "stray").highest[0][0] == ATTACKER


def test_what_the_sweep_sees(lesson: Lesson) -> None:
    assert of(lesson, "bytes").values[0] in range(700, 1000)
    assert of(lesson, "slow").kept == ""
    (idle,) = of(lesson, "idle").values
    assert 4 * SECOND <= idle <= 6 * SECOND
    assert of(lesson, "idle").taken is not None
    (age,) = of(lesson, "age").values
    assert 58 * SECOND <= age <= 61 * SECOND
    service = of(lesson, "service")
    assert ("203.0.113.10:80", 13) in service.highest


def test_a_short_capture_does_not_tell_of_times(tmp_path: Path) -> None:
    short = Traffic()
    for second in range(12):
        short.visit(second, HONEST, source_port=1000 + second)
    short.open(0, HONEST)
    for second in range(12):
        short.say(second + 0.3, bytes(100), HONEST)
        short.answer(second + 0.4, bytes(100), HONEST)
    found = learn(compile_policy(parse(BASE, "b").policy), write(tmp_path, short), 2.0)
    for name in ("idle", "age", "slow"):
        assert of(found, name).taken is None
        assert "too short" in of(found, name).kept


def test_the_proposal_is_a_policy_that_says_why(lesson: Lesson) -> None:
    text = policy_text(BASE, lesson)
    loaded = parse(text, "proposed.yaml")
    assert all("WebSockets" in warning.message for warning in loaded.warnings)
    rules = {rule.name: rule for rule in loaded.policy.rules}
    compiled = {rule.name: rule for rule in compile_policy(loaded.policy).rules}
    for proposal in lesson.proposals:
        name = proposal.rule.name
        limit = proposal.taken.limit if proposal.taken else proposal.rule.limit
        assert compiled[name].limit == limit, name
    assert compiled["syn"].burst == 3 * compiled["syn"].limit
    assert rules["syn"].then == "ban"
    assert "# what the base says stays" in text
    assert "# about syn" in text
    assert "# syn: 1 productive source shows at most: half 6/s" in text
    assert "12/s" not in text.replace("15/s", "")
    assert "<- taken; the base has 100/s" in text
    assert "# stray: the limit of the base is kept: no productive source shows any of it." in text


def test_a_wider_margin_gives_wider_limits(tmp_path: Path) -> None:
    file = write(tmp_path, traffic())
    ruleset = compile_policy(parse(BASE, "base.yaml").policy)
    narrow, wide = (learn(ruleset, file, margin) for margin in (1.0, 10.0))
    for name in SHOWN:
        one, other = of(narrow, name).taken, of(wide, name).taken
        assert one is not None
        assert other is not None
        assert one.limit < other.limit


@pytest.mark.parametrize(
    ("measure", "amount", "margin", "limit"),
    [
        (Measure.SYN_RATE, 6, 2.0, 15),
        (Measure.SYN_RATE, 1, 2.0, 2),
        (Measure.SYN_RATE, 41, 2.0, 100),
        (Measure.SYN_RATE, 333, 3.0, 1000),
        (Measure.DISTINCT_PORTS, 4000, 2.0, 4096),
        (Measure.IDLE, 7 * SECOND, 2.0, 15 * SECOND),
        (Measure.IDLE, 10**18, 2.0, 30 * 86400 * SECOND),
        (Measure.SLOW, 130, 2.0, 60),
        (Measure.SLOW, 1, 2.0, 1),
    ],
)
def test_limits_are_what_a_person_would_write(
    measure: Measure, amount: int, margin: float, limit: int
) -> None:
    assert limit_for(measure, amount, margin) == limit


def test_percentiles_are_by_nearest_rank() -> None:
    values = list(range(1, 1001))
    assert [percentile(values, p) for p in (500, 990, 999, 1000)] == [500, 990, 999, 1000]
    assert percentile([7], 999) == 7


@given(st.sampled_from(sorted(LEARNED, key=str)), st.integers(0, 10**19), st.floats(1, 100))
def test_any_limit_can_be_written_and_read(measure: Measure, amount: int, margin: float) -> None:
    limit = limit_for(measure, min(amount, 10**12), margin)
    text = next(text for text in RULES.values() if f"measure: {measure.value}," in text)
    key = "under" if measure is Measure.SLOW else "over"
    base = f"version: 1\nprotect: {{interfaces: [a]}}\nrules:\n  - {{name: it, {text}}}\n"
    (rule,) = compile_policy(parse(base, "b").policy).rules
    old = text.partition(f"{key}: ")[2].partition(",")[0]
    new = base.replace(f"{key}: {old}", f"{key}: {quantity(rule, limit)}")
    (rule,) = compile_policy(parse(new, "b").policy).rules
    assert rule.limit <= limit
    assert rule.limit * 10 >= limit * 9


def test_the_command_writes_a_good_policy_and_overwrites_nothing(tmp_path: Path) -> None:
    file, out = write(tmp_path, traffic()), tmp_path / "proposed.yaml"
    done = run("learn", *LITTLE, file, "--out", out)
    assert done.returncode == 0, done.stderr
    assert b"limits from 1 productive source in" in done.stdout
    assert run("check", out).returncode == 0
    assert "destinations" not in out.read_text().replace("`destinations`", "")
    before = out.read_text()
    done = run("learn", *LITTLE, file, "--out", out)
    assert done.returncode == 1
    assert b"exists: name another file, or overwrite it with --force" in done.stderr
    base = tmp_path / "base.yaml"
    base.write_text(BASE)
    done = run("learn", *LITTLE, file, "--out", out, "--force", "--base", base, "--json")
    data: Any = json.loads(done.stdout)
    assert {rule["rule"]: rule["limit"] for rule in data["rules"]}["syn"] == "15/s"
    assert out.read_text() != before
    assert run("check", out).returncode == 0


def test_from_too_little_nothing_is_proposed(tmp_path: Path) -> None:
    file, out = write(tmp_path, traffic()), tmp_path / "proposed.yaml"
    done = run("learn", file, "--out", out)
    assert done.returncode == 1
    assert not out.exists()
    said = done.stderr.decode()
    assert "there are 1 productive sources of 100 and " in said
    assert " of 1h; take a longer capture" in said
    assert said.count("\n") == 1
    said = run("learn", file, "--out", out, "--least-sources", "1").stderr.decode()
    assert "sources of" not in said
    assert " of 1h; " in said
    assert run("learn", file, "--out", out, "--least-time", "x").returncode == 2


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    file, out, bad = write(tmp_path, traffic()), tmp_path / "out.yaml", tmp_path / "bad.yaml"
    bad.write_text("version: 2\n")
    assert run("learn", *LITTLE, file, "--out", out, "--base", bad).returncode == 4
    assert run("learn", *LITTLE, bad, "--out", out).returncode == 1
    assert run("learn", *LITTLE, file, "--out", out, "--base", tmp_path / "none").returncode == 1
    assert run("learn", *LITTLE, file, "--out", tmp_path / "none" / "out.yaml").returncode == 1
    assert not out.exists()


CDN, CDN6 = "192.0.2.200", "2001:db8:7::1"


def behind_a_cdn(address: str, seconds: int = 40) -> Traffic:
    """Many connections of one source that go on, beside two each of others."""
    made = Traffic()
    for number in range(60):
        for own, port in ((address, 2000 + number), (f"198.51.100.{number // 2}", 3000 + number)):
            made.open(number / 10, own, source_port=port)
            made.say(number / 10 + 0.01, b"hello", own, source_port=port)
            made.answer(number / 10 + 0.02, b"hello", own, source_port=port)
    made.visit(seconds, HONEST, source_port=9)
    return made


@pytest.mark.parametrize("address", [CDN, CDN6])
def test_a_source_that_carries_a_large_share_is_named(tmp_path: Path, address: str) -> None:
    base, out = tmp_path / "base.yaml", tmp_path / "proposed.yaml"
    base.write_text(BASE + "large_sources: {after: 10s}\n")
    file = write(tmp_path, behind_a_cdn(address))
    done = run("learn", *LITTLE, file, "--out", out, "--base", base)
    named = "2001:db8:7::/64" if ":" in address else address
    said = f"{named} carries 50% of all proven connections: if it is a proxy, "
    assert f"note: {said}" in done.stderr.decode()
    assert f"# Note: {said}" in out.read_text()
    assert run("check", out).returncode == 0
    done = run("learn", *LITTLE, file, "--out", out, "--base", base, "--json", "--force")
    (row,) = json.loads(done.stdout)["large_sources"]
    assert (row["source"], row["percent"], row["connections"]) == (named, 50, 60)
    assert "`large_sources: {ordinary: [...]}`" in row["advice"]

    settled = BASE + f'large_sources: {{after: 10s, ordinary: ["{named}"]}}\n'
    for text in (BASE, settled):  # by default it takes ten minutes
        base.write_text(text)
        done = run("learn", *LITTLE, file, "--out", out, "--base", base, "--json", "--force")
        assert json.loads(done.stdout)["large_sources"] == []
