"""The engine alone: decisions a second with the example policy, a new source with every SYN."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from struct import pack

from rstguard.engine.address import parse_address
from rstguard.engine.engine import Engine
from rstguard.engine.ruleset import NEEDS
from rstguard.engine.verdict import PASS
from rstguard.engine.wire import parse
from rstguard.ipc.measuring import Decide, Measuring
from rstguard.ipc.messages import Learn
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import load
from tests.bench.figures import Figure, at_least, seen
from tests.bench.gateway import EXAMPLE, PORT, SERVER

GOAL = 120_000
ROUNDS = 7
_PACKETS = 100_000
_APART = 8_000
"""Nanoseconds between packets: 125,000 a second."""


def engine() -> Iterator[Figure]:
    """The engine alone, one core, parsing included and not."""
    ruleset = replace(compile_policy(load(EXAMPLE).policy), enforce=False)
    guard, learning = Engine(ruleset), Measuring(ruleset, NEEDS)
    learning.obey(Learn(on=True))
    measured = learning.beside(guard.decide)
    gc.collect()
    gc.disable()  # as in the worker
    chance = random.Random(1)
    whole, decided, learned = [], [], []
    now = 10**18
    for _ in range(ROUNDS):
        whole.append(_parsed_and_decided(guard.decide, syns(chance, _PACKETS), now))
        now += _PACKETS * _APART
        learned.append(_parsed_and_decided(measured, syns(chance, _PACKETS), now))
        now += _PACKETS * _APART
        decided.append(_decided(guard, syns(chance, _PACKETS), now))
        now += _PACKETS * _APART
    gc.enable()
    note = "processor time; example policy; a new random source with every SYN"
    yield at_least(GOAL, "engine: parse and decide", whole, "decisions/s", note)
    yield seen("engine: parse and decide while limits are learned", learned, "decisions/s", note)
    yield seen("engine: decide alone", decided, "decisions/s", note)


def syns(chance: random.Random, count: int) -> list[bytes]:
    """Return SYNs from random addresses, as they come out of the queue."""
    target = parse_address(SERVER)
    return [
        pack(
            ">BBHHHBBHIIHHIIBBHHH",
            *(0x45, 0, 40, 1, 0x4000, 64, 6, 0),
            *(0x20000000 + chance.getrandbits(30), target),
            *(1024 + chance.getrandbits(15), PORT, chance.getrandbits(32), 0),
            *(0x50, 2, 64240, 0, 0),
        )
        for _ in range(count)
    ]


def _parsed_and_decided(decide: Decide, packets: list[bytes], now: int) -> float:
    passed = 0
    began = time.process_time()
    for data in packets:
        passed += decide(parse(data), now) is PASS
        now += _APART
    spent = time.process_time() - began
    assert passed == len(packets), "a SYN crossed a rule: another path was measured"
    return len(packets) / spent


def _decided(guard: Engine, packets: list[bytes], now: int) -> float:
    decide = guard.decide
    parsed = [parse(data) for data in packets]
    began = time.process_time()
    for packet in parsed:
        decide(packet, now)
        now += _APART
    spent = time.process_time() - began
    return len(packets) / spent
