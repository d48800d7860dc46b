"""Captures for the tests: conversations packet by packet, and the files they are written to."""

from __future__ import annotations

from pathlib import Path
from struct import pack
from typing import Any

from rstguard.engine.ruleset import SECOND, Rule, RuleSet
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN
from rstguard.replay.capture import Batch
from rstguard.replay.play import Replay
from tests.support.packets import CLIENT, SERVER, SERVER6, ipv4, ipv6, ruleset, tcp

START = 1_700_000_000 * SECOND
MILLISECOND = SECOND // 1000
HERS, ITS = 1000, 9000
"""Initial sequence numbers of clients and of the server."""
SYN_ACK: dict[str, Any] = {"sequence": ITS, "acknowledgement": HERS + 1}
NEXT: dict[str, Any] = {"sequence": HERS + 1, "acknowledgement": ITS + 1}
"""The numbers of a SYN-ACK, and of the client's first segment after it."""


class Traffic:
    """Packets with their times; `at` seconds from the start of the capture."""

    def __init__(self) -> None:
        self.packets: Batch = []

    def add(self, at: float, packet: bytes) -> None:
        """Add one IP packet."""
        self.packets.append((START + round(at * SECOND), packet))

    @property
    def in_order(self) -> Batch:
        """All packets by time."""
        return sorted(self.packets, key=lambda item: item[0])

    def client(self, at: float, flags: int, source: str = CLIENT, **more: Any) -> None:
        """Add a segment to the server; `port` and `target` are its, the rest is `tcp`'s."""
        target = more.pop("target", SERVER6 if ":" in source else SERVER)
        segment = tcp(flags, destination_port=more.pop("port", 80), **more)
        lay_out = ipv6 if ":" in source else ipv4
        self.add(at, lay_out(segment, source=source, destination=target))

    def server(self, at: float, flags: int, source: str = CLIENT, **more: Any) -> None:
        """Add a segment from the server to a client (`source`)."""
        target = more.pop("target", SERVER6 if ":" in source else SERVER)
        ports = {"source_port": more.pop("port", 80)}
        ports["destination_port"] = more.pop("source_port", 40000)
        lay_out = ipv6 if ":" in source else ipv4
        self.add(at, lay_out(tcp(flags, **ports, **more), source=target, destination=source))

    def syn(self, at: float, source: str = CLIENT, **more: Any) -> None:
        """Add a SYN."""
        self.client(at, SYN, source, sequence=HERS, **more)

    def open(self, at: float, source: str = CLIENT, **more: Any) -> None:
        """Add a whole handshake, in two milliseconds."""
        self.syn(at, source, **more)
        self.server(at + 0.001, SYN | ACK, source, **SYN_ACK, **more)
        self.client(at + 0.002, ACK, source, **NEXT, **more)

    def say(self, at: float, text: bytes, source: str = CLIENT, **more: Any) -> None:
        """Add data of the client; the first, as its number says."""
        self.client(at, ACK | PSH, source, payload=text, **NEXT, **more)

    def answer(self, at: float, text: bytes, source: str = CLIENT, **more: Any) -> None:
        """Add data of the server; the first, as its number says."""
        numbers = {"sequence": ITS + 1, "acknowledgement": HERS + 1}
        self.server(at, ACK | PSH, source, payload=text, **numbers, **more)

    def close(self, at: float, source: str = CLIENT, said: int = 5, **more: Any) -> None:
        """Add the end of a connection on which each end has said so many bytes."""
        hers, its = HERS + 1 + said, ITS + 1 + said
        numbers = {"sequence": hers, "acknowledgement": its}
        self.client(at, FIN | ACK, source, **numbers, **more)
        numbers = {"sequence": its, "acknowledgement": hers + 1}
        self.server(at + 0.001, FIN | ACK, source, **numbers, **more)
        numbers = {"sequence": hers + 1, "acknowledgement": its + 1}
        self.client(at + 0.002, ACK, source, **numbers, **more)

    def reset(self, at: float, source: str = CLIENT, **more: Any) -> None:
        """Add the client's RST."""
        self.client(at, RST, source, sequence=HERS + 1, **more)

    def visit(self, at: float, source: str = CLIENT, **more: Any) -> None:
        """Add a connection with a word from each end, in 22 milliseconds."""
        self.open(at, source, **more)
        self.say(at + 0.01, b"hello", source, **more)
        self.answer(at + 0.015, b"hello", source, **more)
        self.close(at + 0.02, source, **more)


def played(traffic: Traffic, *rules: Rule, policy: RuleSet | None = None) -> Replay:
    """Return a replay of all packets by a policy of just these rules."""
    replay = Replay(policy or ruleset(*rules))
    replay.feed(traffic.in_order)
    return replay


def hits(replay: Replay) -> set[tuple[str, str, str]]:
    """Return kind, source or connection, and rule of all that was hit."""
    return {(hit.kind, str(hit.subject), hit.rule) for hit in replay.hits}


def pcap(packets: Batch, order: str = "<", nano: bool = True, link: int = 101) -> bytes:
    """Lay out a pcap file; `packets` must already be frames of the link type."""
    magic, unit = (0xA1B23C4D, 1) if nano else (0xA1B2C3D4, 1000)
    out = [pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link)]
    for time, data in packets:
        seconds, rest = divmod(time, SECOND)
        out.append(pack(order + "IIII", seconds, rest // unit, len(data), len(data)) + data)
    return b"".join(out)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    """Lay out a pcapng block."""
    body += bytes(-len(body) % 4)
    size = pack(order + "I", 12 + len(body))
    return pack(order + "I", kind) + size + body + size


def section(order: str = "<") -> bytes:
    """Lay out the header of a pcapng section."""
    return block(0x0A0D0D0A, pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(link: int = 101, order: str = "<", options: bytes = b"") -> bytes:
    """Lay out the description of an interface."""
    return block(1, pack(order + "HHI", link, 0, 0) + options, order)


def enhanced(time: int, data: bytes, order: str = "<", number: int = 0) -> bytes:
    """Lay out a packet block; `time` is in the interface's units."""
    head = pack(order + "IIIII", number, time >> 32, time & 0xFFFFFFFF, len(data), len(data))
    return block(6, head + data, order)


def write(directory: Path, traffic: Traffic) -> Path:
    """Write a capture file."""
    file = directory / "capture.pcap"
    file.write_bytes(pcap(traffic.in_order))
    return file
