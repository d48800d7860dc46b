"""What outlives the guard, against real files: killed, damaged, full, and grown old."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.engine.address import parse_prefix
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Blocked
from rstguard.kernel.elements import MAX_SECONDS, Element, Kind
from rstguard.lab.waiting import wait_until
from rstguard.state import database, record
from rstguard.state.history import KEPT, MOST_POLICIES, PENDING, UNDONE, Undone, gone_back_from
from rstguard.state.history import before as policy_before
from rstguard.state.record import Record
from rstguard.state.store import Store, StoreError
from rstguard.state.waiting import MOST_OFFENCES
from tests.support.guard import Guard
from tests.support.network import ThreeHosts


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
    store.waiting.blocked(ban("198.51.100.7"))
    store.waiting.blocked(ban("2001:db8::/64", 30))
    store.waiting.blocked(ban("198.51.100.8", 10, "shun"))
    store.close()
    clock.now += 29.5
    again = Store(tmp_path, clock)
    assert [(str(e.source), e.remaining) for e in again.blocks()] == [("198.51.100.7", 570)]
    again.waiting.unblocked("198.51.100.7")
    again.flush()
    assert again.blocks() == []
    again.close()


def test_offences_come_back_with_their_age(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.waiting.offended("ssh-brute", "198.51.100.7", 3)
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
    store.waiting.blocked(ban("198.51.100.7", 5))
    clock.now += 6
    store.flush(tidy=True)
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
    store.waiting.blocked(ban("198.51.100.7"))
    store.flush()
    assert len(store.blocks()) == 1
    store.close()


def test_damage_in_the_middle_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path, Clock())
    for number in range(2000):
        store.waiting.blocked(ban(f"198.51.{number // 250}.{number % 250}"))
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
        store.waiting.blocked(ban(f"198.51.100.{number}"))
        store.waiting.offended("ssh-brute", f"198.51.100.{number}", 3)
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
        store.flush(tidy=True)
        store.waiting.blocked(ban("203.0.113.7"))
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
    store.waiting.blocked(ban("198.51.100.7"))
    store.waiting.offended("ssh-brute", "198.51.100.7", 3)
    store.close()
    clock.now -= 400 * 86_400
    again = Store(tmp_path, clock)
    assert [element.remaining for element in again.blocks()] == [600]
    clock.now += 10
    assert again.offences()[0].age == pytest.approx(10e9)
    again.close()


def read(path: Path, statement: str) -> list[tuple[object, ...]]:
    """Return what is in the file now."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        return file.execute(statement).fetchall()


class FakeSets:
    """Kernel sets that only remember what was done to them."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def __enter__(self) -> FakeSets:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, elements: list[Element]) -> None:
        self.done += [("add", str(element.source)) for element in elements]


def record_of(directory: Path, sets: FakeSets | None = None, wall: Clock | None = None) -> Record:
    fake: Any = sets or FakeSets()
    return Record(directory, lambda: fake, wall or Clock())


def banned(source: str, offence: int = 0) -> Blocked:
    element = Element(parse_prefix(source), "ban", "ssh-brute", 600)
    return Blocked(element, Reason.KILLED, offence=offence)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Callable[[], None]]:
    """Hold the file as another process would, until the block ends or what it gives is called."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other.rollback


async def until(true: Callable[[], bool]) -> float:
    """Wait until something is true; return the longest that the loop did not run meanwhile."""
    longest, last = 0.0, time.monotonic()
    while not true():
        await asyncio.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


def test_a_clock_that_is_set_meanwhile_leaves_bans_as_long(tmp_path: Path) -> None:
    async def run() -> None:
        wall = Clock()
        kept = record_of(tmp_path, wall=wall)
        await kept.open()
        assert kept.store is not None
        kept.blocked_element(ban("198.51.100.7"))
        for jump in (400 * 86_400, -800 * 86_400, 1.5):
            wall.now += jump
            kept._follow_the_clock()
            kept.blocked_element(ban("198.51.100.8"))
            assert [500 < (e.remaining or 0) <= 600 for e in kept.store.blocks()] == [True, True]
            kept.store.flush()
            assert [500 < (e.remaining or 0) <= 600 for e in kept.store.blocks()] == [True, True]
        ((expires,),) = read(kept.store.path, "SELECT min(expires) FROM blocks")
        assert expires == pytest.approx(wall.now + 600, abs=10)
        await kept.close()

    asyncio.run(run())


