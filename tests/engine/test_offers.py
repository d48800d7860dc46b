"""What a server offers: read from its SYN-ACKs, believed, and forgotten."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rstguard.engine.address import parse_address
from rstguard.engine.offers import (
    FORGET_AFTER,
    FORGET_SAMPLES,
    KEPT_FOR,
    Offer,
    Offers,
    read_offer,
)
from rstguard.engine.ruleset import SECOND
from rstguard.engine.segment import emit
from rstguard.engine.service import Service
from rstguard.engine.wire import ACK, RST, SYN, Packet, options

V4 = Service(parse_address("192.0.2.1"), 80)
V6 = Service(parse_address("2001:db8::1"), 443)
FULL = Offer(1460, 7, sack=True, timestamps=True)
POOR = Offer(1460, -1, sack=False, timestamps=False)

MSS = struct.pack(">BBH", 2, 4, 1460)
SACK = b"\x04\x02"
TIMESTAMPS = struct.pack(">BBII", 8, 10, 1, 2)
SCALE = b"\x03\x03\x07"
NOP = b"\x01"
LINUX = MSS + SACK + TIMESTAMPS + NOP + SCALE


def syn_ack(service: Service, tail: bytes, flags: int = SYN | ACK) -> bytes:
    client = parse_address("2001:db8::2" if service is V6 else "192.0.2.2")
    fields = (service.address, client, service.port, 4000, 1, 2, flags, 1000, 0)
    data = bytearray(emit(Packet(*fields)))
    start = 40 if service is V6 else 20
    data[start + 12] = (20 + len(tail)) // 4 << 4
    at, size = (4, len(data) - 40) if service is V6 else (2, len(data))
    data[at : at + 2] = (size + len(tail)).to_bytes(2, "big")
    return bytes(data) + tail


@pytest.mark.parametrize("service", [V4, V6], ids=str)
@pytest.mark.parametrize(
    ("tail", "offer"),
    [
        (LINUX, FULL),
        (MSS, POOR),
        (MSS + NOP + SCALE, Offer(1460, 7, sack=False, timestamps=False)),
        (MSS + SACK + NOP + NOP, Offer(1460, -1, sack=True, timestamps=False)),
        (MSS + b"\x00" + SCALE, POOR),
        (MSS + b"\x03\x03\xff\x01", Offer(1460, 14, sack=False, timestamps=False)),
        (MSS + b"\x03\x01\x07\x01", POOR),
        (MSS + b"\x08\x0a\x00\x00", POOR),
        (MSS + b"\x01\x01\x01\x03", POOR),
    ],
    ids=["linux", "mss", "scale", "sack", "after end", "large", "length 1", "cut off", "bare"],
)
def test_a_syn_ack_tells_what_is_offered(service: Service, tail: bytes, offer: Offer) -> None:
    assert read_offer(syn_ack(service, tail)) == (service, offer)


@pytest.mark.parametrize(("service", "mss"), [(V4, 536), (V6, 1220)], ids=["IPv4", "IPv6"])
def test_without_an_mss_the_standard_one_counts(service: Service, mss: int) -> None:
    read = read_offer(syn_ack(service, b""))
    assert read is not None
    assert read[1].mss == mss


@pytest.mark.parametrize(
    "data", [b"", b"\x45", syn_ack(V4, LINUX, SYN), syn_ack(V4, b"", SYN | ACK | RST)]
)
def test_nothing_else_is_an_offer(data: bytes) -> None:
    assert read_offer(data) is None


@given(st.binary(max_size=120) | st.binary(max_size=40).map(lambda tail: syn_ack(V4, tail)))
def test_reading_never_raises(data: bytes) -> None:
    read_offer(data)
    assert all(isinstance(value, bytes) for value in options(data).values())


def test_what_is_learned_first_is_new_and_then_known() -> None:
    offers = Offers()
    assert offers.learn(V4, FULL, 0)
    assert not offers.learn(V4, FULL, SECOND)
    assert offers.known == {V4: FULL}


def test_poor_answers_are_outweighed_for_a_minute() -> None:
    offers = Offers()
    offers.learn(V4, FULL, 0)
    for second in range(1, 60):
        assert not offers.learn(V4, POOR, second * SECOND)
    assert offers.known[V4] == FULL


def test_poor_answers_alone_are_believed_in_the_end() -> None:
    offers = Offers()
    offers.learn(V4, FULL, 0)
    late = FORGET_AFTER + SECOND
    changes = [offers.learn(V4, POOR, late + n) for n in range(FORGET_SAMPLES)]
    assert changes == [False] * (FORGET_SAMPLES - 1) + [True]
    assert offers.known[V4] == POOR


def test_one_full_answer_in_between_starts_the_count_anew() -> None:
    offers = Offers()
    offers.learn(V4, FULL, 0)
    for second in range(600):
        offers.learn(V4, FULL if second % 50 == 0 else POOR, second * SECOND)
        assert offers.known[V4] == FULL


def test_a_richer_answer_is_believed_at_once() -> None:
    offers = Offers()
    offers.learn(V4, POOR, 0)
    assert offers.learn(V4, FULL, 1)
    assert offers.known[V4] == FULL


def test_another_scale_is_believed_at_once_even_in_a_poorer_answer() -> None:
    offers = Offers()
    offers.learn(V4, FULL, 0)
    assert offers.learn(V4, Offer(1460, 9, sack=True, timestamps=False), 1)
    assert offers.known[V4] == FULL._replace(scale=9)


def test_a_smaller_mss_counts_only_after_a_minute_without_the_larger() -> None:
    offers = Offers()
    offers.learn(V4, FULL, 0)
    small = FULL._replace(mss=536)
    assert not offers.learn(V4, small, SECOND)
    assert offers.learn(V4, small, FORGET_AFTER + 1)
    assert offers.learn(V4, FULL, FORGET_AFTER + 2)
    assert offers.known[V4] == FULL


def test_the_service_unseen_for_long_makes_room() -> None:
    offers = Offers(most=2)
    other = Service(V4.address, 81)
    offers.learn(V4, FULL, 0)
    offers.learn(other, FULL, 1)
    offers.learn(V4, FULL, 2)
    assert not offers.learn(V6, FULL, KEPT_FOR)
    assert offers.learn(V6, FULL, KEPT_FOR + 1)
    assert list(offers.known) == [V4, V6]


def test_services_and_offers_read_well() -> None:
    assert [str(V4), str(V6)] == ["192.0.2.1:80", "[2001:db8::1]:443"]
    assert str(FULL) == "mss 1460, wscale 7, sack, timestamps"
    assert str(POOR) == "mss 1460"
