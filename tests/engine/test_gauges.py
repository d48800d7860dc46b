"""Gauges keep the most that each source has shown, in tables that end; sums of them are small."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.gauges import LARGEST_COUNT, Gauge, Gauges
from rstguard.engine.ruleset import SECOND, Measure, Per
from rstguard.engine.shown import Breadth, sum_up
from rstguard.engine.wire import ACK, FIN, KNOWN, PROVEN, SYN, Packet
from tests.support.packets import CLIENT, CLIENT6, packet, rule, ruleset

SOURCES = 256
PACKET_MEASURES = (
    Measure.SYN_RATE,
    Measure.CONNECTION_RATE,
    Measure.HALF_OPEN,
    Measure.DISTINCT_PORTS,
    Measure.DISTINCT_HOSTS,
    Measure.SHORT_CONNECTIONS,
)
SYN_COOKIE, FIRST_ACK = KNOWN, KNOWN | PROVEN


def gauges(*measures: Measure, sources: int = SOURCES) -> Gauges:
    rules = (rule(measure, shorter_than=10 * SECOND) for measure in measures)
    return Gauges(ruleset(*rules), sources=sources)


def sizes(gauge: Gauge) -> int:
    """Return how many entries all tables of a gauge have, whatever they are called."""
    return sum(len(table) for table in vars(gauge).values() if hasattr(table, "__len__"))


def numbered(number: int, flags: int = SYN, state: int = 0) -> Packet:
    return replace_source(packet(flags, state=state, source_port=1024 + number % 50000), number)


def replace_source(one: Packet, number: int) -> Packet:
    return one._replace(source=0x0B000000 + number)


@pytest.mark.parametrize("measure", PACKET_MEASURES)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_however_many_sources_come_the_tables_end(measure: Measure, times: int) -> None:
    these = gauges(measure)
    (gauge,) = these.gauges
    for number in range(20 * SOURCES):
        for time in range(times):
            now = (number * times + time) * 1000
            these.decide(numbered(number), now)
            these.decide(numbered(number, ACK, FIRST_ACK), now)
            if measure is Measure.SHORT_CONNECTIONS:
                these.decide(numbered(number, FIN | ACK, FIRST_ACK), now)
    assert len(gauge.shown) <= SOURCES
    assert gauge.left_out >= 18 * SOURCES
    assert sizes(gauge) <= 4 * SOURCES + 2 * 2**15


def test_however_many_targets_a_source_tries_the_table_ends() -> None:
    these = gauges(Measure.DISTINCT_HOSTS, sources=16 * LARGEST_COUNT)
    (gauge,) = these.gauges
    for number in range(3 * LARGEST_COUNT):
        these.decide(packet()._replace(destination=number), 0)
    assert gauge.shown == {packet().source: LARGEST_COUNT}
    for source in range(40):
        for number in range(LARGEST_COUNT):
            these.decide(numbered(source)._replace(destination=number), 0)
    targets = gauge._targets
    held = [*targets._young.values(), *targets._old.values()]
    assert sum(map(len, held)) <= 16 * LARGEST_COUNT + LARGEST_COUNT


def test_who_has_shown_least_makes_room() -> None:
    these = gauges(Measure.SYN_RATE)
    (gauge,) = these.gauges
    for number in range(100):
        for _ in range(5):
            these.decide(numbered(number), 0)
    for number in range(1000, 20 * SOURCES):
        these.decide(numbered(number), 1)
    kept = [gauge.shown.get(0x0B000000 + number) for number in range(100)]
    assert kept == [5] * 100


def test_forged_sources_do_not_displace_a_window() -> None:
    these = gauges(Measure.SYN_RATE)
    (gauge,) = these.gauges
    for turn in range(7):
        these.decide(packet(), 0)
        for number in range(10 * SOURCES):
            these.decide(numbered(turn * 10 * SOURCES + number), 0)
        if not turn:
            these.decide(packet(), 0)  # once is forgotten, twice is remembered
            these.decide(packet(), 0)
    assert gauge.shown[packet().source] == 8


def test_a_rate_is_what_came_in_its_period() -> None:
    these = gauges(Measure.SYN_RATE)
    for number in range(100):
        these.decide(packet(), number * SECOND // 10)
    assert these.gauges[0].shown[packet().source] in range(10, 13)  # an eighth more, at most


def test_a_connection_counts_once_though_its_data_come_before_the_verdict() -> None:
    these = gauges(Measure.CONNECTION_RATE)
    for now in range(3):
        these.decide(packet(ACK, state=FIRST_ACK), now)
    assert these.gauges[0].shown == {packet().source: 1}


def test_a_syn_cookies_client_has_sent_a_syn_and_completed_a_handshake() -> None:
    these = gauges(Measure.SYN_RATE, Measure.CONNECTION_RATE)
    these.decide(packet(SYN, state=SYN_COOKIE), 0)
    assert [gauge.shown for gauge in these.gauges] == [{packet().source: 1}] * 2


def test_pending_handshakes_are_taken_back() -> None:
    these = gauges(Measure.HALF_OPEN)
    for port in range(1, 5):
        these.decide(packet(source_port=port), 0)
        these.decide(packet(ACK, source_port=port, state=FIRST_ACK), 0)
    assert these.gauges[0].shown == {packet().source: 1}
    for port in range(1, 5):
        these.decide(packet(source_port=port), 0)
    assert these.gauges[0].shown == {packet().source: 4}


def test_rules_that_stay_the_same_go_on() -> None:
    syn, ports = rule(Measure.SYN_RATE), rule(Measure.DISTINCT_PORTS)
    before = Gauges(ruleset(syn, ports))
    before.decide(packet(), 0)
    after = Gauges(ruleset(replace(syn, in_kernel=True), replace(ports, limit=99)), before)
    assert [gauge.shown for gauge in after.gauges] == [{packet().source: 1}, {}]


def flow(source: int, packets: int, size: int, age: int) -> Flow:
    name = Tuple(source, 1, 1000, 80)
    turned = Tuple(1, source, 80, 1000)
    state = TcpState.ESTABLISHED
    return Flow(1, name, turned, state, 0, True, packets, size, packets, 0, age, 99, 0)


def test_what_moved_before_anybody_looked_is_nobodys_rate() -> None:
    these = gauges(Measure.BYTE_RATE)
    these.judge([flow(1, 900, 10**9, 3600 * SECOND), flow(2, 9, 4000, SECOND)], 10**18)
    assert these.gauges[0].shown == {2: 2000}
    later = [flow(1, 901, 10**9 + 500, 3602 * SECOND), flow(3, 9, 4000, -1)]
    these.judge(later, 10**18 + 2 * SECOND)
    assert these.gauges[0].shown == {2: 2000, 1: 250}
    # The same ports again are another connection.
    these.judge([flow(1, 3, 600, SECOND)], 10**18 + 4 * SECOND)
    assert these.gauges[0].shown[1] == 300


def asking(source: int, port: int, asked: int, age: int) -> Flow:
    """Return a connection that has made so many requests of 60 bytes."""
    one = flow(source, asked, 112 * asked, age)
    return one._replace(original=one.original._replace(source_port=port))


def test_requests_show_by_source_or_by_connection() -> None:
    these = Gauges(
        ruleset(
            rule(Measure.PACKET_RATE, period=SECOND),
            rule(Measure.PACKET_RATE, period=SECOND, per=Per.CONNECTION, name="each"),
        )
    )
    these.judge([asking(1, port, 100, 9 * SECOND) for port in (1, 2)], 10**18)
    later = [asking(1, 1, 100 + 1000, 11 * SECOND), asking(1, 2, 100 + 400, 11 * SECOND)]
    these.judge(later, 10**18 + 2 * SECOND)
    by_source, by_connection = (gauge.shown[1] for gauge in these.gauges)
    assert 400 <= by_connection <= 500
    assert 550 <= by_source <= 700


def test_a_silence_shows_when_it_ends() -> None:
    these = gauges(Measure.IDLE)
    for second in range(0, 10, 2):
        these.judge([flow(1, 5, 100, second * SECOND)], 10**18 + second * SECOND)
    assert these.gauges[0].shown == {}
    these.judge([flow(1, 6, 100, 10 * SECOND)], 10**18 + 10 * SECOND)
    assert these.gauges[0].shown == {1: 10 * SECOND}


def test_a_sum_is_small_and_names_who_showed_most() -> None:
    one = rule(Measure.BYTE_RATE)
    shown = {number: number for number in range(1, 200_000)}
    told = sum_up(one, shown, range(1000))
    assert len(told.amounts) < 4000
    assert sum(good for _, good, _ in told.amounts) == 999
    assert sum(others for _, _, others in told.amounts) == 199_000
    assert told.amounts[:2] == ((1, 1, 0), (2, 1, 0))
    assert told.amounts[-1][0] == 200_000  # rounded up: no limit comes out below it
    assert [amount for _, amount in told.highest] == [199_999, 199_998, 199_997]
    least = sum_up(rule(Measure.SLOW), shown, range(1000))
    assert [amount for _, amount in least.highest] == [1, 2, 3]
    assert least.amounts[-1][0] == 199_000


@pytest.mark.parametrize("address", [CLIENT, CLIENT6])
def test_productive_sources_are_known_at_any_width(address: str) -> None:
    wide = rule(Measure.SYN_RATE, ipv4_length=24, ipv6_length=48)
    narrow = rule(Measure.HALF_OPEN, ipv4_length=32, ipv6_length=128)
    these = Gauges(ruleset(wide, narrow))
    source = packet(source=address).source
    these.decide(packet(source=address), 0)
    productive = [Breadth(ruleset(wide, narrow)).of(source)]
    for gauge in these.gauges:
        assert sum_up(gauge.rule, gauge.shown, productive).amounts == ((1, 1, 0),)
        assert sum_up(gauge.rule, gauge.shown, []).amounts == ((1, 0, 1),)
    neighbours = Breadth(ruleset(wide))
    assert (neighbours.of(source) == neighbours.of(source ^ 1)) is (":" in address)


def test_all_of_a_service_counts() -> None:
    service = rule(Measure.SYN_RATE, per=Per.SERVICE)
    these = Gauges(ruleset(service))
    these.decide(packet(), 0)
    told = sum_up(service, these.gauges[0].shown, [])
    assert told.amounts == ((1, 1, 0),)
    assert told.highest == (("203.0.113.10:80", 1),)
