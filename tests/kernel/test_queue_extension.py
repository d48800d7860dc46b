"""The C extension alone: it reads what the engine's parser reads, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rstguard.engine.wire import ACK, PSH, SYN, Malformed, Packet, parse
from rstguard.kernel import KernelError, _queue, preflight, readers
from rstguard.kernel.check import Host, Outcome
from rstguard.kernel.marks import Marks
from rstguard.kernel.netlink import Request, attribute, encode
from rstguard.kernel.readers import MOST
from tests.support.packets import extension, fragment_header, ipv4, ipv6, tcp

NUMBER, MARK = 0x01020304, 5 << 24 | 7
STATES = bytes(range(256))
BASE, OUTBOUND = 24, 0x23000000

STEMS = [
    ipv4(tcp()),
    ipv4(tcp(PSH | ACK, acknowledgement=7, payload=b"GET / ")),
    ipv4(tcp(options=b"\x01\x03\x03\x07")),
    ipv4(tcp(), options=bytes(4)),
    ipv4(tcp(), fragment=1),
    ipv4(tcp(), protocol=17),
    ipv4(tcp(), total=0),
    ipv6(tcp()),
    ipv6(tcp(ACK, payload=bytes(90))),
    ipv6(tcp(), length=0),
    ipv6(extension(6) + tcp(), following=0),
    ipv6(fragment_header(6) + tcp(), following=44),
    ipv4(tcp(), total=39),
    ipv6(tcp(), length=19),
    *(ipv4(tcp(offset=words)) for words in (4, 6, 15)),
    *(ipv6(tcp(offset=words)) for words in (4, 6, 15)),
]
first_bytes = st.sampled_from([b"\x45", b"\x46", b"\x60", b"\x6f", b""])


def same(data: bytes, state: int = 0, scales: bool = False) -> bool:
    """Tell whether the extension read a packet; if so, it is to be the reference's."""
    found = _queue.parse(Packet, data, state, SYN if scales else 0)
    if found is None:
        return False
    assert type(found) is Packet
    assert found == parse(data, state, scales)
    return True


@pytest.mark.parametrize("scales", [False, True])
def test_packets_cut_off_anywhere(scales: bool) -> None:
    for data in STEMS:
        for end in range(len(data) + 1):
            same(data[:end], 5, scales)


@given(first_bytes, st.binary(max_size=120), st.integers(0, 31), st.booleans())
@example(b"\x45", b"\xff" * 60, 0, True)
def test_any_bytes(first: bytes, rest: bytes, state: int, scales: bool) -> None:
    same(first + rest, state, scales)


@given(
    st.sampled_from(STEMS),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=6),
    st.integers(0, 200),
    st.booleans(),
)
def test_packets_gone_wrong(
    data: bytes, changes: list[tuple[int, int]], end: int, scales: bool
) -> None:
    bent = bytearray(data)
    for at, value in changes:
        bent[at % len(bent)] = value
    same(bytes(bent[:end]), 3, scales)


@pytest.mark.fuzz_long
@settings(max_examples=300_000)
@given(st.sampled_from(STEMS), st.binary(max_size=60), st.integers(0, 120), st.booleans())
def test_packets_gone_wrong_long(data: bytes, other: bytes, at: int, scales: bool) -> None:
    same(data[:at] + other + data[at + len(other) :], 0, scales)


numbers, ports = st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFF)


@given(numbers, numbers, ports, ports, ports, st.integers(0, 255), st.booleans(), st.binary())
def test_every_usual_packet_is_read(
    sequence: int, acknowledgement: int, here: int, there: int, window: int, flags: int, v6: bool,
    payload: bytes,
) -> None:  # fmt: skip
    segment = tcp(
        flags,
        source_port=here,
        destination_port=there,
        sequence=sequence,
        acknowledgement=acknowledgement,
        window=window,
        payload=payload,
    )
    assert same((ipv6 if v6 else ipv4)(segment), 17)


@given(st.ip_addresses(), st.ip_addresses())
def test_every_address_is_read(source: object, destination: object) -> None:
    lay_out = ipv6 if getattr(source, "version", 0) == 6 else ipv4
    if getattr(destination, "version", 0) == getattr(source, "version", 0):
        assert same(lay_out(tcp(), source=str(source), destination=str(destination)))


