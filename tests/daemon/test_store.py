"""What outlives the guard, against real files: killed, damaged, full, and grown old."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.engine.address import parse_prefix
from rstguard.kernel.elements import MAX_SECONDS, Element, Kind
from rstguard.kernel.linux import Linux
from rstguard.state import record
from rstguard.state.record import Record
from rstguard.state.store import (
    KEPT,
    MOST_POLICIES,
    PENDING,
    UNDONE,
    Store,
    StoreError,
    gone_back_from,
)
from rstguard.state.store import before as policy_before


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


def filled(directory: Path) -> bytes:
    """Return the file of a store that has some of everything."""
    store = Store(directory, Clock())
    for number in range(200):
        store.blocked(ban(f"198.51.100.{number}"))
        store.offended("ssh-brute", f"198.51.100.{number}", 3)
    for number in range(5):
        store.add_policy("root", "apply", f"p{number}", "p.yaml", f"text {number}")
    store.close()
    return (directory / "state.db").read_bytes()


def survives(directory: Path, whole: bytes, places: list[tuple[float, int]], cut: float) -> None:
    """See that a damaged file is used as far as it can be, or set aside; it never fails."""
    damaged = bytearray(whole)
    for place, value in places:
        damaged[int(place * (len(damaged) - 1))] = value
    with tempfile.TemporaryDirectory(dir=directory) as there:
        (Path(there) / "state.db").write_bytes(damaged[: int(cut * len(damaged))])
        store = Store(Path(there), Clock())
        assert all(1 <= (e.remaining or 0) <= MAX_SECONDS and e.comment for e in store.blocks())
        store.offences()
        store.policies()
        store.tidy()
        store.blocked(ban("203.0.113.7"))
        store.flush()
        assert "203.0.113.7" in {str(element.source) for element in store.blocks()}
        store.close()


places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20)
cuts = st.just(1.0) | st.floats(0, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return filled(tmp_path_factory.mktemp("whole"))


@settings(max_examples=200)
@given(places, cuts)
def test_any_damage(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, at: list[tuple[float, int]], cut: float
) -> None:
    survives(tmp_path_factory.getbasetemp(), whole, at, cut)


@pytest.mark.fuzz_long
@settings(max_examples=10_000)
@given(places, cuts)
def test_much_damage(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, at: list[tuple[float, int]], cut: float
) -> None:
    survives(tmp_path_factory.getbasetemp(), whole, at, cut)


def test_a_row_that_sqlite_does_not_know_to_be_damaged_is_left_out(tmp_path: Path) -> None:
    whole = filled(tmp_path)
    assert b"198.51.100.77" in whole
    (tmp_path / "state.db").write_bytes(whole.replace(b"198.51.100.77", b"198.51.1\xff0.77"))
    store = Store(tmp_path, Clock())
    assert len(store.blocks()) == 199
    assert store.unreadable == 1
    assert store.set_aside is None
    store.close()


def test_a_clock_that_was_set_back_makes_no_ban_longer(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.blocked(ban("198.51.100.7"))
    store.offended("ssh-brute", "198.51.100.7", 3)
    store.close()
    clock.now -= 400 * 86_400
    again = Store(tmp_path, clock)
    assert [element.remaining for element in again.blocks()] == [600]
    clock.now += 10
    assert again.offences()[0].age == pytest.approx(10e9)
    again.close()


def test_a_clock_that_is_set_meanwhile_leaves_bans_as_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Record(Linux(), tmp_path)
    kept.open()
    assert kept.store is not None
    kept.blocked_element(ban("198.51.100.7"))
    for jump in (400 * 86_400, -800 * 86_400, 1.5):
        ahead = record._ahead()
        monkeypatch.setattr(record, "_ahead", lambda was=ahead + jump: was)
        kept._follow_the_clock(kept.store)
        kept.store.flush()
        (element,) = kept.store.blocks()
        assert 500 < (element.remaining or 0) <= 600
    kept.close()


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
from rstguard.state.store import Store
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
