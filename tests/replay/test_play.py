"""What a policy does to a capture: each measure, in the capture's time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rstguard.engine.address import parse_prefix
from rstguard.engine.engine import Engine
from rstguard.engine.large import LEAST
from rstguard.engine.ruleset import FORGEABLE, SECOND, Escalate, Measure, Per, Rule, Scope, Unless
from rstguard.engine.shares import Shares
from rstguard.engine.verdict import Action, Ban, Shun
from rstguard.engine.wire import ACK, FIN, KNOWN, PROVEN, PSH, RST, SYN, URG, Packet, parse
from rstguard.replay.play import BASE, Replay
from tests.replay.captures import HERS, ITS, NEXT, START, SYN_ACK, Traffic, hits, played
from tests.support.packets import CLIENT, CLIENT6, SERVER, ipv4, ruleset, tcp
from tests.support.packets import rule as rule_of

BOTH = pytest.mark.parametrize("source", [CLIENT, CLIENT6], ids=["IPv4", "IPv6"])
OTHER = "198.51.100.8"


def rule(measure: Measure, action: Action = Action.BAN, limit: int = 3, **more: Any) -> Rule:
    return rule_of(measure, action, limit, **{"name": "it", "ipv6_length": 128, **more})


def policy(*rules: Rule, **more: Any) -> Any:
    return replace(ruleset(*rules), source_ipv6=128, **more)


def of(replay: Replay, kind: str) -> Any:
    (hit,) = (hit for hit in replay.hits if hit.kind == kind)
    return hit


def syns(traffic: Traffic, source: str, count: int = 20) -> None:
    for number in range(count):
        traffic.syn(10 + number / 100, source, source_port=2000 + number)


def handshakes(traffic: Traffic, source: str) -> None:
    for number in range(20):
        traffic.open(10 + number / 100, source, source_port=2000 + number)


def scan(traffic: Traffic, source: str) -> None:
    for number in range(20):
        traffic.syn(10 + number / 100, source, port=2000 + number)


def hosts(traffic: Traffic, source: str) -> None:
    for number in range(20):
        target = f"2001:db8:2::{number + 1}" if ":" in source else f"203.0.113.{number + 1}"
        traffic.syn(10 + number / 100, source, target=target)


def nonsense(traffic: Traffic, source: str) -> None:
    for number in range(20):
        traffic.client(10 + number / 100, SYN | FIN, source)


def strays(traffic: Traffic, source: str) -> None:
    traffic.client(7, ACK, source, source_port=1999)  # what follows at once could be forgotten
    for number in range(40):
        traffic.client(10 + number / 100, ACK, source, source_port=2000 + number)


def resets(traffic: Traffic, source: str) -> None:
    for number in range(20):
        traffic.open(10 + number / 100, source, source_port=2000 + number)
        traffic.reset(10.005 + number / 100, source, source_port=2000 + number)


def visits(traffic: Traffic, source: str) -> None:
    for number in range(20):
        traffic.visit(10 + number / 100, source, source_port=2000 + number)


def stalls(traffic: Traffic, source: str) -> None:
    traffic.open(10, source)
    traffic.answer(10.1, b"hello", source)
    for number in range(20):
        traffic.client(11 + number / 5, ACK, source, window=0, **NEXT)


STALLED: dict[str, Any] = {"limit": SECOND, "window": 16}
SHORT: dict[str, Any] = {"shorter_than": SECOND}

PACKET_MEASURES: dict[Measure, tuple[Callable[[Traffic, str], None], dict[str, Any]]] = {
    Measure.SYN_RATE: (syns, {}),
    Measure.CONNECTION_RATE: (handshakes, {}),
    Measure.HALF_OPEN: (syns, {}),
    Measure.DISTINCT_PORTS: (scan, {}),
    Measure.DISTINCT_HOSTS: (hosts, {}),
    Measure.BAD_FLAGS: (nonsense, {}),
    Measure.OUT_OF_STATE: (strays, {}),
    Measure.RESET_RATE: (resets, {}),
    Measure.SHORT_CONNECTIONS: (visits, SHORT),
    Measure.STALLED: (stalls, STALLED),
}


@BOTH
@pytest.mark.parametrize("measure", PACKET_MEASURES)
def test_each_packet_measure_bans_by_what_cannot_be_forged(measure: Measure, source: str) -> None:
    attack, more = PACKET_MEASURES[measure]
    traffic = Traffic()
    traffic.visit(1, source)
    traffic.visit(1, OTHER)
    attack(traffic, source)
    replay = played(traffic, policy=policy(rule(measure, **more)))
    kind = "shun" if measure in FORGEABLE - {Measure.RESET_RATE} else "ban"
    assert hits(replay) == {(kind, source, "it")}
    hit = of(replay, kind)
    assert hit.reason.name == measure.name
    assert hit.productive >= 1
    assert 9 <= (hit.first - BASE) / SECOND < 12
    assert hit.seconds == (600 if kind == "ban" else 10)


@BOTH
@pytest.mark.parametrize(
    "measure", [Measure.SYN_RATE, Measure.HALF_OPEN, Measure.BAD_FLAGS, Measure.OUT_OF_STATE]
)
def test_who_has_proved_nothing_is_shunned_and_never_banned(measure: Measure, source: str) -> None:
    attack, more = PACKET_MEASURES[measure]
    traffic = Traffic()
    attack(traffic, source)
    assert hits(played(traffic, policy=policy(rule(measure, **more)))) == {("shun", source, "it")}


def test_a_forged_flood_bans_nobody() -> None:
    traffic = Traffic()
    for number in range(3000):
        source = f"10.{number % 7}.{number % 11}.{number % 13}"
        traffic.syn(10 + number / 1000, source, source_port=2000 + number)
        # Half of them are answered, and the forger guesses an ACK: the wrong one.
        if number % 2:
            traffic.server(10.0001 + number / 1000, SYN | ACK, source, **SYN_ACK)
            wrong: dict[str, Any] = NEXT | {"acknowledgement": ITS + 77_777}
            traffic.client(10.0002 + number / 1000, ACK, source, **wrong)
    replay = played(traffic, rule(Measure.SYN_RATE), rule(Measure.HALF_OPEN, name="other"))
    assert {kind for kind, _, _ in hits(replay)} <= {"shun"}


def test_a_wrong_number_takes_the_worth_of_handshakes_for_ten_minutes() -> None:
    for minutes, kind in ((9, "shun"), (11, "ban")):
        traffic = Traffic()
        traffic.syn(10 - minutes * 60, source_port=1999)
        traffic.server(10.001 - minutes * 60, SYN | ACK, source_port=1999, **SYN_ACK)
        numbers: dict[str, Any] = NEXT | {"acknowledgement": ITS + 2}
        traffic.client(10.002 - minutes * 60, ACK, source_port=1999, **numbers)
        handshakes(traffic, CLIENT)
        assert hits(played(traffic, rule(Measure.CONNECTION_RATE))) == {(kind, CLIENT, "it")}


def test_data_of_the_server_proves_a_suspects_connections() -> None:
    for answered, kind in ((False, "shun"), (True, "ban")):
        traffic = Traffic()
        strays(traffic, CLIENT)
        for number in range(5):
            traffic.open(12 + number, source_port=number + 1)
            if answered:
                traffic.answer(12.5 + number, b".", source_port=number + 1)
        traffic.visit(30, OTHER)
        replay = played(traffic, rule(Measure.CONNECTIONS))
        assert (kind, CLIENT, "it") in hits(replay)
        assert all(one[0] != "ban" for one in hits(replay)) == (not answered)


def test_what_a_ban_keeps_away_is_counted_and_not_judged() -> None:
    traffic = Traffic()
    traffic.open(1, source_port=1000)
    handshakes(traffic, CLIENT)
    traffic.say(20, b"hello", source_port=1000)
    traffic.visit(21, source_port=1001)
    traffic.visit(22, OTHER)
    replay = played(traffic, rule(Measure.CONNECTION_RATE))
    hit = of(replay, "ban")
    # The ACK that was too many and 16 handshakes, one word of the connection that ended, and the
    # five segments of a later visit; four handshakes before had become connections.
    assert (hit.packets, hit.connections) == (1 + 16 * 2 + 1 + 5, 16 + 4 + 1 + 1)
    assert (replay.hits.totals["it"].packets, replay.hits.totals["it"].connections) == (39, 22)
    assert replay.counts.judged == 1 + 4 + 1


def test_existing_connections_stay_if_the_rule_says_so() -> None:
    traffic = Traffic()
    traffic.open(1, source_port=1000)
    handshakes(traffic, CLIENT)
    traffic.say(20, b"hello", source_port=1000)
    replay = played(traffic, rule(Measure.CONNECTION_RATE, keep_existing=True))
    assert of(replay, "ban").packets == 1 + 16 * 2


def test_a_ban_ends_and_the_next_is_longer() -> None:
    traffic = Traffic()
    for at in (0, 5, 65, 140):
        traffic.visit(at - 9, source_port=1000 + at)
        for number in range(20):
            traffic.open(at + number / 100, source_port=2000 + number)
    more = Escalate(2, 3600 * SECOND, 3600 * SECOND)
    replay = played(traffic, rule(Measure.CONNECTION_RATE, duration=60 * SECOND, escalate=more))
    hit = of(replay, "ban")
    assert hit.times == 2
    assert hit.seconds == 120


def test_a_shun_is_renewed_and_keeps_only_syns_away() -> None:
    traffic = Traffic()
    traffic.open(0, OTHER, source_port=1000)
    for number in range(3000):
        traffic.syn(number / 100, source_port=2000 + number)
    replay = played(traffic, rule(Measure.SYN_RATE))
    hit = of(replay, "shun")
    assert hit.times == 3
    assert hit.packets > 2900


def test_a_half_open_connection_of_a_shunned_source_ends() -> None:
    traffic = Traffic()
    traffic.syn(1, source_port=1000)
    traffic.server(1.1, SYN | ACK, source_port=1000, sequence=ITS, acknowledgement=HERS + 1)
    for number in range(20):
        traffic.syn(1.2 + number / 100, source_port=2000 + number)
    traffic.client(2, ACK, source_port=1000, **NEXT)
    replay = played(traffic, rule(Measure.SYN_RATE), rule(Measure.CONNECTION_RATE, name="no"))
    assert of(replay, "shun").connections == 18 + 1


def test_drop_and_reset_of_syns_and_of_connections() -> None:
    traffic = Traffic()
    visits(traffic, CLIENT)
    replay = played(traffic, rule(Measure.SYN_RATE, Action.DROP))
    assert hits(replay) == {("drop", CLIENT, "it")}
    assert of(replay, "drop").connections == 17
    replay = played(traffic, rule(Measure.SYN_RATE, Action.RESET))
    assert hits(replay) == {("refuse", CLIENT, "it")}
    replay = played(traffic, rule(Measure.CONNECTION_RATE, Action.RESET))
    found = hits(replay)
    assert len(found) == 17
    assert ("reset", f"{CLIENT}:2003 > {SERVER}:80", "it") in found
    # The ACK itself, and of each connection the client's word, FIN and last ACK.
    assert all((hit.packets, hit.connections) == (4, 1) for hit in replay.hits)


def test_a_repeated_syn_that_is_dropped_does_not_undo_the_first() -> None:
    traffic = Traffic()
    for number in range(4):
        traffic.syn(1 + number / 100)
    traffic.server(1.1, SYN | ACK, **SYN_ACK)
    traffic.client(1.2, ACK, **NEXT)
    replay = played(
        traffic, rule(Measure.SYN_RATE, Action.DROP), rule(Measure.BYTE_RATE, limit=10**9, name="b")
    )
    assert of(replay, "drop").packets == 1
    assert of(replay, "drop").connections == 0


def test_sweep_finds_idle_and_slow_connections_at_its_times() -> None:
    traffic = Traffic()
    traffic.open(0, source_port=1)
    traffic.open(0, source_port=2)
    for second in range(60):
        traffic.say(second + 0.5, b"hello", source_port=2)
        traffic.visit(second + 0.7, OTHER, source_port=1000 + second)
    idle = rule(Measure.IDLE, Action.RESET, 15 * SECOND)
    slow = rule(Measure.SLOW, Action.RESET, 100, after=31 * SECOND, name="slow", of="client")
    replay = played(traffic, idle, slow)
    found = {(hit.rule, hit.subject.source_port): hit for hit in replay.hits}  # type: ignore[union-attr]
    assert set(found) == {("it", 1), ("slow", 2)}
    assert (found["it", 1].first - BASE) / SECOND == 18  # seen silent at 2 s, 16 s before
    assert (found["slow", 2].first - BASE) / SECOND == 32
    assert found["slow", 2].packets == 28
    assert all(hit.connections == 1 for hit in found.values())


def test_sweep_counts_connections_and_bytes_and_age() -> None:
    traffic = Traffic()
    for number in range(10):
        traffic.open(number, source_port=number + 1)
    traffic.visit(20, OTHER)
    limit = rule(Measure.CONNECTIONS, Action.RESET)
    replay = played(traffic, limit)
    assert {hit.subject.source_port for hit in replay.hits} == set(range(4, 11))  # type: ignore[union-attr]
    replay = played(traffic, rule(Measure.CONNECTIONS, limit=5))
    assert hits(replay) == {("ban", CLIENT, "it")}
    replay = played(traffic, rule(Measure.AGE, Action.RESET, 15 * SECOND))
    assert {hit.subject.source_port for hit in replay.hits} == {1, 2, 3, 4, 5, 6}  # type: ignore[union-attr]
    # Before four of them are there, bare handshakes ban nobody.
    replay = played(traffic, rule(Measure.BYTE_RATE, limit=20, burst=20))
    assert {kind for kind, _, _ in hits(replay)} == {"shun", "reset"}


def test_a_long_pause_is_swept_without_taking_forever() -> None:
    traffic = Traffic()
    traffic.open(0)
    traffic.visit(4 * 86400, OTHER)
    replay = played(traffic, rule(Measure.IDLE, Action.RESET, 2 * 86400 * SECOND))
    assert {kind for kind, _, _ in hits(replay)} == {"reset"}
    assert replay.counts.sweeps < 2000


def test_an_observing_policy_takes_no_effect() -> None:
    traffic = Traffic()
    traffic.visit(1)
    handshakes(traffic, CLIENT)
    traffic.visit(20, source_port=5)
    replay = played(traffic, policy=policy(rule(Measure.CONNECTION_RATE), enforce=False))
    assert hits(replay) == {("ban", CLIENT, "it")}
    assert (of(replay, "ban").packets, of(replay, "ban").connections) == (0, 0)
    replay = played(traffic, rule(Measure.CONNECTION_RATE, Action.OBSERVE))
    assert hits(replay) == {("observe", CLIENT, "it")}


def test_trusted_sources_and_other_targets_are_let_alone() -> None:
    traffic = Traffic()
    traffic.visit(1)
    syns(traffic, CLIENT)
    strays(traffic, CLIENT)
    visits(traffic, CLIENT)
    rules = (rule(Measure.SYN_RATE), rule(Measure.OUT_OF_STATE, name="b"), rule(Measure.AGE))
    trusting = ruleset(*rules, trusted=("198.51.100.0/24",))
    replay = played(traffic, policy=trusting)
    assert not hits(replay)
    assert not replay.counts.judged
    elsewhere = replace(ruleset(*rules), scope=Scope(("eth0",), (), frozenset({443}), ()))
    assert not hits(played(traffic, policy=elsewhere))


def test_rules_for_some_ports_see_only_those() -> None:
    traffic = Traffic()
    visits(traffic, CLIENT)
    for ports, found in ((frozenset({22}), 0), (frozenset({80}), 1)):
        replay = played(traffic, rule(Measure.SHORT_CONNECTIONS, ports=ports, **SHORT))
        assert len(replay.hits) == found


def test_connections_older_than_the_capture_are_no_strays() -> None:
    traffic = Traffic()
    for number in range(200):
        port = 1000 + number
        numbers: dict[str, Any] = {"sequence": 5, "acknowledgement": 5}
        traffic.client(number / 100, ACK | PSH, source_port=port, payload=b"hello", **numbers)
        traffic.server(number / 100 + 0.001, ACK, source_port=port, **numbers)
        traffic.client(number / 100 + 0.002, ACK, source_port=port, **numbers)
    replay = played(
        traffic, rule(Measure.OUT_OF_STATE), rule(Measure.CONNECTION_RATE, name="other")
    )
    assert not hits(replay)
    assert replay.counts.older == 200
    # But who is answered with a RST has none.
    traffic = Traffic()
    for number in range(200):
        traffic.client(number / 50, ACK, source_port=1000 + number)
        traffic.server(number / 50 + 0.001, RST | ACK, source_port=1000 + number)
    assert hits(played(traffic, rule(Measure.OUT_OF_STATE))) == {("shun", CLIENT, "it")}


def test_a_reset_by_the_server_counts_against_its_client() -> None:
    traffic = Traffic()
    for number in range(20):
        traffic.open(1 + number / 100, source_port=2000 + number)
        port = 2000 + number
        traffic.server(1.005 + number / 100, RST, source_port=port, sequence=ITS + 1)
    replay = played(traffic, rule(Measure.SHORT_CONNECTIONS, **SHORT))
    assert hits(replay) == {("ban", CLIENT, "it")}


def test_impossible_flags_and_fragments_are_no_acks() -> None:
    traffic = Traffic()
    traffic.open(1)
    for number in range(10):
        traffic.client(2 + number / 100, URG)
    replay = played(traffic, rule(Measure.BAD_FLAGS))
    assert hits(replay) == {("shun", CLIENT, "it")}


def test_later_fragments_are_passed_over() -> None:
    traffic = Traffic()
    for number in range(40):
        segment = tcp(ACK, source_port=1000 + number, destination_port=80)
        traffic.add(1 + number / 100, ipv4(segment, fragment=0x2001))
    replay = played(traffic, rule(Measure.OUT_OF_STATE))
    assert not replay.counts.judged


def test_a_name_may_be_used_again_after_a_reset() -> None:
    traffic = Traffic()
    traffic.open(0)
    traffic.visit(5, OTHER)
    traffic.open(10)
    traffic.visit(20, OTHER, source_port=5)
    replay = played(traffic, rule(Measure.AGE, Action.RESET, 3 * SECOND))
    assert of(replay, "reset").times == 2


def test_memory_is_bounded_and_nobody_is_blamed_for_it() -> None:
    traffic = Traffic()
    for number in range(4000):
        traffic.open(number / 1000, f"10.0.{number // 250}.{number % 250}")
    replay = Replay(ruleset(rule(Measure.SYN_RATE), rule(Measure.IDLE, limit=10**18)), most=100)
    replay.feed(traffic.in_order)
    assert len(replay._table) <= 200
    assert sum(map(len, replay._effects.held.values())) <= 100
    assert not hits(replay)


def test_a_time_that_goes_back_is_held() -> None:
    traffic = Traffic()
    traffic.visit(10)
    traffic.syn(5, OTHER)
    replay = Replay(ruleset(rule(Measure.SYN_RATE)))
    replay.feed(traffic.packets)
    assert replay.counts.unordered == 1
    assert (replay.start, replay.now) == (START + 10 * SECOND, BASE + round(0.022 * SECOND))


def test_a_count_per_service_is_dropped_without_blame() -> None:
    traffic = Traffic()
    for number in range(20):
        traffic.syn(1 + number / 100, f"10.0.0.{number}")
    replay = played(traffic, rule(Measure.SYN_RATE, Action.DROP, per=Per.SERVICE))
    assert len(replay.hits) == 17
    assert replay.hits.totals["it"].times == {"drop": 17}


def test_a_replay_is_the_same_each_time() -> None:
    def once() -> list[Any]:
        traffic = Traffic()
        for attack in (visits, syns, strays, scan):
            attack(traffic, CLIENT)
            attack(traffic, OTHER)
        return [
            (hit.key, hit.first, hit.packets)
            for hit in played(
                traffic, rule(Measure.SYN_RATE), rule(Measure.OUT_OF_STATE, name="b")
            ).hits
        ]

    assert once() == once()


@pytest.mark.parametrize("measure", [Measure.SYN_RATE, Measure.CONNECTIONS])
@pytest.mark.parametrize("said", [500, 0])
def test_a_productive_source_may_go_further(measure: Measure, said: int) -> None:
    """What it is known by are connections that are over, as in the kernel's table."""
    lenient = replace(rule(measure, Action.RESET, limit=10), unless=Unless(50, 4), burst=10)
    traffic = Traffic()
    for number in range(40):
        more: dict[str, Any] = {"source_port": 2000 + number}
        traffic.open(1 + number / 4, **more)
        if said:
            traffic.say(1.01 + number / 4, bytes(said), **more)
            traffic.answer(1.015 + number / 4, bytes(said), **more)
        traffic.close(1.02 + number / 4, said=said, **more)
    for number in range(30):
        traffic.open(20 + number / 100, source_port=3000 + number)
    traffic.syn(30, OTHER)
    kinds = {hit.kind for hit in played(traffic, lenient).hits}
    hit = "refuse" if measure is Measure.SYN_RATE else "reset"
    assert kinds == (set() if said else {hit})


