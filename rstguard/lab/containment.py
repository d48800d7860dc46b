"""When an attack counts as contained: pure, from what was seen to a time."""

from __future__ import annotations

from collections.abc import Sequence

from rstguard.lab.observer import Held, Sample
from rstguard.lab.scenarios import FAILED, HELD, LEARNED, LOST, PACKETS, Scenario


def held_contained(held: Sequence[Held], first: float, limit: int) -> float | None:
    """Return the seconds from `first` to the last time that more than `limit` were held.

    None if more were held to the end; 0 if never.
    """
    over = [index for index, row in enumerate(held) if row.established > limit]
    if not over:
        return 0.0
    if over[-1] == len(held) - 1:
        return None
    return max(held[over[-1] + 1].time - first, 0.0)


def rate_contained(samples: Sequence[Sample], first: float, scenario: Scenario) -> float | None:
    """Return the seconds from `first` until no second that begins later sees more than the limit.

    None if the last whole second was over the limit; 0 if none was.
    """
    counts = [sample.packets if scenario.measure == PACKETS else sample.syns for sample in samples]
    last, total, after = -1, 0, 0
    for index, sample in enumerate(samples):
        while after < len(samples) and samples[after].time < sample.time + 1:
            total += counts[after]
            after += 1
        if total > scenario.limit:
            last = index
        total -= counts[index]
    if last < 0:
        return 0.0
    if samples[last].time > samples[-1].time - 1:
        return None
    # The sample after it is the first moment known to be quiet.
    return max(samples[last + 1].time - first, 0.0)


def contained_when(scenario: Scenario) -> str:
    """Say in words what "contained" means for a scenario."""
    if scenario.measure == HELD:
        return f"the server holds at most {scenario.limit} connections of the attacker"
    if scenario.measure == LOST:
        return f"no more than {scenario.limit} of the innocents' connections are lost"
    if scenario.measure == LEARNED:
        return f"the attacker learns of at most {scenario.limit} open ports"
    if scenario.measure == FAILED:
        return f"at most {scenario.limit} % of the legitimate requests fail"
    return f"at most {scenario.limit} attack {scenario.measure} a second reach the server"
