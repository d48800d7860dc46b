"""Show an engine many different sources: a program for `tests.bench.sources`.

It reads a pickled `RuleSet`, every rule of which is crossed by nobody or by everybody, and prints
the most memory it has ever taken before and after (kB).  It imports as little as a worker.
"""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path

from rstguard.engine.address import V6, parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.ruleset import RuleSet
from rstguard.engine.wire import ACK, FIN, KNOWN, PROVEN, RST, STRAY, SYN, Packet

_TARGET, _PORT = "203.0.113.10", 8080
_APART = 10_000
"""Nanoseconds from packet to packet."""


def fill(guard: Engine, sources: int) -> None:
    """Let each source send one packet of each kind, the one with bad flags twice."""
    target, chance = parse_address(_TARGET), random.Random(1)
    now = 10**18
    banned = 0
    for number in range(sources):
        source = 0x20000000 + number
        if number & 1:
            source = V6 | 0x20010DB8 << 96 | number << 64 | chance.getrandbits(64)
        port, sequence = 1024 + chance.getrandbits(15), chance.getrandbits(32)
        # Every other source leaves its connections open.
        end = (RST if number & 4 else FIN | ACK) if number & 2 else ACK
        for flags, state in (
            (SYN, PROVEN),
            (ACK, KNOWN | PROVEN),
            (ACK, 0),
            (ACK, PROVEN | STRAY),
            (0, PROVEN | STRAY),
            (0, PROVEN | STRAY),
            (end, KNOWN | PROVEN),
        ):
            now += _APART
            packet = Packet(source, target, port, _PORT, sequence, sequence, flags, 10, 0, state, 7)
            banned += bool(guard.decide(packet, now).effects)
    if banned < sources:
        raise RuntimeError(f"only {banned} of {sources} sources were banned")


def _most_memory() -> int:
    # Not getrusage: what it says is at least what the process that started this one had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Fill an engine and print the memory before and after."""
    ruleset = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the benchmark's own making
    assert isinstance(ruleset, RuleSet)
    guard = Engine(ruleset)
    before = _most_memory()
    fill(guard, int(sys.argv[1]))
    print(before, _most_memory())


if __name__ == "__main__":
    main()