def test_a_replay_agrees_with_the_engine_that_is_fed_directly() -> None:
    """The same packets with what the kernel would know of them, and what the engine orders."""
    rules = (
        rule(Measure.SYN_RATE, limit=8, burst=8),
        rule(Measure.HALF_OPEN, limit=6, name="half-open"),
        rule(Measure.CONNECTION_RATE, limit=12, burst=12, name="rate"),
        rule(Measure.SHORT_CONNECTIONS, limit=9, burst=9, name="short", **SHORT),
    )
    observing = policy(*rules, enforce=False)
    traffic = Traffic()
    for number, source in itertools.product(range(30), (CLIENT, OTHER, CLIENT6)):
        every = {CLIENT: 0.05, OTHER: 0.06, CLIENT6: 0.07}[source]
        traffic.visit(1 + number * every, source, source_port=2000 + number)
    for number in range(20):
        traffic.syn(2 + number / 50, "10.0.0.1", source_port=number + 1)
    engine, told = Engine(observing), []
    proven: set[int] = set()
    answered: set[tuple[int, int]] = set()
    for time, data in traffic.in_order:
        packet = parse(data)
        assert isinstance(packet, Packet)
        now = time - traffic.in_order[0][0] + BASE
        name = packet.source, packet.source_port
        if packet.source_port == 80:
            continue
        if packet.flags == SYN:
            state = PROVEN if packet.source in proven else 0
        elif packet.flags & FIN or name not in answered:
            state = KNOWN | PROVEN
        else:
            continue
        if packet.flags == ACK:
            answered.add(name)
            proven.add(packet.source)
        decision = engine.decide(packet._replace(state=state), now)
        for effect in decision.effects:
            assert isinstance(effect, Ban | Shun)
            kind = "ban" if isinstance(effect, Ban) else "shun"
            told.append((kind, str(effect.source), effect.rule, now))
    replay = Replay(observing)
    found: list[tuple[str, str, str, int]] = []
    replay.hits.tell = lambda hit, now: found.append((hit.kind, str(hit.subject), hit.rule, now))
    replay.feed(traffic.in_order)
    assert {kind for kind, *_ in told} == {"ban", "shun"}
    assert len(told) >= 4
    assert [one for one in found if one[0] in ("ban", "shun")] == told