def test_a_syn_whose_scale_is_asked_for_is_left_to_the_parser() -> None:
    assert not same(ipv4(tcp(SYN)), scales=True)
    assert same(ipv4(tcp(ACK)), scales=True)


def message(*attributes: bytes, kind: int = 3 << 8) -> bytes:
    return encode(Request(kind, socket.AF_INET, b"".join(attributes)), 0, 0)


def packet_message(
    data: bytes, number: int = NUMBER, mark: int | None = MARK, hook: int = 0
) -> bytes:
    """Lay out what the kernel sends: number and hook, what does not matter, mark, the packet."""
    parts = [attribute(1, struct.pack(">IHBx", number, 0x800, hook)), attribute(5, bytes(4))]
    if mark is not None:
        parts.append(attribute(3, struct.pack(">I", mark)))
    return message(*parts, attribute(10, data))


class Wire:
    """A reader, and the other end of its socket."""

    def __init__(self, base: int = BASE) -> None:
        self.far, self._near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far.setblocking(False)
        self.reader = _queue.Reader(self._near.fileno(), Packet, STATES, base, OUTBOUND)

    def read(self, *messages: bytes) -> list[tuple[int, int, Packet | bytes]]:
        for one in messages:
            self.far.send(one)
        return self.reader.receive(MOST, 0)

    def close(self) -> None:
        self.far.close()
        self._near.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


def test_a_batch_comes_in_order(wire: Wire) -> None:
    usual, odd = ipv4(tcp()), ipv4(tcp(), options=bytes(4))
    found = wire.read(*(packet_message(usual if n % 2 else odd, n) for n in range(5)))
    assert [(number, mark) for number, mark, _ in found] == [(n, MARK) for n in range(5)]
    assert found[0][2] == odd
    assert found[1][2] == parse(usual, STATES[MARK >> 24])


@given(st.lists(st.tuples(st.ip_addresses(v=4), ports, ports), max_size=MOST))
def test_what_a_packet_shares_with_the_one_before_is_no_older(
    wire: Wire, packets: list[tuple[object, int, int]]
) -> None:
    bodies = [
        ipv4(tcp(destination_port=port, window=window), destination=str(destination))
        for destination, port, window in packets
    ]
    found = wire.read(*map(packet_message, bodies))
    assert [packet for _, _, packet in found] == [
        parse(body, STATES[MARK >> 24]) for body in bodies
    ]


@pytest.mark.parametrize("base", range(25))
def test_the_state_is_in_the_eight_bits_from_the_base_on(base: int) -> None:
    wire = Wire(base)
    mark = 0xA5 << base | 0x7F000001 & ~(0xFF << base)
    ((_, seen, packet),) = wire.read(packet_message(ipv4(tcp()), mark=mark))
    wire.close()
    assert isinstance(packet, Packet)
    assert (seen, packet.state) == (mark, STATES[0xA5])


@pytest.mark.parametrize("hook", range(5))
def test_what_the_protected_side_sends_is_known_by_its_hook(wire: Wire, hook: int) -> None:
    ((_, mark, packet),) = wire.read(packet_message(ipv4(tcp()), mark=1, hook=hook))
    assert isinstance(packet, Packet)
    assert mark == (1 | OUTBOUND if hook == 4 else 1)
    assert packet.state == STATES[mark >> BASE]


def test_no_mark_is_mark_0_and_nothing_there_is_no_packet(wire: Wire) -> None:
    assert wire.read(packet_message(ipv4(tcp()), mark=None))[0][1] == 0
    assert wire.read() == []


def test_no_more_than_asked_for(wire: Wire) -> None:
    for number in range(3):
        wire.far.send(packet_message(b"", number))
    assert [len(wire.reader.receive(2, 0)) for _ in range(3)] == [2, 1, 0]
    assert MOST == _queue.MOST
    for wrong in (0, MOST + 1):
        with pytest.raises(ValueError, match=f"most must be 1 to {MOST}"):
            wire.reader.receive(wrong, 0)


