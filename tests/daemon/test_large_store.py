"""Which sources were large outlives the guard: with its age, bounded, in old files, too."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rstguard.engine.address import parse_prefix
from rstguard.engine.large import LASTS, MOST, LargeSource
from rstguard.engine.ruleset import SECOND
from rstguard.ipc.said import Large
from rstguard.kernel.elements import Element
from rstguard.state.record import Record
from rstguard.state.store import FILE_NAME, Store

CDN = LargeSource(parse_prefix("203.0.113.9"), 61, 1234, 1000, 3600 * SECOND, 5 * SECOND)
CDN6 = LargeSource(parse_prefix("2001:db8:7::/64"), 26, 300, 0, 700 * SECOND, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def stored(directory: Path, clock: Clock, *sources: LargeSource) -> None:
    store = Store(directory, clock)
    store.waiting.large(sources)
    store.close()


def ages(sources: tuple[LargeSource, ...]) -> dict[str, tuple[int, int]]:
    """Return for how many seconds each was watched, and was quiet."""
    return {str(o.source): (round(o.age / SECOND), round(o.quiet / SECOND)) for o in sources}


def test_large_sources_come_back_with_their_age(tmp_path: Path) -> None:
    clock = Clock()
    stored(tmp_path, clock, CDN, CDN6)
    clock.now += 100
    store = Store(tmp_path, clock)
    assert ages(store.large()) == {"203.0.113.9": (3700, 105), "2001:db8:7::/64": (800, 100)}
    assert store.large()[0][:4] == CDN[:4]
    store.waiting.large((CDN6,))
    assert [one.source for one in store.large()] == [CDN6.source]  # what waits counts
    store.flush()
    assert [one.source for one in store.large()] == [CDN6.source]
    store.waiting.large(())
    store.flush()
    assert store.large() == ()
    store.close()


@pytest.mark.parametrize("back", [-1.0, 1.0])
def test_a_clock_that_is_set_meanwhile_makes_none_older_or_younger(
    tmp_path: Path, back: float
) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.waiting.large((CDN,))
    store.flush()
    for _ in range(2):
        clock.now += back * 400 * 86_400
        store.waiting.shift(back * 400 * 86_400)
        assert ages(store.large()) == {"203.0.113.9": (3600, 5)}
        store.flush()
        assert ages(store.large()) == {"203.0.113.9": (3600, 5)}
    store.close()


def test_who_was_quiet_for_a_day_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    stored(tmp_path, clock, CDN)
    clock.now += LASTS / SECOND - 10
    store = Store(tmp_path, clock)
    assert len(store.large()) == 1
    clock.now += 10
    assert store.large() == ()
    store.close()


def test_no_more_come_back_than_are_remembered(tmp_path: Path) -> None:
    clock = Clock()
    many = [
        CDN._replace(source=parse_prefix(f"203.0.113.{number}"), bore=number)
        for number in range(2 * MOST)
    ]
    stored(tmp_path, clock, *many)
    store = Store(tmp_path, clock)
    assert len(store.large()) == MOST
    assert min(one.bore for one in store.large()) == MOST
    store.close()


DAMAGED = {
    "source": "nobody",
    "share": 101,
    "connections": "many",
    "bore": -1,
    "since": "then",
    "seen": b"\0",
}


@pytest.mark.parametrize("column", DAMAGED)
def test_a_damaged_row_is_left_out(tmp_path: Path, column: str) -> None:
    clock = Clock()
    stored(tmp_path, clock, CDN, CDN6)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        damage = f"UPDATE large_sources SET {column} = ? WHERE source = '203.0.113.9'"  # noqa: S608
        file.execute(damage, (DAMAGED[column],))
        file.commit()
    store = Store(tmp_path, clock)
    assert [one.source for one in store.large()] == [CDN6.source]
    assert store.unreadable == 1
    store.close()


def test_a_file_of_before_there_was_such_a_table_is_taken_over(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(tmp_path, clock)
    store.waiting.blocked(Element(parse_prefix("198.51.100.7"), "ban", "syn-rate", 600, False))
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        file.execute("DROP TABLE large_sources")
        file.commit()
    again = Store(tmp_path, clock)
    assert again.set_aside is None
    assert [str(element.source) for element in again.blocks()] == ["198.51.100.7"]
    assert again.large() == ()
    again.waiting.large((CDN,))
    again.flush()
    assert [one.source for one in again.large()] == [CDN.source]
    again.close()


def test_it_is_written_when_it_changes_and_else_once_a_minute(tmp_path: Path) -> None:
    wall = Clock()
    began = wall.now
    with asyncio.Runner() as runner:
        runner.get_loop().time = lambda: wall.now - began  # type: ignore[method-assign]

        async def run() -> None:
            nothing: Any = None
            kept = Record(tmp_path, lambda: nothing, wall)
            await kept.open()
            assert kept.store is not None

            def noted(*sources: LargeSource) -> bool:
                kept.large(Large(sources))
                return bool(kept._waiting.take())

            assert noted()  # what a guard before this knew is over
            assert not noted()
            assert noted(CDN)
            assert not noted(CDN._replace(connections=7))
            assert noted(CDN._replace(bore=1001))
            wall.now += 59
            assert not noted(CDN._replace(bore=1001))
            wall.now += 1
            assert noted(CDN._replace(bore=1001))
            assert noted()
            await kept.close()

        runner.run(run())


def test_a_guard_that_begins_is_told(tmp_path: Path) -> None:
    clock = Clock()
    stored(tmp_path, clock, CDN)

    async def run() -> None:
        nothing: Any = None
        kept = Record(tmp_path, lambda: nothing, clock)
        await kept.open()
        assert [one.source for one in kept.large_before.sources] == [CDN.source]
        await kept.close()

    asyncio.run(run())
