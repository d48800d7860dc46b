"""`rstguard events`: of a running guard, and from files of any content."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rstguard.cli import app
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts

POLICY = "version: 1\nname: told\nprotect: {interfaces: [out]}\nrules: []\n"
RECORD = {
    "number": 1, "time": 1_800_000_000.5, "kind": "ban", "subject": "198.51.100.7",
    "rule": "syn-rate", "reason": "syn_rate", "why": "too fast", "detail": "", "enforced": True,
}  # fmt: skip


def shown(path: Path, *words: str) -> list[str]:
    done = CliRunner().invoke(app, ["events", "--from", str(path), *words])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def test_a_file_is_read_and_filtered(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    other = RECORD | {"kind": "reset", "subject": "[2001:db8::7]:4000 -> [2001:db8::1]:80"}
    third = RECORD | {
        "kind": "reset",
        "subject": "198.51.100.9:4000 -> 203.0.113.1:80",
        "rule": "x",
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in (RECORD, other, third)))
    assert len(shown(path)) == 3
    assert "ban 198.51.100.7 by rule syn-rate: too fast" in shown(path, "--kind", "ban")[0]
    assert len(shown(path, "--source", "198.51.100.0/24")) == 2
    assert len(shown(path, "--source", "2001:db8::/32")) == 1
    assert len(shown(path, "--rule", "x")) == 1
    assert json.loads(shown(path, "--json", "-n", "1")[0])["rule"] == "x"


def test_terminals_are_not_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(RECORD | {"subject": "\x1b[2J\x07"}) + "\n")
    assert "\x1b" not in shown(path)[0]


@given(st.lists(st.binary(max_size=200) | st.just(json.dumps(RECORD).encode()), max_size=8))
def test_any_file_is_read_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("events") / "file"
    path.write_bytes(b"\n".join(rows))
    shown(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def both_or_one_are_shown(directory: Path, odd: dict[str, object]) -> None:
    path = directory / "file"
    path.write_text(json.dumps(RECORD | odd) + "\n" + json.dumps(RECORD) + "\n")
    assert len(shown(path)) in (1, 2)


odd_fields = st.dictionaries(st.sampled_from(sorted(RECORD)), json_values)


@given(odd_fields)
def test_records_of_odd_values(
    tmp_path_factory: pytest.TempPathFactory, odd: dict[str, object]
) -> None:
    both_or_one_are_shown(tmp_path_factory.mktemp("events"), odd)


@pytest.mark.fuzz_long
@settings(max_examples=20_000)
@given(odd_fields, st.lists(st.binary(max_size=2000), max_size=5))
def test_many_odd_files(
    tmp_path_factory: pytest.TempPathFactory, odd: dict[str, object], rows: list[bytes]
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as directory:
        both_or_one_are_shown(Path(directory), odd)
        (Path(directory) / "junk").write_bytes(b"\n".join(rows))
        shown(Path(directory) / "junk")


def test_wrong_words() -> None:
    for words in (["--kind", "bann"], ["--source", "x"], ["-f", "--from", "x"]):
        assert CliRunner().invoke(app, ["events", *words]).exit_code == 2
    done = CliRunner().invoke(app, ["events", "--from", "/nonexistent"])
    assert done.exit_code == 1
    assert "cannot be read" in done.output


@pytest.fixture
def lab() -> Iterator[ThreeHosts]:
    with ThreeHosts("rge") as lab:
        yield lab


@pytest.mark.netns
def test_a_running_guard_is_followed_and_writes_its_log(lab: ThreeHosts, tmp_path: Path) -> None:
    written = tmp_path / "events.jsonl"
    with Guard(lab, POLICY, tmp_path / "guard", "--event-log", str(written), workers=1) as guard:
        words = [sys.executable, "-m", "rstguard", "events", "-f", "-n", "0", "--kind", "ban"]
        words += ["--runtime-dir", str(guard.runtime)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as following:
            try:
                assert following.stdout is not None
                wait_until(lambda: "start" in guard.cli("events").stdout)
                guard.cli("ban", "add", "198.51.100.8")
                guard.cli("ban", "remove", "198.51.100.8")
                guard.cli("ban", "add", "198.51.100.7")
                # It may have begun to look only after the first.
                while "198.51.100.7" not in following.stdout.readline():
                    pass
            finally:
                following.kill()
    kinds = [json.loads(line)["kind"] for line in written.read_text().splitlines()]
    assert [kind for kind in kinds if kind != "process"] == ["start", "ban", "unban", "ban", "stop"]


@pytest.mark.netns
def test_it_follows_the_next_guard_too_and_ends_with_its_reader(
    lab: ThreeHosts, tmp_path: Path
) -> None:
    with Guard(lab, POLICY, tmp_path / "guard", workers=1) as guard:
        words = [sys.executable, "-m", "rstguard", "events", "-f", "-n", "1"]
        words += ["--runtime-dir", str(guard.runtime)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, text=True, **pipes) as following:  # type: ignore[call-overload]
            wait_until(lambda: "start told" in following.stdout.readline())
            guard.kill9()
            assert "waiting for the next" in following.stderr.readline()
            guard.start()
            wait_until(lambda: "start told" in following.stdout.readline())
            following.stdout.close()
            assert following.wait(10) == 0
