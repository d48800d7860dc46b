"""What outlives the guard, against real files: killed, damaged, full, and grown old."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rstguard.daemon.store import (
    KEPT,
    MOST_POLICIES,
    PENDING,
    UNDONE,
    Store,
    StoreError,
    gone_back_from,
)
from rstguard.daemon.store import before as policy_before
from rstguard.engine.address import parse_prefix
from rstguard.kernel.elements import Element, Kind


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def ban(source: str, seconds: int = 600, kind: Kind = "ban") -> Element:
    return Element(parse_prefix(source), kind, "syn-rate", seconds, False)


def test_bans_come_back_with_what_remains_of_their_time(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.blocked(ban("198.51.100.7"))
    store.blocked(ban("2001:db8::/64", 30))
    store.blocked(ban("198.51.100.8", 10, "shun"))
    store.close()
    clock.now += 29.5
    again = Store(tmp_path, clock)
    assert [(str(e.source), e.remaining) for e in again.blocks()] == [("198.51.100.7", 570)]
    again.unblocked("198.51.100.7")
    again.flush()
    assert again.blocks() == []
    again.close()


def test_offences_come_back_with_their_age(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.offended("ssh-brute", "198.51.100.7", 3)
    store.close()
    clock.now += 60
    again = Store(tmp_path, clock)
    (offence,) = again.offences()
    assert (offence.rule, str(offence.source), offence.times) == ("ssh-brute", "198.51.100.7", 3)
    assert offence.age == pytest.approx(60e9)
    again.close()


def test_the_history_says_what_to_go_back_to(tmp_path: Path) -> None:
    store = Store(tmp_path, Clock())
    store.add_policy("root", "start", "one", "p.yaml", "text 1")
    number = store.add_policy("root", "apply", "two", "p.yaml", "text 2", PENDING)
    history = store.policies()
    assert [entry.name for entry in history] == ["two", "one"]
    assert gone_back_from(history, "text 2")
    assert not gone_back_from(history, "text 1")
    back = policy_before(history, "text 2")
    assert back is not None
    assert back.text == "text 1"
    store.mark_policy(number, KEPT)
    assert not gone_back_from(store.policies(), "text 2")
    store.mark_policy(number, UNDONE)
    assert policy_before(store.policies(), "text 1") is None
    store.close()


def test_the_history_is_bounded_and_expired_bans_go(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    for number in range(MOST_POLICIES + 10):
        store.add_policy("root", "apply", f"p{number}", "p.yaml", f"text {number}")
    store.blocked(ban("198.51.100.7", 5))
    clock.now += 6
    store.tidy()
    assert len(store.policies()) == MOST_POLICIES
    assert store.policies()[0].name == f"p{MOST_POLICIES + 9}"
    rows = sqlite3.connect(store.path).execute("SELECT count(*) FROM blocks").fetchone()
    assert rows == (0,)
    store.close()


@pytest.mark.parametrize("damage", [b"no database at all, but some other file" * 100, b"SQLite"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "state.db").write_bytes(damage)
    store = Store(tmp_path, Clock())
    assert store.set_aside is not None
    assert store.set_aside.read_bytes() == damage
    store.blocked(ban("198.51.100.7"))
    store.flush()
    assert len(store.blocks()) == 1
    store.close()


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path, Clock())
    for number in range(2000):
        store.blocked(ban(f"198.51.{number // 250}.{number % 250}"))
    store.close()
    path = tmp_path / "state.db"
    whole = bytearray(path.read_bytes())
    whole[8192:20000] = os.urandom(20000 - 8192)
    path.write_bytes(whole)
    again = Store(tmp_path, Clock())
    assert again.set_aside is not None
    assert again.blocks() == []
    again.close()


def test_another_program_s_database_is_set_aside(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "state.db")
    other.execute("CREATE TABLE blocks (something TEXT)")
    other.commit()
    other.close()
    store = Store(tmp_path, Clock())
    assert store.set_aside is not None
    store.close()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used .* --state-dir"):
        Store(tmp_path / "file", Clock())


_WRITER = """
import sys
from pathlib import Path
from rstguard.daemon.store import Store
from rstguard.engine.address import parse_prefix
from rstguard.kernel.elements import Element
store = Store(Path(sys.argv[1]))
for number in range(1 << 20):
    text = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    store.blocked(Element(parse_prefix(text), "ban", "rule", 600, False))
    if number % 10 == 9:
        store.flush()
        print(number + 1, flush=True)
"""


def test_kill_9_loses_nothing_that_was_written(tmp_path: Path) -> None:
    for lines in (1, 7, 30):
        directory = tmp_path / str(lines)
        command = [sys.executable, "-c", _WRITER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(lines):
                written = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
        store = Store(directory)
        assert store.set_aside is None
        assert len(store.blocks()) >= written
        store.close()
