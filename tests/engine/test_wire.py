"""Parsing: a sentence, bytes in, a value out; and whatever the bytes, never an exception."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN

from rstguard.engine.address import parse_address
from rstguard.engine.wire import (
    ACK,
    BAD_FLAGS,
    FIN,
    PSH,
    RST,
    SYN,
    URG,
    Malformed,
    Packet,
    parse,
)
from tests.support.packets import (
    CLIENT,
    CLIENT6,
    SERVER,
    SERVER6,
    authentication_header,
    extension,
    fragment_header,
    ipv4,
    ipv6,
    tcp,
)

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, NO_NEXT, DESTINATION = 0, 43, 44, 51, 59, 60
ECE, CWR = 64, 128


def expected(v6: bool = False, **changes: int) -> Packet:
    """Return the packet that `tcp()` in `ipv4()` or `ipv6()` stands for."""
    usual = Packet(
        source=parse_address(CLIENT6 if v6 else CLIENT),
        destination=parse_address(SERVER6 if v6 else SERVER),
        source_port=40000,
        destination_port=80,
        sequence=0x01020304,
        acknowledgement=0,
        flags=SYN,
        window=64240,
        payload_length=0,
    )
    return usual._replace(**changes)


# A SYN of Linux with all its usual options, as it was on the wire.
LINUX_SYN = bytes.fromhex(
    "4500003c1c4640004006 0000 c6336407cb00710a".replace(" ", "")
    + "9c40005001020304000000 00a002faf000000000".replace(" ", "")
    + "020405b40402080a0000 0001000000000103 0307".replace(" ", "")
)

READABLE: list[tuple[str, bytes, Packet]] = [
    ("a SYN with options", LINUX_SYN, expected()),
    ("a bare IPv4 SYN", ipv4(tcp()), expected()),
    (
        "data: its length is what the headers leave",
        ipv4(tcp(PSH | ACK, acknowledgement=7, payload=b"GET / ")),
        expected(flags=PSH | ACK, acknowledgement=7, payload_length=6),
    ),
    ("IPv4 options of one word", ipv4(tcp(), options=bytes([1, 1, 1, 0])), expected()),
    ("IPv4 options, as many as fit", ipv4(tcp(), options=bytes([1] * 40)), expected()),
    (
        "the first fragment, if it holds the TCP header",
        ipv4(tcp(ACK, payload=b"12345678"), fragment=0x2000),
        expected(flags=ACK, payload_length=8),
    ),
    ("the reserved bit of the fragment field", ipv4(tcp(), fragment=0x8000), expected()),
    (
        "padding after the packet is not payload",
        ipv4(tcp(), total=40) + bytes(6),
        expected(),
    ),
    (
        "a copy cut short keeps the length of the whole",
        ipv4(tcp(ACK), total=1500),
        expected(flags=ACK, payload_length=1460),
    ),
    (
        "a total length of 0 is an offloaded packet over 64 KiB",
        ipv4(tcp(ACK, payload=b"x" * 100), total=0),
        expected(flags=ACK, payload_length=100),
    ),
    ("TCP options that are only padding", ipv4(tcp(options=bytes(40))), expected()),
    ("a bare IPv6 SYN", ipv6(tcp()), expected(True)),
    (
        "IPv6 with data",
        ipv6(tcp(ACK, payload=b"data")),
        expected(True, flags=ACK, payload_length=4),
    ),
    (
        "a jumbogram's length is not in the header",
        ipv6(tcp(ACK, payload=b"x" * 9), length=0),
        expected(True, flags=ACK, payload_length=9),
    ),
    (
        "hop-by-hop options",
        ipv6(extension(6) + tcp(), following=HOP_BY_HOP),
        expected(True),
    ),
    (
        "a long destination options header",
        ipv6(extension(6, units=30) + tcp(), following=DESTINATION),
        expected(True),
    ),
    ("a routing header", ipv6(extension(6, units=2) + tcp(), following=ROUTING), expected(True)),
    (
        "an authentication header, counted in 4-byte units",
        ipv6(authentication_header(6) + tcp(), following=AUTHENTICATION),
        expected(True),
    ),
    (
        "the first IPv6 fragment",
        ipv6(fragment_header(6) + tcp(ACK, payload=b"12345678"), following=FRAGMENT),
        expected(True, flags=ACK, payload_length=8),
    ),
    (
        "an atomic fragment (RFC 6946)",
        ipv6(fragment_header(6, more=False) + tcp(), following=FRAGMENT),
        expected(True),
    ),
    (
        "all extension headers in a row",
        ipv6(
            extension(DESTINATION)
            + extension(ROUTING, units=1)
            + extension(FRAGMENT, units=2)
            + fragment_header(AUTHENTICATION)
            + authentication_header(DESTINATION, words=6)
            + extension(6)
            + tcp(ACK, payload=b"!"),
            following=HOP_BY_HOP,
        ),
        expected(True, flags=ACK, payload_length=1),
    ),
    (
        "a mapped address stays IPv6",
        ipv6(tcp(), source="::ffff:198.51.100.7"),
        expected(True, source=parse_address("::ffff:198.51.100.7")),
    ),
]

UNREADABLE: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "empty"),
    ("version 0", bytes(60), "IP version 0"),
    ("version 5", b"\x55" + bytes(60), "IP version 5"),
    ("version 15", b"\xff" * 60, "IP version 15"),
    ("half an IPv4 header", ipv4(tcp())[:19], "IPv4 header cut off"),
    ("an IPv4 header that claims 16 bytes", ipv4(tcp(), words=4), "IPv4 header length below 5"),
    ("UDP", ipv4(tcp(), protocol=17), "protocol 17"),
    ("a later fragment", ipv4(tcp(), fragment=0x2001), "later fragment"),
    ("the last fragment", ipv4(tcp(), fragment=0x1FFF), "later fragment"),
    ("an IPv4 header that claims to reach past the data", ipv4(tcp(), words=15), "cut off"),
    ("a TCP header cut off", ipv4(tcp()[:19]), "TCP header cut off"),
    ("a tiny fragment, flags left for the next", ipv4(tcp()[:8], fragment=0x2000), "cut off"),
    ("a data offset of 0", ipv4(tcp(offset=0)), "TCP data offset below 5"),
    ("a data offset of 4", ipv4(tcp(offset=4)), "TCP data offset below 5"),
    ("a data offset past the packet", ipv4(tcp(offset=6)), "TCP header longer than the packet"),
    ("a total length that ends before TCP does", ipv4(tcp(), total=39), "longer than the packet"),
    ("a total length below the header's own", ipv4(tcp(), total=8), "longer than the packet"),
    ("half an IPv6 header", ipv6(tcp())[:39], "IPv6 header cut off"),
    ("no next header", ipv6(tcp(), following=NO_NEXT), "protocol 59"),
    ("ICMPv6", ipv6(tcp(), following=58), "protocol 58"),
    ("encrypted", ipv6(tcp(), following=50), "protocol 50"),
    (
        "an extension header cut off",
        ipv6(extension(6), following=DESTINATION)[:46],
        "IPv6 extension header cut off",
    ),
    (
        "an extension header that claims to reach past the data",
        ipv6(bytes([6, 255]) + bytes(60), following=DESTINATION),
        "TCP header cut off",
    ),
    (
        "a later IPv6 fragment",
        ipv6(fragment_header(6, offset=1) + tcp(), following=FRAGMENT),
        "later fragment",
    ),
    (
        "extension headers without end",
        ipv6(extension(DESTINATION) * 40 + extension(6) + tcp(), following=DESTINATION),
        "too many IPv6 extension headers",
    ),
    ("an IPv6 data offset below 5", ipv6(tcp(offset=3)), "TCP data offset below 5"),
    ("an IPv6 length that ends before TCP does", ipv6(tcp(), length=19), "longer than the packet"),
]

by_sentence = [pytest.param(data, packet, id=text) for text, data, packet in READABLE]


@pytest.mark.parametrize(("data", "packet"), by_sentence)
def test_reads(data: bytes, packet: Packet) -> None:
    assert parse(data) == packet


@pytest.mark.parametrize(
    ("data", "problem"), [pytest.param(data, why, id=text) for text, data, why in UNREADABLE]
)
def test_refuses(data: bytes, problem: str) -> None:
    found = parse(data)
    assert isinstance(found, Malformed)
    assert problem in found.problem


@pytest.mark.parametrize(("data", "packet"), by_sentence)
def test_cut_at_every_byte(data: bytes, packet: Packet) -> None:
    """Cut inside the headers it is malformed, cut behind them it is the same packet."""
    start = data.index(b"\x9c\x40\x00\x50")
    length_is_told = data[2:4] != b"\0\0" if data[0] >> 4 == 4 else data[4:6] != b"\0\0"
    for end in range(len(data)):
        found = parse(data[:end])
        if end < start + 20:
            assert isinstance(found, Malformed), f"cut at {end}"
        elif length_is_told:
            assert found == packet, f"cut at {end}"


@pytest.mark.parametrize(("data", "packet"), by_sentence)
def test_carries_the_state_through(data: bytes, packet: Packet) -> None:
    assert parse(data, state=3) == packet._replace(state=3)


SCALES: list[tuple[str, bytes, int]] = [
    ("no options", b"", -1),
    ("scale first", bytes([3, 3, 7, 0]), 7),
    ("scale after padding", bytes([1, 3, 3, 9]), 9),
    ("scale after the others", bytes([2, 4, 5, 180, 4, 2, 1, 3, 3, 7, 0, 0]), 7),
    ("a scale of 0 is an offer too", bytes([3, 3, 0, 0]), 0),
    ("more than 14 counts as 14 (RFC 7323, 2.3)", bytes([3, 3, 200, 0]), 14),
    ("behind the end of the list", bytes([0, 3, 3, 7]), -1),
    ("an option of length 0 ends the search", bytes([8, 0, 3, 3, 7, 0, 0, 0]), -1),
    ("an option of length 1 too", bytes([8, 1, 3, 3, 7, 0, 0, 0]), -1),
    ("an option that reaches past the header", bytes([8, 40, 3, 3]), -1),
    ("a scale of the wrong length", bytes([3, 4, 7, 0]), -1),
    ("a scale cut by the end of the header", bytes([1, 1, 3, 3]), -1),
]


@pytest.mark.parametrize(("options", "scale"), [pytest.param(o, s, id=t) for t, o, s in SCALES])
@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_window_scale(options: bytes, scale: int, v6: bool) -> None:
    wrap = ipv6 if v6 else ipv4
    assert parse(wrap(tcp(options=options)), want_scale=True) == expected(v6, window_scale=scale)
    assert parse(wrap(tcp(options=options))) == expected(v6)


def test_window_scale_is_only_looked_for_in_a_syn() -> None:
    data = ipv4(tcp(ACK, options=bytes([3, 3, 7, 0])))
    assert parse(data, want_scale=True) == expected(flags=ACK)


def test_window_scale_of_a_syn_cut_anywhere() -> None:
    for end in range(len(LINUX_SYN) + 1):
        found = parse(LINUX_SYN[:end], want_scale=True)
        if isinstance(found, Packet):
            assert found.window_scale == (7 if end == len(LINUX_SYN) else -1)


SANE = [
    SYN, SYN | URG, SYN | ACK, SYN | ECE | CWR, SYN | ACK | ECE, ACK, PSH | ACK, URG | ACK,
    FIN | ACK, FIN | PSH | ACK, FIN | PSH | URG | ACK, RST, RST | ACK, RST | PSH | ACK,
]  # fmt: skip
IMPOSSIBLE = [
    0, PSH, URG, FIN, FIN | PSH | URG, SYN | FIN, SYN | RST, SYN | FIN | ACK, SYN | RST | ACK,
    FIN | RST, FIN | RST | ACK, SYN | ACK | URG, RST | URG, 0x3F, 0xFF, ECE | CWR,
]  # fmt: skip


@pytest.mark.parametrize("flags", SANE)
def test_sane_flags(flags: int) -> None:
    assert not BAD_FLAGS[flags]


@pytest.mark.parametrize("flags", IMPOSSIBLE)
def test_impossible_flags(flags: int) -> None:
    assert BAD_FLAGS[flags]


def test_turned_twice_is_the_same() -> None:
    packet = expected(state=5)
    assert packet.turned().turned() == packet
    assert packet.turned()[:4] == (packet[1], packet[0], packet[3], packet[2])


first_bytes = st.sampled_from([b"", b"\x45", b"\x46", b"\x4f", b"\x40", b"\x60", b"\x6f"])


def assert_parses_or_refuses(data: bytes, want_scale: bool) -> None:
    found = parse(data, 0, want_scale)
    assert isinstance(found, Packet | Malformed)
    if isinstance(found, Packet):
        assert found.payload_length >= 0
        assert -1 <= found.window_scale <= 14


@given(first_bytes, st.binary(max_size=120), st.booleans())
@example(b"\x45", b"\xff" * 60, True)
def test_never_raises(first: bytes, rest: bytes, want_scale: bool) -> None:
    assert_parses_or_refuses(first + rest, want_scale)


@given(
    st.sampled_from([data for _, data, _ in READABLE]),
    st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_never_raises_on_a_packet_gone_wrong(
    data: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    bent = bytearray(data)
    for at, value in changes:
        bent[at % len(bent)] = value
    assert_parses_or_refuses(bytes(bent[:end]), True)


@pytest.mark.fuzz_long
@settings(max_examples=300_000)
@given(first_bytes, st.binary(max_size=400), st.booleans())
def test_never_raises_long(first: bytes, rest: bytes, want_scale: bool) -> None:
    assert_parses_or_refuses(first + rest, want_scale)


ports = st.integers(0, 65535)
numbers = st.integers(0, 0xFFFFFFFF)
tcp_options = st.lists(
    st.sampled_from(
        [("MSS", 1460), ("NOP", None), ("SAckOK", b""), ("WScale", 7), ("Timestamp", (5, 6))]
    ),
    max_size=4,
)
segments = st.fixed_dictionaries(
    {
        "sport": ports,
        "dport": ports,
        "seq": numbers,
        "ack": numbers,
        "flags": st.integers(0, 255),
        "window": ports,
        "options": tcp_options,
    }
)


def told_by_scapy(layer: TCP, source: str, destination: str, payload: bytes) -> Packet:
    return Packet(
        parse_address(source),
        parse_address(destination),
        layer.sport,
        layer.dport,
        layer.seq,
        layer.ack,
        int(layer.flags),
        layer.window,
        len(payload),
    )


@given(segments, st.ip_addresses(v=4), st.ip_addresses(v=4), st.integers(0, 10), st.binary())
def test_agrees_with_scapy_on_ipv4(
    fields: dict[str, object], source: object, destination: object, words: int, payload: bytes
) -> None:
    ip = IP(src=str(source), dst=str(destination), options=bytes([1] * 4 * words))
    built = bytes(ip / TCP(**fields) / payload)
    layer = TCP(**fields)
    assert parse(built) == told_by_scapy(layer, str(source), str(destination), payload)


extension_headers = st.lists(
    st.one_of(
        st.builds(
            lambda size: IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(size))]), st.integers(0, 40)
        ),
        st.builds(
            lambda size: IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(size))]), st.integers(0, 40)
        ),
        st.builds(lambda more: IPv6ExtHdrFragment(offset=0, m=more, id=9), st.integers(0, 1)),
    ),
    max_size=4,
)


@given(segments, st.ip_addresses(v=6), st.ip_addresses(v=6), extension_headers, st.binary())
def test_agrees_with_scapy_on_ipv6(
    fields: dict[str, object],
    source: object,
    destination: object,
    extensions: list[object],
    payload: bytes,
) -> None:
    built = IPv6(src=str(source), dst=str(destination))
    for header in extensions:
        built = built / header
    data = bytes(built / TCP(**fields) / payload)
    layer = TCP(**fields)
    assert parse(data) == told_by_scapy(layer, str(source), str(destination), payload)
