"""The flood's SYNs that reach the server, sampled every 20 ms in the server's own namespace.

A program of its own (``python -m rstguard.lab.bench.counting``): it writes ``ready``, samples until
its standard input is closed, and ends with one line of JSON.  The kernel counts through a packet
socket with a filter (linux/filter.h, packet(7)): asking costs one system call, so that the measure
does not take the processor from what is measured.
"""

from __future__ import annotations

import ctypes
import json
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_interface, ip_network
from typing import NamedTuple

from rstguard.lab.observer import INTERVAL, read_count
from rstguard.lab.topology import CLIENTS, NEW_CLIENTS

HONEST = (str(ip_interface(f"{CLIENTS[0]}/24").network), NEW_CLIENTS)
"""Whose SYNs are not the flood's."""
WINDOW = 0.1
"""Seconds: contained is a flood of which no later window of this length sees more than `LIMIT`."""
LIMIT = 10
"""SYNs in a window: 100 a second, which any server bears."""

_SO_ATTACH_FILTER = 26
_ETH_P_IP = 0x0800
# Operation codes of classic BPF, as in linux/bpf_common.h.
_LOAD_WORD, _LOAD_BYTE_X, _LOAD_IP_HEADER_LENGTH = 0x20, 0x50, 0xB1
_AND, _JUMP_IF_EQUAL, _RETURN = 0x54, 0x15, 0x06

_Line = tuple[int, int, int, int]


class Arrivals(NamedTuple):
    """SYNs since the sample before, at monotonic seconds."""

    time: float
    syns: int


def flood_filter(honest: Sequence[str] = HONEST) -> list[_Line]:
    """Return a classic BPF program that keeps SYNs from outside the IPv4 networks `honest`."""
    lines: list[_Line] = []
    left = 3 * len(honest) + 4
    for network in map(ip_network, honest):
        lines += [(_LOAD_WORD, 0, 0, 12), (_AND, 0, 0, int(network.netmask))]
        left -= 3
        # Jumps are relative: past all that is left, and past the line that keeps.
        lines.append((_JUMP_IF_EQUAL, left + 1, 0, int(network.network_address)))
    # Byte 13 of the TCP header: SYN set, ACK not set.
    lines += [(_LOAD_IP_HEADER_LENGTH, 0, 0, 0), (_LOAD_BYTE_X, 0, 0, 13)]
    lines += [(_AND, 0, 0, 0x12), (_JUMP_IF_EQUAL, 0, 1, 0x02)]
    return [*lines, (_RETURN, 0, 0, 1), (_RETURN, 0, 0, 0)]


def contained(arrivals: Sequence[Arrivals]) -> float | None:
    """Return the seconds from the first SYN until no later `WINDOW` saw more than `LIMIT` of them.

    0 if none ever did, None if the last one did.
    """
    first, last, total, after = 0.0, -1, 0, 0
    for index, arrival in enumerate(arrivals):
        while after < len(arrivals) and arrivals[after].time < arrival.time + WINDOW:
            total += arrivals[after].syns
            after += 1
        # A sample tells of the interval before it.
        first = first or (arrival.time - INTERVAL if arrival.syns else 0.0)
        if total > LIMIT:
            last = index
        total -= arrival.syns
    if last < 0:
        return 0.0
    if arrivals[last].time > arrivals[-1].time - WINDOW:
        return None
    return round(arrivals[last].time - first, 2)


def _counter() -> socket.socket:
    program = flood_filter()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    # Bound to a protocol only after the filter is there: nothing unfiltered is ever counted.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    attached = struct.pack("HL", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
    # What does not fit is counted all the same (packet(7), PACKET_STATISTICS).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.bind(("eth0", _ETH_P_IP))
    return sock


def _count() -> list[Arrivals]:
    counter, arrivals = _counter(), []
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        arrivals.append(Arrivals(time.monotonic(), read_count(counter)))
    return arrivals


if __name__ == "__main__":
    json.dump(_count(), sys.stdout)
    sys.stdout.write("\n")
