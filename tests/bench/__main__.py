"""Print the figures that the guard is measured by: ``python -m tests.bench [NAME...]``.

Needs root, a C compiler, and the tools of the lab.  Nothing is written unless --out names a file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from tests.bench.admission import admission
from tests.bench.blocks import blocks
from tests.bench.cap import cap
from tests.bench.engine_speed import engine
from tests.bench.evasion import evasion
from tests.bench.figures import Benchmark, Figure, as_data, table
from tests.bench.forged import forged
from tests.bench.forgetful import forgetful, forgetful_dropped, forgetful_flooded
from tests.bench.hardship import kinds, lossy, neighbours
from tests.bench.held import held
from tests.bench.honest import honest
from tests.bench.kills import kills
from tests.bench.messages import messages
from tests.bench.pressure import pressure
from tests.bench.proof import PACKETS, TRIALS, proof
from tests.bench.queue_speed import queue, suricata, workers
from tests.bench.reflected import reflected
from tests.bench.replay_speed import replays
from tests.bench.resets import resets
from tests.bench.sources import sources
from tests.bench.sweeps import beside, million, sweeps
from tests.bench.traffic import bulk, connections
from tests.bench.waits import waits
from tests.bench.ways import ways

BENCHMARKS: tuple[Benchmark, ...] = (
    resets,
    kills,
    held,
    honest,
    reflected,
    evasion,
    cap,
    admission,
    pressure,
    proof,
    ways,
    blocks,
    engine,
    messages,
    queue,
    suricata,
    workers,
    bulk,
    connections,
    sources,
    forged,
    neighbours,
    lossy,
    kinds,
    forgetful,
    forgetful_dropped,
    forgetful_flooded,
    sweeps,
    million,
    beside,
    replays,
    waits,
)


def main() -> None:
    """Run the benchmarks that are named, or all of them."""
    names = {benchmark.__name__: benchmark for benchmark in BENCHMARKS}
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="All figures.")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"one of {', '.join(names)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON to a file, too")
    sizes = parser.add_argument_group("the size of `proof`")
    sizes.add_argument("--trials", type=int, default=TRIALS, metavar="N")
    sizes.add_argument("--packets", type=int, default=PACKETS, metavar="N", help="of each trial")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in names]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}: name one of {', '.join(names)}")
    if os.geteuid() != 0:
        sys.exit("the benchmarks need root: run `make bench`")
    figures: list[Figure] = []
    said = Console(stderr=True)
    for name in asked.names or names:
        said.print(f"{name}: {names[name].__doc__}")
        sized = name == proof.__name__
        figures += proof(asked.trials, asked.packets) if sized else names[name]()
    text = json.dumps(as_data(figures), indent=2)
    if asked.out:
        asked.out.write_text(text + "\n")
    if asked.json:
        print(text)
        return
    console = Console(width=max(Console().width, 120))
    console.print(table(figures))
    goals = [figure.met for figure in figures if figure.met is not None]
    console.print(f"{sum(goals)} of {len(goals)} goals met")


if __name__ == "__main__":
    main()
