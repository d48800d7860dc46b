"""`python -m tests.calm`: a calm day at each policy, in simulated time.

HOURS=24      how long, BEGIN=0 the hour of the day at which it begins
POLICY=NAME   one alone (`web-edge`, `new --for mail`, …)
SEED=1        of all that is drawn
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Final

from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from tests.calm.expected import texts, unannounced
from tests.calm.simulated import Calm

_EVERY: Final = 10.0
"""Seconds between two sweeps: of what can be hit, little lasts shorter, and a day takes minutes."""


def main() -> int:
    """Run what the environment asks for; return the exit status."""
    only = os.environ.get("POLICY")
    names = [name for name in texts() if only in (None, name)]
    cores = os.cpu_count() or 1
    failed = False
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:
        for lines, hurt in pool.map(_day, names):
            print("\n".join(lines), flush=True)
            failed |= hurt
    return failed or not names


def _day(name: str) -> tuple[list[str], bool]:
    """Have a calm day by one policy; return what is to be said, and whether anybody was hurt."""
    began = time.process_time()
    hours = float(os.environ.get("HOURS", "24"))
    begin, seed = float(os.environ.get("BEGIN", "0")), int(os.environ.get("SEED", "1"))
    ruleset = compile_policy(parse(texts()[name], name).policy)
    calm = Calm(ruleset, begin, hours, _EVERY, seed)
    calm.run()
    hurt = list(unannounced(name, calm.findings.values())) if ruleset.enforce else []
    counts = calm.replay.counts
    seconds = time.process_time() - began
    head = (
        f"{name}: {hours:g} hours, {calm.visited.total():,} connections, {counts.packets:,} "
        f"packets, {counts.sweeps:,} sweeps, {len(hurt)} findings; {seconds:.0f} s of CPU time"
    )
    lines = [head]
    for found in calm.findings.values():
        kind = "FINDING" if found in hurt else "announced" if ruleset.enforce else "told"
        lines.append(f"  {kind}: {found}")
    return lines, bool(hurt)


if __name__ == "__main__":
    sys.exit(main())