def busy(traffic: Traffic, source: str, at: float, first: int, count: int) -> None:
    """Open connections that both ends talk on, and that stay."""
    for number in range(count):
        begins, port = at + number, first + number
        traffic.open(begins, source, source_port=port)
        traffic.say(begins + 0.1, b"hello", source, source_port=port)
        traffic.answer(begins + 0.2, b"hello", source, source_port=port)


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_large_source_has_the_same_room_where_only_packets_are_counted(ordinary: bool) -> None:
    """The guard sweeps for its sake, though no rule is judged by sweeps."""
    traffic = Traffic()
    busy(traffic, CLIENT, 0, 1000, LEAST)
    busy(traffic, OTHER, 100, 1000, LEAST)
    for number in range(30):
        traffic.syn(200 + number / 1000, CLIENT, source_port=5000 + number)
        traffic.syn(200 + number / 1000, "192.0.2.77", source_port=5000 + number)
    many = rule(Measure.SYN_RATE, Action.DROP, 10, burst=10, period=SECOND)
    said = (parse_prefix(CLIENT),) if ordinary else ()
    replay = played(traffic, policy=policy(many, shares=Shares(25, 20 * SECOND, said)))
    dropped = {str(hit.subject): hit.times for hit in replay.hits}
    assert dropped.pop("192.0.2.77") == 20
    assert dropped == ({CLIENT: 20} if ordinary else {})