def test_other_messages_are_passed_over(wire: Wire) -> None:
    refused = message(bytes(20), kind=2)
    assert wire.read(refused, packet_message(b"x"), b"", b"\0" * 7) == [(NUMBER, MARK, b"x")]


def test_a_message_that_is_cut_off_still_is_a_packet_once_its_number_is_there(wire: Wire) -> None:
    whole = packet_message(ipv4(tcp(ACK, payload=bytes(50))))
    for end in range(len(whole)):
        found = wire.read(whole[:end])
        assert len(found) == (end >= 28), end
        if found:
            number, _, data = found[0]
            packet = parse(data) if isinstance(data, bytes) else data
            assert number == NUMBER
            assert isinstance(packet, Packet | Malformed)


@given(st.binary(max_size=300), st.binary(max_size=80), st.integers(0, 100))
def test_any_message(wire: Wire, random: bytes, other: bytes, at: int) -> None:
    whole = packet_message(ipv6(tcp()))
    assert len(wire.read(random, whole[:at] + other + whole[at + len(other) :])) <= 2


def test_a_closed_socket_is_an_error() -> None:
    gone = Wire()
    gone.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        gone.reader.receive(1, 0)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        _queue.Reader(0, int, STATES, BASE, OUTBOUND)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="states must be 256 bytes"):
        _queue.Reader(0, Packet, b"", BASE, OUTBOUND)
    with pytest.raises(ValueError, match="base must be 0 to 24"):
        _queue.Reader(0, Packet, STATES, 25, OUTBOUND)
    with pytest.raises(TypeError):
        _queue.parse(int, b"", 0, False)  # type: ignore[arg-type]


class Wider(Packet):
    """A tuple with an attribute dictionary behind its items."""


@pytest.mark.parametrize("wrong", [Wider, object, dict, type("Wide", (tuple,), {})])
def test_only_a_tuple_with_nothing_added_is_a_packet(wrong: type) -> None:
    with pytest.raises(TypeError, match="with nothing added"):
        _queue.parse(wrong, STEMS[0], 0, False)
    with pytest.raises(TypeError, match="with nothing added"):
        _queue.Reader(0, wrong, STATES, BASE, OUTBOUND)


def test_an_extension_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tuple(_queue.FIELDS.split()) == Packet._fields
    monkeypatch.delenv(readers.CHOICE, raising=False)
    assert readers.extension() is _queue
    monkeypatch.setattr(_queue, "FIELDS", "destination source")
    assert readers.extension() is None
    found = preflight._reader(Host.here())
    assert found.outcome is Outcome.WARNING
    assert "rstguard's own reader was built for another version of rstguard" in found.sentence
    monkeypatch.setenv(readers.CHOICE, readers.BUILT_IN)
    with pytest.raises(KernelError, match="own packet reader, which was built for another version"):
        readers.extension()
    monkeypatch.delattr(_queue, "FIELDS")  # as none before had it
    monkeypatch.delenv(readers.CHOICE)
    assert readers.extension() is None
    with contextlib.suppress(OSError):  # without root
        readers.bind(65535, Marks()).close()
    assert "packets are read by netfilterqueue: rstguard's own reader was built" in caplog.text


def test_it_is_hardened() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf: apt-get install binutils")
    command = ["readelf", "--wide", "-lds", _queue.__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "GNU_RELRO" in said
    assert re.search(r"\(FLAGS(_1)?\).*(BIND_NOW|NOW)", said)
    assert re.search(r"GNU_STACK.*RW ", said)
    assert "__stack_chk_fail" in said


def test_nothing_is_kept(wire: Wire) -> None:
    """Read and forget in many rounds: as many blocks and references as before the first."""
    messages = [packet_message(data) for data in STEMS]
    counts = []
    for _ in range(3):
        for _ in range(5000):
            wire.read(*messages)
            for data in STEMS:
                _queue.parse(Packet, data, 0, True)
            _queue.Reader(0, Packet, STATES, BASE, OUTBOUND)
        counts.append((sys.getallocatedblocks(), sys.getrefcount(Packet)))
    assert abs(counts[2][0] - counts[1][0]) < 50
    assert abs(counts[2][1] - counts[1][1]) < 5
