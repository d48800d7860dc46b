"""Services seen from one side are looked for when there is something to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rstguard.kernel.seam import Kernel
from rstguard.kernel.untracked import Hits
from rstguard.supervisor.onesided import OneSided
from tests.supervisor.parts import guard_of

RULE = "[{}:400] -A rstguard-oneway -j SET --add-set rstguard-oneway4 dst,dst --exist"


class Sets:
    """The kernel, as far as it is asked here."""

    def __init__(self) -> None:
        self.asked = 0
        self.holds = ""

    def run(self, arguments: Sequence[str], text: str = "") -> str:
        assert arguments[:2] == ["ipset", "save"]
        self.asked += 1
        return self.holds if arguments[2] == "rstguard-oneway4" else ""


async def test_no_set_is_read_at_rest() -> None:
    sets, hits = Sets(), Hits()
    looks = OneSided(cast(Kernel, sets), guard_of(), hits)
    hits.printed = [RULE.format(0)]
    for _ in range(5):
        await looks._look()
    assert sets.asked == 2  # once: what an earlier guard has left
    hits.printed, sets.holds = [RULE.format(7)], "add rstguard-oneway4 192.0.2.1,tcp:80 timeout 9"
    for _ in range(3):
        await looks._look()
    assert sets.asked == 2 + 3 * 4  # also those that answer, as long as there is something
    sets.holds = ""
    for _ in range(5):
        await looks._look()
    assert sets.asked == 2 + 3 * 4 + 2
    hits.printed = [RULE.format(0)]  # the rules were made anew, and count from 0
    await looks._look()
    hits.printed = [RULE.format(7)]
    await looks._look()
    assert sets.asked == 2 + 3 * 4 + 2 + 4
