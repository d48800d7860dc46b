"""`python -m tests.simulation`: many seeds, or one of them again.

SEED=123    that one alone, with the last lines of its log (LINES=80 of them)
SEEDS=10000 so many, from FIRST=1 on, spread over all cores
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Final

from tests.simulation.runner import Outcome, run

_EVERY: Final = 5.0
"""Seconds between two lines that tell how far it is."""
_AT_ONCE: Final = 20
_SHOWN: Final = 5
"""Failures that are shown in full; of more only the number."""


def main() -> int:
    """Run what the environment asks for; return the exit status."""
    lines = int(os.environ.get("LINES", "80"))
    if seed := os.environ.get("SEED"):
        outcome = run(int(seed))
        show(outcome, lines)
        return bool(outcome.problem)
    first, count = int(os.environ.get("FIRST", "1")), int(os.environ.get("SEEDS", "10000"))
    return many(first, count, lines)


def many(first: int, count: int, lines: int) -> int:
    """Run seeds on all cores and tell of each that fails; return the exit status."""
    began = told = time.monotonic()
    seconds, done, failed = 0.0, 0, 0
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, get_context("fork")) as pool:
        parts = [range(at, min(at + _AT_ONCE, first + count)) for at in
                 range(first, first + count, _AT_ONCE)]  # fmt: skip
        for part in as_completed([pool.submit(_run_all, one) for one in parts]):
            for outcome in part.result():
                done += 1
                seconds += outcome.seconds
                if outcome.problem:
                    failed += 1
                    if failed <= _SHOWN:
                        show(outcome, lines)
            now = time.monotonic()
            if now - told >= _EVERY:
                told = now
                _tell(done, count, failed, seconds, now - began)
    _tell(done, count, failed, seconds, time.monotonic() - began)
    return bool(failed)


def first_problem(count: int) -> str:
    """Return the first problem that so many seeds find, or ""; the others are not waited for."""
    with get_context("fork").Pool(os.cpu_count() or 1) as pool:
        for outcome in pool.imap_unordered(run, range(1, count + 1)):
            if outcome.problem:
                return f"seed {outcome.seed}: {outcome.problem}"
    return ""


def _run_all(seeds: range) -> list[Outcome]:
    outcomes = [run(seed) for seed in seeds]
    for outcome in outcomes:
        if not outcome.problem:
            outcome.log.clear()
    return outcomes


def _tell(done: int, count: int, failed: int, seconds: float, took: float) -> None:
    hours = seconds / 3600
    print(
        f"{done} of {count} seeds, {failed} failed; {hours:.1f} simulated hours in {took:.0f} s, "
        f"{hours / max(took, 0.001):.3f} hours per second",
        flush=True,
    )


def show(outcome: Outcome, lines: int) -> None:
    """Print what came of a seed, and the end of its log if an invariant was broken."""
    if not outcome.problem:
        print(f"seed {outcome.seed}: all invariants hold, {outcome.seconds:.0f} s were simulated")
        return
    print(*outcome.log[-lines:], sep="\n")
    print(f"seed {outcome.seed}: {outcome.problem}")
    print(f"again with: SEED={outcome.seed} make simulate", flush=True)


if __name__ == "__main__":
    sys.exit(main())
