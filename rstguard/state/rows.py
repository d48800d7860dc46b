"""Rows of the file, and what they stand for; what the guard never wrote raises an exception."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rstguard.engine.address import parse_prefix
from rstguard.engine.large import LASTS, LargeSource
from rstguard.engine.sources import Offence
from rstguard.ipc.said import Large
from rstguard.kernel.elements import MAX_SECONDS, Element, Kind
from rstguard.state.waiting import Block, Changes, LargeRow, Offended

KINDS: Final[tuple[Kind, ...]] = ("ban", "shun")


def there(changes: Changes) -> Iterable[Block]:
    """Yield the bans and shuns that are to be written."""
    return (row for row in changes.blocks.values() if row is not None)


def lasts_longer(held: tuple[Block, float] | None, row: Block, now: float) -> bool:
    """Tell whether what the file holds, and when its clock is, lasts longer than a row."""
    if held is None:
        return False
    try:
        return held[0].expires - held[1] > row.expires - now
    except TypeError:  # damage that SQLite does not notice
        return False


def element_of(row: Block, now: float) -> Element | None:
    """Return the element of a row, or None if its time is over."""
    seconds = min(int(row.expires - now), MAX_SECONDS)
    source = parse_prefix(row.source)
    one = Element(source, _kind(row.kind), row.rule, seconds, bool(row.keep_existing))
    return one if one.comment and seconds >= 1 else None


def _kind(text: str) -> Kind:
    if text not in ("ban", "shun"):
        raise ValueError(text)
    return "ban" if text == "ban" else "shun"


def offence_of(row: Offended, now: float) -> Offence:
    """Return the offence of a row."""
    age = max(0, int((now - row.last) * 1e9))
    return Offence(str(row.rule), parse_prefix(row.source), int(row.times), age)


def large_of(row: LargeRow, now: float) -> LargeSource | None:
    """Return the large source of a row, or None if it would have been forgotten by now."""
    age, quiet = (max(0, int((now - then) * 1e9)) for then in (row.since, row.seen))
    counts = int(row.share), int(row.connections), int(row.bore)
    one = LargeSource(parse_prefix(row.source), *counts, age=age, quiet=quiet)
    Large((one,))  # refuses what no sweeper tells
    return one if quiet <= LASTS else None
