"""Reading the kernel's connection tables; rows as a little-endian machine shows them."""

from __future__ import annotations

import socket
import sys

import pytest

from rstguard.engine.address import parse_address
from rstguard.engine.flow import Tuple
from rstguard.engine.segment import emit, rst
from rstguard.engine.wire import SYN, Packet
from rstguard.lab.crowd import addresses
from rstguard.lab.forging import marked, raw_socket
from rstguard.lab.observer import (
    Held,
    Observation,
    Sample,
    count_connections,
    counter,
    read_count,
)
from rstguard.lab.topology import ATTACKER, ATTACKERS, CLIENTS, SERVER, Lab
from rstguard.lab.waiting import wait_until

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
TCP = HEAD + (
    "   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0\n"
    "   1: 0A7100CB:0016 420200C0:9C40 01 00000000:00000000 00:00000000 00000000     0\n"
    "   2: 0A7100CB:0016 420200C0:9C41 06 00000000:00000000 00:00000000 00000000     0\n"
    "   3: 0A7100CB:0016 0B6433C6:9C40 01 00000000:00000000 00:00000000 00000000     0\n"
)
MAPPED, CLIENT = "0000000000000000FFFF0000420200C0", "0000000000000000FFFF00000B6433C6"
MAPPED_SERVER = "0000000000000000FFFF00000A7100CB"
TCP6 = HEAD + "".join(
    f"  {row}: {MAPPED_SERVER}:0050 {remote}:{port:04X} {state} 00000000:00000000 00:00000000 0 0\n"
    for row, (remote, port, state) in enumerate(
        [
            (MAPPED, 1, "01"),
            (MAPPED, 2, "08"),
            (MAPPED, 3, "03"),
            (MAPPED, 4, "03"),
            (CLIENT, 5, "01"),
            (CLIENT, 6, "03"),
        ]
    )
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the rows are a little-endian machine's")
def test_only_the_attackers_live_connections_count() -> None:
    assert count_connections([TCP, TCP6]) == (3, 2)
    assert count_connections([TCP]) == (1, 0)
    assert count_connections([HEAD]) == (0, 0)
    assert count_connections([TCP.replace("0B6433C6", "01FF1FAC")]) == (2, 0)  # 172.31.255.1
    assert count_connections([TCP.replace("0B6433C6", "010020AC")]) == (1, 0)  # 172.32.0.1


def test_what_it_writes_is_read_back() -> None:
    seen = Observation.from_json("[[[1.5, 20, 3]], [[1.6, 7, 2]]]")
    assert seen == Observation([Sample(1.5, 20, 3)], [Held(1.6, 7, 2)])


def path_of(source: str) -> Tuple:
    return Tuple(parse_address(source), parse_address(SERVER), 1000, 80)


def count_until(packets: socket.socket, least: int) -> int:
    """Return how many packets have come when there are as many as that."""
    seen = 0

    def enough() -> bool:
        nonlocal seen
        seen += read_count(packets)
        return seen >= least

    wait_until(enough)
    return seen


@pytest.mark.netns
def test_the_attackers_packets_are_counted_and_those_he_forged() -> None:
    own, honest = rst(path_of(ATTACKER), 1), rst(path_of(CLIENTS[0]), 1)
    of_many = rst(path_of(addresses(ATTACKERS, 4000, 256)[-1]), 1)
    syn = emit(Packet(*path_of(CLIENTS[0]), 1, 0, SYN, 512, 0))
    with Lab() as lab:
        with lab.inside("server"):
            packets, syns = counter(only_syns=False), counter(only_syns=True)
        with lab.inside("attacker"):
            raw = raw_socket()
        with packets, syns, raw:
            for segment in (honest, syn, marked(honest), marked(syn), own, of_many):
                raw.sendto(segment, (SERVER, 0))
            assert count_until(packets, 4) == 4
            assert read_count(syns) == 1
