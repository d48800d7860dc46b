"""Whether traffic goes round the guard's rules, as counters tell it."""

from __future__ import annotations

from rstguard.kernel.bypass import BEFORE, BETWEEN, LEAST, LOOKS, UNTRACKED, Counted, Taken

MUCH = 2 * LEAST


def after(looks: int, each: Counted) -> str:
    taken, seen = Taken(), Counted(0, 0, 0, 0, 0)
    taken.look(seen)
    for _ in range(looks):
        seen = Counted(*(a + b for a, b in zip(seen, each, strict=True)))
        taken.look(seen)
    return taken.told


def test_where_most_goes_by_is_told_after_some_looks() -> None:
    gone = {
        BEFORE: Counted(MUCH, 0, 0, 0, 0),
        BETWEEN: Counted(MUCH, MUCH, MUCH, 0, 0),
        UNTRACKED: Counted(MUCH, MUCH, MUCH, MUCH, MUCH),
        "": Counted(MUCH, MUCH, MUCH, MUCH, 0),
    }
    for where, each in gone.items():
        assert after(LOOKS, each) == where
        assert not after(LOOKS - 1, each)


def test_rules_that_are_replaced_again_and_again_tell_nothing() -> None:
    """What they count begins at 0 each time, and may be more than it was at the look before."""
    taken = Taken()
    for look in range(4 * LOOKS):
        seen = Counted(look * MUCH, 10 * look, 10 * look, 10 * look, 0)
        assert not taken.look(seen, replaced=look)
    assert not taken.told


def test_an_interface_that_is_replaced_tells_nothing() -> None:
    taken = Taken()
    for look in range(4 * LOOKS, 0, -1):
        assert not taken.look(Counted(look * MUCH, 0, 0, 0, 0))
