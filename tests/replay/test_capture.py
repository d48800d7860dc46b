"""Captures of every kind are read, and a damaged one as far as it goes."""

from __future__ import annotations

import gzip
import io
import lzma
from importlib.util import find_spec
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.engine.ruleset import SECOND
from rstguard.replay.capture import KEPT, Batch, Capture, open_capture
from rstguard.replay.unpacking import CaptureError
from tests.replay.captures import START, block, enhanced, interface, pcap, section
from tests.support.packets import ipv4, ipv6, tcp

PACKETS: Batch = [
    (START, ipv4(tcp())),
    (START + 1_000, ipv6(tcp())),
    (START + 5 * SECOND + 999_000, ipv4(tcp(16, payload=b"x" * 500))),
]
CUT = [(time, data[:KEPT]) for time, data in PACKETS]


def read(data: bytes) -> tuple[Capture, Batch]:
    capture = Capture(io.BytesIO(data), "test")
    return capture, [packet for batch in capture.batches() for packet in batch]


def framed(head: bytes) -> Batch:
    return [(time, head + data) for time, data in PACKETS]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [True, False])
def test_pcap_in_both_byte_orders_and_both_units_of_time(order: str, nano: bool) -> None:
    capture, found = read(pcap(PACKETS, order, nano))
    assert found == CUT
    assert not capture.damage
    assert capture.frames == 3


def ethernet(kind: bytes = b"\x08\x00", tags: bytes = b"") -> bytes:
    return bytes(12) + tags + kind


@pytest.mark.parametrize("kind", ["pcap", "pcapng", "pcap.gz"])
@pytest.mark.parametrize("first", ["ethernet", "raw"])
def test_files_that_another_program_writes(kind: str, first: str, tmp_path: Path) -> None:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.utils import wrpcap, wrpcapng

    segments = [IP(src="192.0.2.1", dst="192.0.2.2") / TCP(sport=n) / b"hello" for n in range(50)]
    frames = [Ether(dst="00:00:00:00:00:01") / s for s in segments]
    frames = frames if first == "ethernet" else segments
    for number, frame in enumerate(frames):
        frame.time = 1_700_000_000 + number
    file = tmp_path / f"capture.{kind}"
    writer = wrpcapng if kind == "pcapng" else wrpcap
    writer(str(file), frames, **({"gz": True} if kind == "pcap.gz" else {}))
    with open_capture(file) as capture:
        found = [packet for batch in capture.batches() for packet in batch]
    assert found == [(START + n * SECOND, bytes(s)) for n, s in enumerate(segments)]
    assert not capture.damage


LINKS = {
    "null": (0, pack("<I", 2)),
    "ethernet": (1, ethernet()),
    "802.1Q": (1, ethernet(tags=b"\x81\x00\x00\x07")),
    "QinQ": (1, ethernet(tags=b"\x88\xa8\x00\x07\x81\x00\x00\x08")),
    "PPPoE": (1, ethernet(b"\x88\x64") + b"\x11\x00\x00\x07\x00\x00\x00\x21"),
    "PPPoE, tagged": (1, ethernet(b"\x88\x64", b"\x81\x00\x00\x07") + bytes(6) + b"\x00\x57"),
    "SNAP": (1, bytes(12) + b"\x00\x40" + b"\xaa\xaa\x03\x00\x00\x00\x08\x00"),
    "raw": (101, b""),
    "raw, another number": (12, b""),
    "loop": (108, pack(">I", 2)),
    "cooked": (113, bytes(14) + b"\x08\x00"),
    "cooked, tagged": (113, bytes(14) + b"\x81\x00\x00\x07\x08\x00"),
    "cooked 2": (276, b"\x08\x00" + bytes(18)),
}


