"""The table read into columns is what is read one by one: shapes, mixtures, damage, and ends."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

import pytest

from rstguard.engine.flow import Flow
from rstguard.kernel import KernelError, entry
from rstguard.kernel.clock import Ages
from rstguard.kernel.netlink import CHUNK, HEADER, NLM_F_DUMP_INTR, Request
from tests.kernel.test_conntrack_entry import DONE, FLOW4, FLOW6, NOW, message

columns = pytest.importorskip("rstguard.kernel.columns")

REQUESTS = [Request(0x101, entry.AF_INET, b""), Request(0x101, entry.AF_INET6, b"")]


def renumbered(data: bytes, number: int) -> bytes:
    """Return messages as the answer to the request of this number."""
    made, at = b"", 0
    while at + HEADER.size <= len(data):
        length = max(HEADER.unpack_from(data, at)[0], HEADER.size)
        made += data[at : at + 8] + struct.pack("=I", number) + data[at + 12 : at + length]
        at += length
    return made + data[at:]


class Socket:
    """Gives prepared chunks, as often as it was asked for a dump."""

    def __init__(self, *dumps: list[bytes]) -> None:
        self.dumps = [
            [renumbered(chunk, number) for chunk in chunks]
            for number, chunks in enumerate(dumps, 1)
        ]
        self.waiting: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.waiting = self.dumps.pop(0)

    def recv_into(self, room: memoryview, size: int, flags: int) -> int:
        if not self.waiting:
            raise BlockingIOError
        chunk = self.waiting.pop(0)
        room[: len(chunk)] = chunk
        return len(chunk)

    def recvmsg(self, size: int) -> bytes:
        raise BlockingIOError

    def close(self) -> None:
        pass


def read(*dumps: list[bytes]) -> Any:
    reader = columns.ColumnReader()
    reader.close()
    reader._socket = Socket(*dumps)
    ages = Ages(wall=lambda: NOW, monotonic=lambda: 1 << 60)
    return reader.read(REQUESTS[: len(dumps)], ages)


def random_message(random: Random) -> tuple[bytes, int]:
    """Return a connection as the kernel may write it, and the number of its protocol."""
    flow = random.choice((FLOW4, FLOW4, FLOW4, FLOW6))
    flow = flow._replace(
        ident=random.getrandbits(32),
        state=random.randrange(10),
        mark=random.choice((0, random.getrandbits(32))),
        seen_reply=random.random() < 0.5,
        client_packets=random.getrandbits(40),
        server_bytes=random.getrandbits(60),
        age=random.choice((-1, 0, random.getrandbits(50))),
        timeout=random.getrandbits(32),
        zone=random.choice((0, 0, random.randrange(1, 1 << 16))),
        labels=random.choice((0, random.getrandbits(128))),
        server_first=random.random() < 0.5,
    )
    protocol = 6 if random.random() < 0.9 else 17
    return message(flow, protocol, frozenset({"counters"})), protocol


@pytest.mark.parametrize("seed", range(12))
def test_columns_show_what_the_reference_shows(seed: int) -> None:
    random = Random(seed)
    flows: list[Flow] = []
    chunks: list[bytes] = [b""]
    for _ in range(random.choice((0, 1, 40, 1000))):
        data, protocol = random_message(random)
        if random.random() < 0.1:  # mark and identity change places: as long, another shape
            for one in (8, 12):
                data = data.replace(struct.pack("=HH", 8, one), struct.pack("=HH", 8, one | 0x100))
            data = data.replace(struct.pack("=HH", 8, 8 | 0x100), struct.pack("=HH", 8, 12))
            data = data.replace(struct.pack("=HH", 8, 12 | 0x100), struct.pack("=HH", 8, 8))
        times = random.choice((1, 1, 1, 60))
        if len(chunks[-1]) + times * len(data) > CHUNK // 2:
            chunks.append(b"")
        chunks[-1] += times * data
        shown = entry.flow_of(entry.fields(data, 0, len(data)), lambda began: max(NOW - began, 0))
        assert (shown is None) == (protocol != 6)
        flows += [shown] * times if shown else []
    chunks[-1] += DONE
    assert read(chunks).flows() == flows


def test_shapes_beyond_those_that_are_kept_are_read_as_well() -> None:
    data = message(FLOW4, parts=frozenset({"counters"}))
    at = data.index(struct.pack("=HH", 8, 11))  # what nobody asks for has one name after the other
    shapes = [data[: at + 2] + struct.pack("=H", kind) + data[at + 4 :] for kind in range(100, 130)]
    assert read([b"".join(shapes) + DONE]).flows() == [FLOW4] * 30


def test_both_families_are_read_in_their_order() -> None:
    four, six = message(FLOW4), message(FLOW6)
    found = read([four * 3, DONE], [six * 2 + DONE]).flows()
    assert [flow.original for flow in found] == [FLOW4.original] * 3 + [FLOW6.original] * 2


def test_an_end_with_an_explanation_is_an_end() -> None:
    told = b"\x0c\x00\x01\x00" + b"limits\0\0"
    end = HEADER.pack(20 + len(told), 3, 2, 1, 0) + struct.pack("=i", 0) + told
    assert len(read([message(FLOW4) + end])) == 1


@pytest.mark.parametrize("length", [0, 15, 17, 24, 1 << 31])
def test_a_length_that_leads_nowhere_is_an_error(length: int) -> None:
    first = message(FLOW4)
    with pytest.raises(KernelError, match=f"cut off at byte {len(first)}"):
        read([first + HEADER.pack(length, 0x100, 0, 1, 0)])


def test_an_interrupted_dump_says_so() -> None:
    data = message(FLOW4)
    flags = struct.pack("=H", 2 | NLM_F_DUMP_INTR)
    with pytest.raises(KernelError, match="read it again"):
        read([data + data[:6] + flags + data[8:] + DONE])


def test_a_dump_that_fails_says_why() -> None:
    failed = HEADER.pack(20, 3, 2, 1, 0) + struct.pack("=i", -1)
    with pytest.raises(KernelError, match="root or with CAP_NET_ADMIN"):
        read([message(FLOW4) * 50 + failed])


def test_a_damaged_entry_is_an_error() -> None:
    data = message(FLOW4)
    with pytest.raises(ValueError, match="attribute"):
        read([data + data[:20] + b"\xff\xff" + data[22:] + DONE])


def test_answers_to_another_request_are_not_taken() -> None:
    reader = columns.ColumnReader()
    reader.close()
    data = message(FLOW4)
    reader._socket = Socket([])
    reader._socket.dumps = [[renumbered(data, 9) + renumbered(DONE, 9) + data + DONE]]
    assert len(reader.read(REQUESTS[:1], Ages())) == 1
