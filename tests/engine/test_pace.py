"""Which packets of a client count as small ones: requests do, what answers a download does not."""

from __future__ import annotations

import pytest

from rstguard.engine.pace import small_packets

STAMPED, BARE = 52, 40
"""Bytes of headers with and without time stamps."""
SEGMENT = 1500


@pytest.mark.parametrize("header", [STAMPED, BARE])
@pytest.mark.parametrize("every", [1, 2, 3, 20], ids="acknowledges each {}".format)
def test_a_download_shows_none(header: int, every: int) -> None:
    acks = 60_000 // every
    assert small_packets(acks, header * acks, SEGMENT * 60_000, v6=False) == 0
    assert small_packets(acks, (header + 20) * acks, (SEGMENT + 20) * 60_000, v6=True) == 0


def test_nor_does_one_that_now_and_then_names_what_it_lacks() -> None:
    """Selective acknowledgements, of one in ten segments, are longer than others."""
    acks, named = 27_000, 3000
    sent = STAMPED * acks + (STAMPED + 12) * named
    assert small_packets(acks + named, sent, SEGMENT * 60_000, v6=False) <= 60_000 // 30


@pytest.mark.parametrize("size", [1020, 1280, 1500, 9000, 65_000])
def test_an_upload_shows_none(size: int) -> None:
    assert small_packets(10_000, size * 10_000, STAMPED * 5000, v6=False) == 0


@pytest.mark.parametrize(
    ("request_", "answer", "least"),
    [(40, 100, 0.9), (100, 300, 0.8), (400, 1000, 0.4), (100, 15_000, 0.7), (300, 60_000, 0.9)],
)
def test_requests_count(request_: int, answer: int, least: float) -> None:
    """Each is one packet; an answer comes in segments, each second one of which is acknowledged."""
    segments = -(-answer // 1448)
    packets = 1000 * (1 + segments // 2)
    sent = 1000 * request_ + STAMPED * packets
    received = 1000 * (answer + STAMPED * segments)
    assert 1000 * least <= small_packets(packets, sent, received, v6=False) <= packets


def test_more_bare_packets_than_the_server_has_sent_for_count_as_well() -> None:
    """Else whoever adds enough of them to his requests would pass for a download."""
    assert small_packets(50_000, 50_000 * BARE, 100_000, v6=False) >= 45_000


def test_no_packet_is_shorter_than_its_headers() -> None:
    """What a reused entry had counted before is another's, and its bytes are left out already."""
    assert small_packets(10_000, 0, 0, v6=False) == 0
    assert small_packets(10_000, 4000, 0, v6=False) <= 100


@pytest.mark.parametrize("numbers", [(-5, 100, 100), (5, -100, 100), (5, 100, -100), (0, 0, 0)])
def test_counters_that_went_back_show_none(numbers: tuple[int, int, int]) -> None:
    assert small_packets(*numbers, v6=False) == 0
