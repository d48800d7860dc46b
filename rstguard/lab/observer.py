"""What of the attack reaches the server, counted in the server's own namespace.

A program of its own (``python -m rstguard.lab.observer``): it writes ``ready``, samples until its
standard input is closed, and ends with one line of JSON.  Packets are counted by the kernel through
a packet socket with a filter for the attacker's addresses, and for the type of service by which the
lab's attackers mark what they send in others' names (linux/filter.h, packet(7)), connections by
reading /proc/net/tcp and tcp6.
"""

from __future__ import annotations

import ctypes
import json
import select
import socket
import struct
import sys
import time
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import NamedTuple

from rstguard.lab.forging import FORGED
from rstguard.lab.topology import ATTACKER, ATTACKERS

INTERVAL = 0.02
"""Seconds between two samples of the packet counts."""
CONNECTIONS_EVERY = 5
"""Connections are read at each so-manieth sample."""

_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_SO_ATTACH_FILTER = 26
_ETH_P_IP = 0x0800

# Operation codes of classic BPF, as in linux/bpf_common.h.
_LOAD_WORD, _LOAD_BYTE, _LOAD_BYTE_X, _LOAD_IP_HEADER_LENGTH = 0x20, 0x30, 0x50, 0xB1
_AND, _JUMP_IF_EQUAL, _RETURN = 0x54, 0x15, 0x06

_ATTACKER = int(IPv4Address(ATTACKER))
_ATTACKERS, _MASK = map(int, (IPv4Network(ATTACKERS)[0], IPv4Network(ATTACKERS).netmask))
_BYTES = -1 if sys.byteorder == "little" else 1

_ESTABLISHED = frozenset({"01", "04", "05", "08"})
_SYN_RECEIVED = frozenset({"03", "0C"})


class Sample(NamedTuple):
    """Packets and SYNs of the attackers since the sample before; monotonic seconds."""

    time: float
    packets: int
    syns: int


class Held(NamedTuple):
    """Connections of the attackers that the server holds now; monotonic seconds."""

    time: float
    established: int
    half_open: int


class Observation(NamedTuple):
    """All that was seen from start to end."""

    samples: list[Sample]
    held: list[Held]

    @classmethod
    def from_json(cls, text: str) -> Observation:
        """Read what the program wrote.

        Raises:
            ValueError: it is not that.
        """
        samples, held = json.loads(text)
        return cls([Sample(*row) for row in samples], [Held(*row) for row in held])


def counter(*, only_syns: bool) -> socket.socket:
    """Return a packet socket that counts IPv4 packets of the attackers, forged ones too."""
    program = [(_LOAD_WORD, 0, 0, 12), (_JUMP_IF_EQUAL, 4, 0, _ATTACKER)]
    program += [(_AND, 0, 0, _MASK), (_JUMP_IF_EQUAL, 2, 0, _ATTACKERS)]
    program += [(_LOAD_BYTE, 0, 0, 1), (_JUMP_IF_EQUAL, 0, 5 if only_syns else 1, FORGED)]
    if only_syns:
        # Byte 13 of the TCP header: SYN set, ACK not set.
        program += [(_LOAD_IP_HEADER_LENGTH, 0, 0, 0), (_LOAD_BYTE_X, 0, 0, 13)]
        program += [(_AND, 0, 0, 0x12), (_JUMP_IF_EQUAL, 0, 1, 0x02)]
    program += [(_RETURN, 0, 0, 1), (_RETURN, 0, 0, 0)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    # Bound to a protocol only after the filter is there: nothing unfiltered is ever counted.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    sock.setsockopt(
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        struct.pack("HL", len(program), ctypes.addressof(code)),
    )
    # What does not fit is counted all the same (packet(7), PACKET_STATISTICS).
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.bind(("eth0", _ETH_P_IP))
    return sock


def read_count(sock: socket.socket) -> int:
    """Return the packets since the last call; reading resets the kernel's count."""
    packets, _dropped = struct.unpack("II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    return int(packets)


def count_connections(tables: list[str]) -> tuple[int, int]:
    """Count the attackers' established and half-open IPv4 connections in /proc/net tables."""
    established = half_open = 0
    for table in tables:
        for line in table.splitlines()[1:]:
            fields = line.split(maxsplit=4)
            if _is_attackers(fields[2].partition(":")[0]):
                established += fields[3] in _ESTABLISHED
                half_open += fields[3] in _SYN_RECEIVED
    return established, half_open


def _is_attackers(shown: str) -> bool:
    """Tell whether an address as the tables show it, or one mapped into IPv6, is an attacker's."""
    # Each 32 bits are one number in the machine's byte order.
    number = int.from_bytes(bytes.fromhex(shown[-8:])[::_BYTES], "big")
    return number == _ATTACKER or number & _MASK == _ATTACKERS


def _observe() -> Observation:
    packets, syns = counter(only_syns=False), counter(only_syns=True)
    tables = [Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")]
    seen = Observation([], [])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        now = time.monotonic()
        seen.samples.append(Sample(now, read_count(packets), read_count(syns)))
        if len(seen.samples) % CONNECTIONS_EVERY == 0:
            texts = [path.read_text(encoding="ascii") for path in tables]
            seen.held.append(Held(time.monotonic(), *count_connections(texts)))
    return seen


if __name__ == "__main__":
    json.dump(_observe(), sys.stdout)
    sys.stdout.write("\n")