def test_times_are_the_loop_s_and_the_given_clock_s(tmp_path: Path) -> None:
    """A simulation lets days go by in a moment."""
    wall = Clock()
    began = wall.now
    with asyncio.Runner() as runner:
        runner.get_loop().time = lambda: wall.now - began  # type: ignore[method-assign]

        async def run() -> None:
            kept = record_of(tmp_path, wall=wall)
            await kept.open()
            assert kept.store is not None
            kept.blocked(banned("198.51.100.7", offence=2))
            kept.store.flush()
            wall.now += 100
            kept._follow_the_clock()
            assert [element.remaining for element in kept.store.blocks()] == [500]
            (message,) = kept.offences()
            assert message.offences[0].age == 100 * 10**9
            await kept.close()

        runner.run(run())


def test_noting_waits_for_no_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, Clock())
    with locked(store.path), ThreadPoolExecutor(1) as other:
        store.waiting.blocked(ban("198.51.100.7"))
        flushing = other.submit(store.flush)
        while not store._lock.locked():
            time.sleep(0.001)
        began = time.monotonic()
        for number in range(100):
            store.waiting.blocked(ban(f"198.51.100.{number}"))
            store.waiting.unblocked("198.51.100.99")
            store.waiting.offended("ssh-brute", "198.51.100.7", number)
            store.waiting.shift(1.0)
        assert time.monotonic() - began < 0.2
        assert not flushing.done()
        with pytest.raises(StoreError, match=r"locked.*would not survive a restart"):
            flushing.result()
    store.flush()
    assert read(store.path, "SELECT count(*) FROM blocks") == [(99,)]
    store.close()


def test_what_waits_counts_when_the_store_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    clock = Clock()
    store = Store(tmp_path, clock)
    for source in ("198.51.100.7", "198.51.100.8"):
        store.waiting.blocked(ban(source))
        store.waiting.offended("ssh-brute", source, 1)
    store.flush()
    with locked(store.path):
        store.waiting.unblocked("198.51.100.7")
        store.waiting.blocked(ban("198.51.100.8", 60), replaces=True)
        store.waiting.offended("ssh-brute", "198.51.100.7", 2)
        number = store.add_policy("root", "apply", "one", "p.yaml", "text 1", PENDING)
        assert [(str(e.source), e.remaining) for e in store.blocks()] == [("198.51.100.8", 60)]
        assert [(str(o.source), o.times) for o in store.offences()] == [
            ("198.51.100.8", 1),
            ("198.51.100.7", 2),
        ]
        assert [(entry.number, entry.state) for entry in store.policies()] == [(number, PENDING)]
        store.mark_policy(number, KEPT)
        second = store.add_policy("root", "apply", "two", "p.yaml", "text 2")
        store.undo_policy("text 1")
        assert [entry.state for entry in store.policies()] == [KEPT, UNDONE]
    assert read(store.path, "SELECT * FROM policies") == []
    store.close()
    again = Store(tmp_path, clock)
    assert [(e.number, e.name, e.state) for e in again.policies()] == [
        (second, "two", KEPT),
        (number, "one", UNDONE),
    ]
    again.close()


def test_a_locked_file_loses_nothing_and_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        kept = record_of(tmp_path)
        await kept.open()
        keeping = asyncio.create_task(kept.keep())
        with locked(tmp_path / "state.db") as unlock:
            for number in range(200):
                kept.blocked(banned(f"198.51.100.{number}", offence=1))
            longest = await until(lambda: "locked" in kept.problem)
            kept.unblocked("198.51.100.0")
            unlock()
        longest = max(longest, await until(lambda: not kept.problem))
        assert longest < 1
        keeping.cancel()
        await kept.close()

    asyncio.run(run())
    assert read(tmp_path / "state.db", "SELECT count(*) FROM blocks") == [(199,)]
    assert read(tmp_path / "state.db", "SELECT count(*) FROM offences") == [(200,)]
    assert len([one for one in caplog.records if "would not survive" in one.message]) == 1


