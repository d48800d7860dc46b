"""The life of a policy, through the command: confirmed or gone back from, rolled back, told."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.ipc.requests import ControlError
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts

pytestmark = pytest.mark.netns


def policy(name: str, more: str = "") -> str:
    return f"""\
version: 1
name: {name}
protect: {{interfaces: [out], destinations: [{SERVER4}]}}
rules:
  - {{name: rate, measure: syn_rate, over: 1000/s, then: drop}}
{more}"""


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, policy("first"), tmp_path / "guard", workers=1) as guard:
        yield guard


def write(guard: Guard, name: str) -> str:
    path = guard.runtime / f"{name}.yaml"
    path.write_text(policy(name))
    return str(path)


def in_force(guard: Guard) -> str:
    return str(guard.status()["policy"]["name"])


def test_what_nobody_confirms_goes_back_by_itself(guard: Guard) -> None:
    done = guard.cli("policy", "apply", write(guard, "second"), "--confirm", "1s")
    assert done.returncode == 0
    assert "rolls back in 1 s unless you run" in done.stdout
    assert in_force(guard) == "second"
    assert "NOT CONFIRMED" in guard.cli("status").stdout
    wait_until(lambda: in_force(guard) == "first")
    actions = [entry["action"] for entry in guard.json("policy", "history")]
    assert actions == ["not confirmed", "apply", "start"]
    assert "was not confirmed in time" in guard.log.read_text()


def test_what_is_confirmed_stays(guard: Guard) -> None:
    guard.cli("policy", "apply", write(guard, "second"), "--confirm", "1s")
    assert guard.cli("policy", "confirm").stdout.startswith("policy second stays\n")
    assert guard.status()["policy"]["confirm_s"] is None
    late = guard.cli("policy", "confirm")
    assert late.returncode == 1
    assert "no policy waits to be confirmed" in late.stderr
    (kept, *_) = guard.json("policy", "history")
    assert (kept["name"], kept["state"], kept["in_force"]) == ("second", "kept", True)


def test_two_unconfirmed_policies_go_back_to_the_last_good_one(guard: Guard) -> None:
    guard.cli("policy", "apply", write(guard, "second"), "--confirm", "60s")
    guard.cli("policy", "apply", write(guard, "third"), "--confirm", "1s")
    wait_until(lambda: in_force(guard) == "first")


def test_rolling_back_goes_back_step_by_step(guard: Guard) -> None:
    for name in ("second", "third"):
        guard.cli("policy", "apply", write(guard, name))
    for name in ("second", "first"):
        done = guard.cli("policy", "rollback")
        assert f"policy {name} is in force again" in done.stdout
        assert in_force(guard) == name
    nothing = guard.cli("policy", "rollback")
    assert nothing.returncode == 1
    assert "no earlier policy" in nothing.stderr


def test_the_same_policy_once_more_is_no_step(guard: Guard) -> None:
    for name in ("second", "second"):
        guard.cli("policy", "apply", write(guard, name))
    assert "policy first is in force again" in guard.cli("policy", "rollback").stdout
    # Whoever goes back from a trial of what is in force keeps it, over a restart too.
    guard.cli("policy", "apply", write(guard, "first"), "--confirm", "60s")
    guard.cli("policy", "rollback")
    newest = guard.json("policy", "history")[0]
    assert (newest["name"], newest["state"], newest["in_force"]) == ("first", "kept", True)


def test_a_late_word_is_refused_or_holds(guard: Guard) -> None:
    """Whoever is told that the policy stays can rely on it, also if its time ended just then."""
    for late in range(8):
        guard.ask("policy-apply", name="second", text=policy("second"), confirm_s=1)
        end = time.monotonic() + 1
        wait_until(lambda end=end, late=late: time.monotonic() > end + (late - 4) * 0.01)  # type: ignore[misc]
        try:
            guard.ask("policy-confirm")
        except ControlError:
            assert in_force(guard) == "first"
        else:
            assert in_force(guard) == "second"
            guard.apply(policy("first"))


def test_an_unconfirmed_policy_does_not_return_by_a_restart(guard: Guard) -> None:
    """The file that the guard starts with was changed, applied, and the machine went down."""
    first = guard.file.read_text()
    guard.file.write_text(policy("second"))
    guard.cli("policy", "apply", str(guard.file), "--confirm", "60s")
    guard.kill9()
    guard.start()
    assert in_force(guard) == "first"
    assert "was not confirmed or was rolled back" in guard.log.read_text()
    # Wanted again, it stays over a restart.
    guard.cli("policy", "apply", str(guard.file))
    guard.stop()
    guard.start()
    assert in_force(guard) == "second"
    assert guard.file.read_text() != first


def test_the_history_keeps_texts_and_names_who_it_was(guard: Guard) -> None:
    guard.cli("policy", "apply", write(guard, "second"))
    newest, oldest = guard.json("policy", "history")
    assert newest["who"].startswith("root")
    assert oldest["who"] == "the guard"
    text = guard.cli("policy", "history", str(oldest["number"])).stdout
    assert text == policy("first")
    lines = guard.cli("policy", "history").stdout.splitlines()
    assert "start" in lines[0]
    assert lines[1].endswith(", in force")
    assert "no policy 99" in guard.cli("policy", "history", "99").stderr


@pytest.mark.parametrize("wrong", ["0s", "2h", "soon", "-1s"])
def test_a_time_that_makes_no_sense_is_refused(guard: Guard, wrong: str) -> None:
    done = guard.cli("policy", "apply", write(guard, "second"), f"--confirm={wrong}")
    assert done.returncode == 2
    assert in_force(guard) == "first"


def test_bans_and_offences_survive_kill_9_and_the_loss_of_all_sets(
    guard: Guard, lab: ThreeHosts
) -> None:
    guard.cli("ban", "add", "198.51.100.7", "--for", "1h")
    guard.cli("ban", "add", "198.51.100.8", "--for", "1h")
    guard.cli("ban", "remove", "198.51.100.8")
    guard.cli("ban", "add", "2001:db8:66::/64", "--for", "1s")

    def kept() -> set[str]:
        database = sqlite3.connect(guard.runtime / "state" / "state.db")
        return {source for (source,) in database.execute("SELECT source FROM blocks")}

    wait_until(lambda: kept() == {"198.51.100.7", "2001:db8:66::/64"})
    guard.kill9()
    guard.cli("cleanup")  # as a reboot: nothing is left in the kernel
    wait_until(lambda: guard.cli("cleanup").stdout.startswith("there was nothing"))
    guard.start()
    (row,) = guard.ask("ban-list")
    assert row["source"] == "198.51.100.7"
    assert row["rule"] == "manual"
    assert 3500 < row["remaining_s"] <= 3600


def test_a_damaged_file_does_not_keep_the_guard_from_its_work(
    lab: ThreeHosts, tmp_path: Path
) -> None:
    guard = Guard(lab, policy("first"), tmp_path / "guard", workers=1)
    (guard.runtime / "state").mkdir()
    (guard.runtime / "state" / "state.db").write_bytes(b"x" * 5000)
    with guard:
        assert "was damaged and was moved to" in guard.log.read_text()
        assert guard.status()["not_remembered"] == ""


def test_without_a_place_to_remember_it_guards_and_says_so(lab: ThreeHosts, tmp_path: Path) -> None:
    guard = Guard(lab, policy("first"), tmp_path / "guard", workers=1)
    (guard.runtime / "state").write_text("a file where a directory is wanted")
    with guard:
        assert "--state-dir" in guard.status()["not_remembered"]
        guard.cli("policy", "apply", write(guard, "second"))
        assert "first is in force again" in guard.cli("policy", "rollback").stdout
