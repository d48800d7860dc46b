"""Segments as they are sent: what `wire` reads again, with checksums that scapy finds right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from rstguard.engine.address import V6, parse_address
from rstguard.engine.flow import Tuple
from rstguard.engine.segment import answer, cookie_reminder, emit, probe, rst
from rstguard.engine.wire import ACK, FIN, PSH, RST, SYN, Packet, parse
from tests.support.packets import CLIENT, CLIENT6, SERVER, SERVER6, packet

ports = st.integers(0, 0xFFFF)
numbers = st.integers(0, 0xFFFFFFFF)
pairs = st.one_of(
    st.tuples(numbers, numbers),
    st.tuples(*[st.integers(0, (1 << 128) - 1).map(lambda address: address | V6)] * 2),
)
packets = st.builds(
    lambda ends, source_port, port, sequence, acknowledgement, flags, window, length: Packet(
        ends[0], ends[1], source_port, port, sequence, acknowledgement, flags, window, length
    ),
    pairs,
    ports,
    ports,
    numbers,
    numbers,
    st.integers(0, 255),
    ports,
    st.integers(0, 3),
)


@given(packets)
def test_what_is_emitted_is_read_again(sent: Packet) -> None:
    assert parse(emit(sent)) == sent


@given(packets)
def test_checksums_are_right(sent: Packet) -> None:
    data = emit(sent)
    layer = IPv6 if data[0] >> 4 == 6 else IP
    again = layer(data)
    given_sums = [again[TCP].chksum] + ([again.chksum] if layer is IP else [])
    del again[TCP].chksum
    if layer is IP:
        del again.chksum
    told = layer(bytes(again))
    wanted = [told[TCP].chksum] + ([told.chksum] if layer is IP else [])
    # Zero has two forms in one's complement arithmetic.
    assert [s % 0xFFFF for s in given_sums] == [s % 0xFFFF for s in wanted]


def test_families_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="famil"):
        emit(packet()._replace(destination=parse_address(SERVER6)))


@pytest.mark.parametrize("field", ["source_port", "sequence", "flags", "window"])
@pytest.mark.parametrize("value", [-1, 1 << 40])
def test_a_field_out_of_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match="range"):
        emit(packet()._replace(**{field: value}))


PATHS = [
    Tuple(parse_address(CLIENT), parse_address(SERVER), 40000, 80),
    Tuple(parse_address(CLIENT6), parse_address(SERVER6), 40000, 80),
]


@pytest.mark.parametrize("path", PATHS, ids=["IPv4", "IPv6"])
def test_a_probe_is_an_ack_with_one_byte(path: Tuple) -> None:
    seen = parse(probe(path, 5, 6))
    assert isinstance(seen, Packet)
    assert seen[:4] == path
    assert (seen.flags, seen.sequence, seen.acknowledgement, seen.payload_length) == (ACK, 5, 6, 1)


@pytest.mark.parametrize("path", PATHS, ids=["IPv4", "IPv6"])
def test_a_rst_carries_the_number_it_is_given(path: Tuple) -> None:
    seen = parse(rst(path, 0xFFFFFFFF))
    assert isinstance(seen, Packet)
    assert (seen[:4], seen.flags, seen.sequence) == (path, RST, 0xFFFFFFFF)


# RFC 9293, 3.10.7.1: flags, number, acknowledgement and payload length in; flags, number and
# acknowledgement of the answer out.
ANSWERS = [
    ("a SYN is acknowledged", (SYN, 100, 0, 0), (RST | ACK, 0, 101)),
    ("with the data it brings", (SYN, 100, 0, 50), (RST | ACK, 0, 151)),
    ("a number that wraps around", (SYN, 0xFFFFFFFF, 0, 0), (RST | ACK, 0, 0)),
    ("a SYN-ACK says itself what to send", (SYN | ACK, 100, 7, 0), (RST, 7, 0)),
    ("an ACK too", (ACK, 100, 7, 0), (RST, 7, 0)),
    ("data too", (PSH | ACK, 100, 7, 500), (RST, 7, 0)),
    ("a FIN without ACK occupies one number", (FIN, 100, 0, 0), (RST | ACK, 0, 101)),
    ("no flag at all occupies none", (0, 100, 0, 0), (RST | ACK, 0, 100)),
]


@pytest.mark.parametrize(("text", "segment", "wanted"), ANSWERS, ids=[row[0] for row in ANSWERS])
def test_answer(text: str, segment: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    flags, sequence, acknowledgement, length = segment
    offending = packet(flags, acknowledgement=acknowledgement)
    offending = offending._replace(sequence=sequence, payload_length=length)
    data = answer(offending)
    assert data is not None
    seen = parse(data)
    assert isinstance(seen, Packet)
    assert seen[:4] == offending.turned()[:4]
    assert (seen.flags, seen.sequence, seen.acknowledgement) == wanted, text


@pytest.mark.parametrize("flags", [RST, RST | ACK, RST | SYN])
def test_a_rst_is_never_answered(flags: int) -> None:
    assert answer(packet(flags)) is None


@pytest.mark.parametrize(
    ("flags", "sequence", "acknowledgement"), [(ACK, 99, 501), (SYN, 98, 500)], ids=["ACK", "SYN"]
)
def test_a_client_is_reminded_by_what_it_has_acknowledged_already(
    flags: int, sequence: int, acknowledgement: int
) -> None:
    """Its first number is 99, and the cookie 500; a SYN of SYNPROXY's bears one less of either."""
    asking = packet(flags, acknowledgement=acknowledgement)._replace(sequence=sequence)
    seen = parse(cookie_reminder(asking))
    assert isinstance(seen, Packet)
    assert seen[:4] == asking.turned()[:4]
    assert (seen.flags, seen.sequence, seen.acknowledgement) == (ACK, 500, 100)
    assert not seen.payload_length