def test_what_waits_is_bounded_and_what_was_dropped_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        kept = record_of(tmp_path)
        await kept.open()
        assert kept.store is not None
        with locked(kept.store.path):
            for number in range(MOST_OFFENCES + 7):
                source = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
                kept._waiting.offended("ssh-brute", source, 1)
            for number in range(MOST_POLICIES + 1):
                kept.store._unwritten.step(Undone(str(number)))
            await kept._flush(kept.store, tidy=False)
            assert f"{MOST_OFFENCES + MOST_POLICIES} changes wait" in kept.problem
            assert "and 8 were too many to wait" in kept.problem
        for _ in range(2):
            await kept._flush(kept.store, tidy=False)
        assert len(kept.store.offences()) == MOST_OFFENCES
        await kept.close()

    asyncio.run(run())
    assert caplog.text.count("8 changes were too many to wait") == 1


def test_a_directory_that_can_be_used_later_is_used_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_OPEN_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(record, "_FLUSH_SECONDS", 0.01)
    place = tmp_path / "state"
    old = Store(place, Clock())
    old.waiting.blocked(ban("203.0.113.9"))
    old.waiting.offended("ssh-brute", "203.0.113.9", 4)
    old.close()
    place.rename(tmp_path / "away")
    place.write_text("")
    sets = FakeSets()

    async def run() -> None:
        kept = record_of(place, sets)
        await kept.open()
        keeping = asyncio.create_task(kept.keep())
        kept.blocked(banned("198.51.100.7", offence=1))
        kept.unblocked("198.51.100.8")
        await until(lambda: "--state-dir" in kept.problem)
        place.unlink()
        (tmp_path / "away").rename(place)
        await until(lambda: not kept.problem and bool(sets.done))
        (message,) = kept.offences()
        assert [offence.times for offence in message.offences] == [4, 1]
        keeping.cancel()
        await kept.close()

    asyncio.run(run())
    assert {source for _, source in sets.done} == {"203.0.113.9", "198.51.100.7"}
    assert len(read(place / "state.db", "SELECT * FROM blocks")) == 2


@pytest.mark.parametrize("flushes", [True, False])
def test_of_two_bans_of_a_source_the_longer_stays_unless_it_is_replaced(
    tmp_path: Path, flushes: bool
) -> None:
    """As in the kernel's sets: a list with shorter times shortens no ban."""
    store = Store(tmp_path, Clock())

    def kept() -> dict[str, int | None]:
        if flushes:
            store.flush()
        return {str(element.source): element.remaining for element in store.blocks()}

    for seconds in (3600, 60):
        store.waiting.blocked(ban("198.51.100.7", seconds))
        assert kept() == {"198.51.100.7": 3600}
    store.waiting.blocked(ban("198.51.100.7", 30), replaces=True)
    assert kept() == {"198.51.100.7": 30}
    store.waiting.unblocked("198.51.100.7")
    store.waiting.blocked(ban("198.51.100.7", 20))
    assert kept() == {"198.51.100.7": 20}
    assert store.holds("198.51.100.7")
    assert not store.holds("198.51.100.8")
    store.close()


def test_bans_are_counted_that_last_for_a_while(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    for number, seconds in enumerate((10, 60, 600)):
        store.waiting.blocked(ban(f"198.51.100.{number}", seconds))
    store.flush()
    assert store.count(30) == 2
    store.waiting.unblocked("198.51.100.2")
    assert store.count(30) <= 1
    store.flush()
    assert store.count(30) == 1
    clock.now += 45
    store.flush()
    assert store.count(30) == 0
    store.close()


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
    store.waiting.blocked(Element(parse_prefix(text), "ban", "rule", 600, False))
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


@pytest.mark.netns
def test_a_guard_whose_file_is_locked_answers_at_once_and_forgets_nothing(
    lab: ThreeHosts, tmp_path: Path
) -> None:
    policy = "version: 1\nprotect: {interfaces: [out]}\nrules: []\n"
    with Guard(lab, policy, tmp_path, workers=1) as guard:
        path = guard.runtime / "state" / "state.db"
        wait_until(path.exists)
        with locked(path) as unlock:
            guard.ask("ban-add", source="198.51.100.7", seconds=600)
            longest = 0.0
            while not (problem := guard.status()["not_remembered"]):
                began = time.monotonic()
                guard.ask("ban-list")
                longest = max(longest, time.monotonic() - began)
            assert "locked" in problem
            assert longest < 1  # a tenth of that on a machine that has nothing else to do
            unlock()
        wait_until(lambda: not guard.status()["not_remembered"])
        assert read(path, "SELECT source FROM blocks") == [("198.51.100.7",)]