@pytest.mark.parametrize(("link", "head"), LINKS.values(), ids=LINKS)
def test_each_link_type(link: int, head: bytes) -> None:
    capture, found = read(pcap(framed(head), link=link))
    assert found == CUT
    assert not capture.foreign


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (b"", "frames that were cut off"),
        (b"\x00" * 14, "LLC, such as spanning tree"),
        (ethernet(b"\x08\x06") + bytes(28), "ARP"),
        (ethernet(b"\x88\x63") + bytes(28), "PPPoE discovery"),
        (ethernet(b"\x88\x64") + bytes(6) + b"\xc0\x21" + bytes(28),
         "PPPoE sessions that carry no IP"),
        (ethernet(b"\x12\x34") + bytes(28), "EtherType 0x1234"),
    ],
)  # fmt: skip
def test_what_is_not_ip_is_counted_by_kind_and_passed_over(frame: bytes, kind: str) -> None:
    capture, found = read(pcap([(START, frame), *framed(ethernet())], link=1))
    assert found == CUT
    assert capture.foreign == 1
    assert capture.kinds == {kind: 1}


def test_pcapng_with_every_block_kind() -> None:
    nano = pack("<HHB3x", 9, 1, 9)
    shifted = pack("<HHB3xHHqI", 9, 1, 3, 14, 8, 1_700_000_000, 0)
    binary = pack("<HHB3x", 9, 1, 0x80 | 10)
    first, second, third = PACKETS
    data = (
        section()
        + block(10, b"unknown kinds are passed over")
        + interface(options=nano)
        + interface(113, options=shifted)
        + interface(options=binary)
        + enhanced(first[0], first[1])
        + enhanced(7, bytes(14) + b"\x86\xdd" + second[1], number=1)
        + enhanced(START // SECOND << 10 | 512, third[1], number=2)
        + block(3, pack("<I", len(first[1])) + first[1])
    )
    capture, found = read(data)
    assert found == [
        (START, first[1]),
        (START + 7_000_000, second[1]),
        (START + SECOND // 2, third[1][:KEPT]),
        (START + SECOND // 2, first[1]),  # a simple block has no time: it has the last one's
    ]
    assert not capture.damage
    assert capture.frames == 4


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_sections_may_differ_in_byte_order(order: str) -> None:
    other = "><"[order == ">"]
    packet = PACKETS[0]
    data = b"".join(
        section(o) + interface(order=o) + enhanced(packet[0] // 1000, packet[1], o)
        for o in (order, other)
    )
    assert read(data)[1] == [packet, packet]


def test_an_unknown_link_type_of_a_later_interface_is_counted() -> None:
    data = section() + interface() + interface(147) + enhanced(0, b"abcd", number=1)
    capture, found = read(data)
    assert not found
    assert capture.foreign == 1


def test_more_than_one_chunk(tmp_path: Path) -> None:
    many = [(START + n, ipv4(tcp(payload=bytes(200)))) for n in range(20_000)]
    for data in (pcap(many), section() + interface() + b"".join(enhanced(0, p) for _, p in many)):
        capture, found = read(data)
        assert [p for _, p in found] == [p[:KEPT] for _, p in many]
        assert not capture.damage


def test_gzip_is_recognised_and_progress_is_told(tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap.gz"
    file.write_bytes(gzip.compress(pcap(PACKETS)))
    with open_capture(file) as capture:
        assert [p for batch in capture.batches() for p in batch] == CUT
        assert capture.done() == 1.0


def test_xz_is_recognised_and_a_truncated_one_used(tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap.xz"
    file.write_bytes(lzma.compress(pcap(PACKETS)))
    with open_capture(file) as capture:
        assert [p for batch in capture.batches() for p in batch] == CUT
    many = [(START + n * 7919, ipv4(tcp(sequence=n * 48271 % 2**32))) for n in range(20_000)]
    whole = lzma.compress(pcap(many))
    file.write_bytes(whole[: len(whole) * 3 // 4])
    with open_capture(file) as capture:
        found = [p for batch in capture.batches() for p in batch]
        assert found
        assert found == many[: len(found)]
        assert "breaks off" in capture.damage


def test_zstd_is_read_or_named(tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap.zst"
    data = pcap(PACKETS)
    # One raw block in a frame that tells its size (RFC 8878, 3.1.1).
    head = b"\x28\xb5\x2f\xfd\xa0" + pack("<I", len(data))
    file.write_bytes(head + (len(data) << 3 | 1).to_bytes(3, "little") + data)
    if find_spec("compression") is None:
        with pytest.raises(CaptureError, match="compressed with zstd"), open_capture(file):
            pass
        return
    with open_capture(file) as capture:
        assert [p for batch in capture.batches() for p in batch] == CUT


def test_a_truncated_gzip_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    many = [(START + n * 7919, ipv4(tcp(sequence=n * 48271 % 2**32))) for n in range(60_000)]
    file = tmp_path / "capture.pcap.gz"
    whole = gzip.compress(pcap(many))
    file.write_bytes(whole[: len(whole) * 3 // 4])
    with open_capture(file) as capture:
        found = [p for batch in capture.batches() for p in batch]
    assert found == many[: len(found)]
    assert "breaks off" in capture.damage


@pytest.mark.parametrize("kind", ["pcap", "pcapng"])
@pytest.mark.parametrize("missing", [1, 20, 60])
def test_a_truncated_file_is_used_and_says_where_it_broke(kind: str, missing: int) -> None:
    last = ipv4(tcp(payload=bytes(40)))
    packets = [*PACKETS, (START, last)]
    whole = pcap(packets)
    if kind == "pcapng":
        whole = section() + interface() + b"".join(enhanced(t // 1000, p) for t, p in packets)
    capture, found = read(whole[:-missing])
    assert [p for _, p in found] == [p for _, p in CUT]
    assert "breaks off after packet 3" in capture.damage
    assert "what is before that was used" in capture.damage


def test_an_impossible_length_is_damage() -> None:
    data = pcap(PACKETS) + pack("<IIII", 0, 0, 1 << 30, 1 << 30) + bytes(100)
    capture, found = read(data)
    assert found == CUT
    assert "a packet of 1,073,741,824 bytes" in capture.damage
    capture, found = read(pcap([*PACKETS, (START, bytes(300_000))]))  # as large, but all there
    assert found == CUT
    assert "a packet of 300,000 bytes" in capture.damage
    capture, found = read(
        section() + interface() + enhanced(0, PACKETS[0][1]) + pack("<IIII", 6, 7, 0, 0)
    )
    assert found == [(0, PACKETS[0][1])]
    assert "a block of 7 bytes" in capture.damage


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n" * 9, b"\xd4\xc3\xb2\xa1", bytes(99)])
def test_what_is_no_capture_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(CaptureError, match="test is no capture: name a pcap or pcapng file"):
        read(data)


def test_an_unknown_link_type_is_one_clear_error() -> None:
    with pytest.raises(CaptureError, match="link type 147"):
        read(pcap(PACKETS, link=147))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CaptureError, match="cannot be read"), open_capture(path):
            pass


WHOLE = (
    pcap(PACKETS),
    pcap(framed(ethernet()), ">", nano=False, link=1),
    section() + interface(options=pack("<HHB3x", 9, 1, 9)) + enhanced(START, PACKETS[0][1]),
    section(">") + interface(order=">") + block(3, pack(">I", 40) + PACKETS[0][1], ">"),
    gzip.compress(pcap(PACKETS)),
)


def check(data: bytes) -> None:
    """Whatever the bytes, there is a capture or a CaptureError, and packets are packets."""
    try:
        stream: Any = io.BytesIO(data)
        if data[:2] == b"\x1f\x8b":
            stream = gzip.GzipFile(fileobj=stream)
        capture = Capture(stream, "fuzz")
        for batch in capture.batches():
            for time, packet in batch:
                assert isinstance(time, int)
                assert 0 < len(packet) <= KEPT
    except CaptureError as error:
        sentence = str(error)
    else:
        sentence = capture.damage or "fuzz"
    assert "fuzz" in sentence


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 8))
        data[at : at + cut] = draw(st.binary(max_size=8))
    return bytes(data)


@settings(max_examples=400)
@given(mutated())
def test_damaged_captures_never_raise_anything_else(data: bytes) -> None:
    check(data)


@settings(max_examples=200)
@given(st.sampled_from([b"\xd4\xc3\xb2\xa1", b"\x0a\x0d\x0d\x0a", b"\x1f\x8b", b""]), st.binary())
def test_any_bytes(head: bytes, data: bytes) -> None:
    check(head + data)
