"""Ages of connections while somebody sets the clock on the wall."""

from __future__ import annotations

import pytest

from rstguard.kernel.clock import Ages

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
NOON = 1_800_000_000 * SECOND


class Clocks:
    """A wall's clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.monotonic, self.ahead = 50 * HOUR, NOON
        self.ages = Ages(lambda: self.monotonic + self.ahead, lambda: self.monotonic)

    def stamp(self) -> int:
        """Return what the kernel writes on a connection that begins now."""
        return self.monotonic + self.ahead

    def go_on(self, seconds: float) -> None:
        """Let time pass; the sweeper looks every second."""
        for _ in range(int(seconds)):
            self.monotonic += SECOND
            self.ages.look()


@pytest.mark.parametrize("step", [HOUR, -HOUR, 3 * SECOND, -3 * SECOND, 2000 * 24 * HOUR])
def test_a_step_makes_nothing_older_or_younger(step: int) -> None:
    clocks = Clocks()
    before_all = clocks.stamp() - 7 * HOUR // 2
    clocks.go_on(100)
    old = clocks.stamp()
    clocks.go_on(20)
    clocks.ahead += step
    clocks.go_on(5)
    young = clocks.stamp()
    clocks.go_on(2)
    assert clocks.ages.of(young) == 2 * SECOND
    assert clocks.ages.of(old) == 27 * SECOND
    assert clocks.ages.of(before_all) == 7 * HOUR // 2 + 127 * SECOND
    clocks.ahead -= step
    clocks.go_on(2)
    # What the clock has shown twice within some seconds is the later time: too young harms nobody.
    assert clocks.ages.of(young) == (1 if step == 3 * SECOND else 4) * SECOND


def test_a_clock_that_drifts_is_followed() -> None:
    clocks = Clocks()
    for _ in range(1000):
        clocks.ahead += SECOND // 2000
        clocks.go_on(1)
    assert clocks.ages.of(clocks.stamp() - 9 * SECOND) == 9 * SECOND
