"""What the guard starts with after a restart, and how a policy that was applied gets there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts

pytestmark = pytest.mark.netns

POLICY = """\
version: 1
name: {name}
protect: {{interfaces: [out]}}
rules:
  - {{name: many, measure: connections, over: 200, then: reset}}
"""


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, POLICY.format(name="first"), tmp_path / "guard", workers=1) as guard:
        yield guard


def in_force_after_restart(guard: Guard) -> str:
    assert guard.stop() == 0
    guard.start()
    return str(guard.status()["policy"]["name"])


def test_it_is_told_that_another_file_will_be_read(guard: Guard, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.format(name="second"))
    said = guard.cli("policy", "apply", str(other)).stdout
    assert f"the guard starts with {guard.file}, which holds another policy" in said
    assert "--save" in said
    assert in_force_after_restart(guard) == "first"
    assert "starts with" not in guard.cli("policy", "apply", str(guard.file)).stdout


def test_it_is_saved_with_what_was_there_beside(guard: Guard, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.format(name="second"))
    done = guard.cli("policy", "apply", str(other), "--save", "--json")
    told = json.loads(done.stdout)
    assert (told["start_file"], told["starts_with_it"], told["saved"]) == (
        str(guard.file), True, True,
    )  # fmt: skip
    assert guard.file.read_text() == other.read_text()
    assert Path(told["backup"]).read_text() == POLICY.format(name="first")
    assert in_force_after_restart(guard) == "second"


def test_what_may_be_rolled_back_is_saved_once_it_is_confirmed(
    guard: Guard, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.format(name="second"))
    done = guard.cli("policy", "apply", str(other), "--save", "--confirm", "60s")
    assert done.returncode == 2
    assert guard.status()["policy"]["name"] == "first"
    assert guard.cli("policy", "apply", str(other), "--confirm", "60s").returncode == 0
    said = guard.cli("policy", "confirm", "--save").stdout
    assert f"saved: the guard starts with it from {guard.file}" in said
    assert guard.file.read_text() == other.read_text()


def test_a_file_that_cannot_be_written_is_one_sentence(guard: Guard, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(POLICY.format(name="second"))
    aside = guard.file.with_name("aside")
    aside.mkdir()
    guard.file.unlink()
    guard.file.symlink_to(aside / "gone" / "policy.yaml")
    done = guard.cli("policy", "apply", str(other), "--save")
    assert done.returncode == 1
    assert "the policy is in force, but not saved" in done.stderr
    assert done.stderr.count("\n") == 1
    wait_until(lambda: guard.status()["policy"]["name"] == "second")
