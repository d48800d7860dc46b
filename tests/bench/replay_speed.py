"""A replay: packets a second of a million-packet capture, from the file to the report."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from struct import pack

from rstguard.engine.address import parse_address
from rstguard.engine.ruleset import Per, RuleSet
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import load
from rstguard.replay.run import replay
from tests.bench.figures import Figure, at_least, seen
from tests.bench.gateway import EXAMPLE, PORT, SERVER

GOAL = 100_000
PACKETS = 1_000_000
_ROUNDS = 3
_SERVER = parse_address(SERVER)
_SEGMENTS = 8
"""Segments of data in each honest connection, half of them from the server."""
_OF_ONE = 2 * 3 + _SEGMENTS
_SYN, _FIN, _ACK, _PSH = 2, 1, 16, 8


def replays() -> Iterator[Figure]:
    """A replay of a million packets, one process: honest traffic, a forged flood, and both."""
    ruleset = compile_policy(load(EXAMPLE).policy)
    note = "wall clock; example policy; honest connections of 14 packets, forged SYNs"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "capture.pcap")
        write(file, PACKETS, 0.5)
        yield at_least(
            GOAL, "replay: half of it a flood", _speeds(ruleset, file), "packets/s", note
        )
        write(file, PACKETS, 0)
        yield seen("replay: all honest", _speeds(ruleset, file), "packets/s", note)
        write(file, PACKETS, 1)
        yield seen("replay: all a flood", _speeds(ruleset, file), "packets/s", note)
        none = replace(ruleset.rules[1], per=Per.SERVICE, limit=1, burst=1)
        speeds = _speeds(replace(ruleset, rules=(none,)), file)
        yield seen("replay: all a flood, each SYN dropped", speeds, "packets/s", note)


def _speeds(ruleset: RuleSet, file: Path) -> list[float]:
    speeds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        report = replay(ruleset, file)
        speeds.append(report.frames / (time.perf_counter() - began))
        assert report.frames == PACKETS
    return speeds


def write(file: Path, count: int, flood: float) -> None:
    """Write a capture of `count` packets, 50,000 a second, of which a share is forged SYNs."""
    chance = random.Random(7)
    honest = int(count * (1 - flood)) // _OF_ONE
    times: list[tuple[int, bytes]] = []
    length = count * 20_000
    for number in range(honest):
        at = chance.randrange(length)
        for packet in _connection(number, chance):
            times.append((at, packet))
            at += chance.randrange(1_000, 400_000_000)
    while len(times) < count:
        source, port = chance.getrandbits(32), 1024 + chance.getrandbits(15)
        packet = _segment(source, port, chance.getrandbits(32), 0, _SYN, 0, True)
        times.append((chance.randrange(length), packet))
    times.sort()
    with file.open("wb") as out:
        out.write(pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
        for at, packet in times:
            seconds, rest = divmod(at + 1_700_000_000 * 10**9, 10**9)
            out.write(pack("<IIII", seconds, rest, len(packet), len(packet)) + packet)


def _connection(number: int, chance: random.Random) -> Iterator[bytes]:
    source = 0x0B000000 + number % 5000
    port = 1024 + number // 5000
    mine, its = chance.getrandbits(31), chance.getrandbits(31)
    yield _segment(source, port, mine, 0, _SYN, 0, True)
    yield _segment(source, port, its, mine + 1, _SYN | _ACK, 0, False)
    mine, its = mine + 1, its + 1
    yield _segment(source, port, mine, its, _ACK, 0, True)
    for turn in range(_SEGMENTS):
        size = 1400 if turn % 2 else 300
        if turn % 2:
            yield _segment(source, port, its, mine, _ACK | _PSH, size, False)
            its += size
        else:
            yield _segment(source, port, mine, its, _ACK | _PSH, size, True)
            mine += size
    yield _segment(source, port, mine, its, _FIN | _ACK, 0, True)
    yield _segment(source, port, its, mine + 1, _FIN | _ACK, 0, False)
    yield _segment(source, port, mine + 1, its + 1, _ACK, 0, True)


def _segment(
    client: int, port: int, sequence: int, ack: int, flags: int, size: int, out: bool
) -> bytes:
    """Return an Ethernet frame of a client, or (not `out`) one to it; its data are zeros."""
    ends = (client, _SERVER) if out else (_SERVER, client)
    ports = (port, PORT) if out else (PORT, port)
    return pack(
        ">12sHBBHHHBBHIIHHIIBBHHH",
        *(b"", 0x0800, 0x45, 0, 40 + size, 1, 0x4000, 64, 6, 0, *ends, *ports),
        *(sequence, ack, 0x50, flags, 64240, 0, 0),
    ) + bytes(size)
