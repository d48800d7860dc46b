"""Each measure: a sentence, a rule, packets in at their times, and what becomes of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from rstguard.engine.address import parse_prefix
from rstguard.engine.engine import Engine
from rstguard.engine.onesided import OneSided
from rstguard.engine.ruleset import NEVER_BANS, SECOND, Measure, Per, Rule
from rstguard.engine.verdict import Action, Ban, Condemn, Decision, Reason, Shun, Verdict
from rstguard.engine.wire import (
    ACK,
    FIN,
    KNOWN,
    OUTBOUND,
    OVER,
    PROVEN,
    PSH,
    RST,
    STRAY,
    SYN,
    URG,
    Packet,
)
from tests.support.packets import MILLISECOND, packet, reply, rule, ruleset

PASS, TRUST, DROP, RESET, BAN, SHUN, BLOCKED = (
    "pass", "trust", "drop", "reset", "ban", "shun", "blocked",
)  # fmt: skip
XMAS = FIN | PSH | URG
ESTABLISHED = KNOWN | PROVEN


def outcome(decision: Decision) -> str:
    """Return what a decision amounts to in one word; "blocked" is a drop whose ban is ordered."""
    kinds = {type(effect) for effect in decision.effects}
    if Ban in kinds:
        return BAN
    if Shun in kinds:
        return SHUN
    if decision.verdict is Verdict.RESET:
        return RESET
    if decision.verdict is Verdict.DROP:
        return DROP
    return TRUST if decision.trust else PASS


class Case(NamedTuple):
    text: str
    rule: Rule
    events: list[tuple[int, Packet, str]]
    """Milliseconds since the start, a packet, what becomes of it."""


def first_ack(**more: object) -> Packet:
    return packet(ACK, state=ESTABLISHED, **more)  # type: ignore[arg-type]


def closing(flags: int = FIN | ACK, **more: object) -> Packet:
    return packet(flags, state=ESTABLISHED, **more)  # type: ignore[arg-type]


def small_window(window: int, acknowledgement: int) -> Packet:
    return packet(ACK, window=window, acknowledgement=acknowledgement)


RATE: list[Case] = [
    Case(
        "SYNs up to the burst pass, the next is one too many",
        rule(Measure.SYN_RATE),
        [(0, packet(), PASS)] * 3 + [(0, packet(), DROP)] * 2,
    ),
    Case(
        "a SYN a token later passes again",
        rule(Measure.SYN_RATE),
        [(0, packet(), PASS)] * 3 + [(333, packet(), DROP), (334, packet(), PASS)],
    ),
    Case(
        "ports do not matter to a source's SYN rate",
        rule(Measure.SYN_RATE),
        [(0, packet(port=p), PASS) for p in (22, 80, 443)] + [(0, packet(port=8080), DROP)],
    ),
    Case(
        "another source has a count of its own",
        rule(Measure.SYN_RATE),
        [(0, packet(), PASS)] * 3 + [(0, packet(source="198.51.100.8"), PASS)],
    ),
    Case(
        "a source of IPv6 is its /64",
        rule(Measure.SYN_RATE),
        [(0, packet(source=f"2001:db8::{n}"), PASS) for n in (1, 2, 3)]
        + [(0, packet(source="2001:db8::ffff"), DROP), (0, packet(source="2001:db8:0:1::1"), PASS)],
    ),
    Case(
        "an IPv6 source whose low bits are an IPv4 address is another source",
        rule(Measure.SYN_RATE, ipv6_length=128),
        [(0, packet(), PASS)] * 3 + [(0, packet(source="::c633:6407"), PASS), (0, packet(), DROP)],
    ),
    Case(
        "counted by prefix, neighbours share one count",
        rule(Measure.SYN_RATE, per=Per.PREFIX, ipv4_length=24, ipv6_length=48),
        [(0, packet(source=f"198.51.100.{n}"), PASS) for n in (1, 2, 3)]
        + [(0, packet(source="198.51.100.200"), DROP), (0, packet(source="198.51.101.1"), PASS)],
    ),
    Case(
        "counted by service, the sources share one count for each address and port",
        rule(Measure.SYN_RATE, per=Per.SERVICE),
        [(0, packet(source=f"198.51.{n}.1"), PASS) for n in (1, 2, 3)]
        + [
            (0, packet(source="192.0.2.1"), DROP),
            (0, packet(source="192.0.2.1", port=443), PASS),
            (0, packet(source="192.0.2.1", destination="203.0.113.11"), PASS),
        ],
    ),
    Case(
        "counted by destination, all that is sent to one network shares one count",
        rule(Measure.SYN_RATE, per=Per.DESTINATION, ipv4_length=24, ipv6_length=48),
        [(0, packet(source=f"198.51.{n}.1", destination=f"203.0.113.{n}"), PASS) for n in (1, 2, 3)]
        + [
            (0, packet(source="192.0.2.1", destination="203.0.113.77", port=443), DROP),
            (0, packet(source="192.0.2.1", destination="203.0.114.77"), PASS),
        ],
    ),
    Case(
        "a rule for some destinations does not count the others",
        rule(Measure.SYN_RATE, destinations=(parse_prefix("203.0.113.8/29"),)),
        [(0, packet(destination="203.0.113.3"), PASS)] * 9
        + [(0, packet(destination="203.0.113.9"), PASS)] * 3
        + [(0, packet(destination="203.0.113.9"), DROP)]
        + [(0, packet(destination="203.0.113.3"), PASS)],
    ),
    Case(
        "sources that a rule excepts are neither counted nor hit",
        rule(Measure.SYN_RATE, per=Per.SERVICE, excepted=(parse_prefix("198.51.100.0/24"),)),
        [(0, packet(source="198.51.100.9"), PASS)] * 9
        + [(0, packet(source="192.0.2.1"), PASS)] * 3
        + [(0, packet(source="192.0.2.1"), DROP), (0, packet(source="198.51.100.9"), PASS)],
    ),
    Case(
        "a rule for some ports does not count the others",
        rule(Measure.SYN_RATE, ports=frozenset({22})),
        [(0, packet(port=80), PASS)] * 9
        + [(0, packet(port=22), PASS)] * 3
        + [(0, packet(port=22), DROP), (0, packet(port=80), PASS)],
    ),
    Case(
        "ACKs, FINs and RSTs are no SYNs, and neither is a SYN-ACK",
        rule(Measure.SYN_RATE),
        [(0, packet(flags), PASS) for flags in (ACK, FIN | ACK, RST, SYN | ACK) * 3]
        + [(0, packet(), PASS)],
    ),
    Case(
        "an ECN-capable SYN is a SYN",
        rule(Measure.SYN_RATE),
        [(0, packet(SYN | 64 | 128), PASS)] * 3 + [(0, packet(SYN | 64 | 128), DROP)],
    ),
    Case(
        "only handshakes that the kernel accepted count as connections",
        rule(Measure.CONNECTION_RATE),
        [(0, packet(), PASS)] * 5
        + [(0, first_ack(source_port=p), TRUST) for p in (1, 2, 3)]
        + [(0, first_ack(source_port=4), DROP), (400, first_ack(source_port=5), TRUST)],
    ),
    Case(
        "impossible flags of all sorts share one count",
        rule(Measure.BAD_FLAGS),
        [(0, packet(flags), PASS) for flags in (0, XMAS, SYN | FIN)]
        + [(0, packet(SYN | RST), DROP), (0, packet(), PASS), (0, packet(ACK), PASS)],
    ),
    Case(
        "impossible flags are bad whatever the tracker says of them",
        rule(Measure.BAD_FLAGS),
        [(0, packet(0, state=state), PASS) for state in (STRAY, PROVEN, 0)]
        + [(0, packet(0, state=STRAY), DROP)],
    ),
    Case(
        "segments of no known connection",
        rule(Measure.OUT_OF_STATE),
        [(0, packet(flags, state=STRAY), PASS) for flags in (ACK, SYN | ACK, RST)]
        + [(0, packet(FIN | ACK, state=STRAY), DROP), (0, packet(ACK), PASS)],
    ),
    Case(
        "RSTs count, FINs do not",
        rule(Measure.RESET_RATE),
        [(0, closing(FIN | ACK), PASS)] * 5
        + [(0, closing(RST), PASS)] * 2
        + [(0, closing(RST | ACK), PASS), (0, closing(RST), DROP), (0, closing(FIN | ACK), PASS)],
    ),
]

TARGETS: list[Case] = [
    Case(
        "a fourth port within the time is one too many",
        rule(Measure.DISTINCT_PORTS),
        [(0, packet(port=p), PASS) for p in (1, 2, 3, 1, 2, 3)]
        + [(9_000, packet(port=4), DROP), (9_000, packet(port=1), DROP)],
    ),
    Case(
        "ports tried longer ago are forgotten",
        rule(Measure.DISTINCT_PORTS),
        [(0, packet(port=p), PASS) for p in (1, 2, 3)]
        + [(10_000, packet(port=p), PASS) for p in (4, 5, 6)],
    ),
    Case(
        "the same port on many hosts is one port",
        rule(Measure.DISTINCT_PORTS),
        [(0, packet(destination=f"203.0.113.{n}"), PASS) for n in range(9)],
    ),
    Case(
        "a fourth host within the time is one too many",
        rule(Measure.DISTINCT_HOSTS),
        [(0, packet(destination=f"203.0.113.{n}"), PASS) for n in (1, 2, 3)]
        + [(0, packet(destination="203.0.113.4"), DROP)],
    ),
    Case(
        "many ports of one host are one host",
        rule(Measure.DISTINCT_HOSTS),
        [(0, packet(port=p), PASS) for p in range(1, 20)],
    ),
    Case(
        "two sources scanning three ports each are no scanner",
        rule(Measure.DISTINCT_PORTS),
        [(0, packet(port=p, source=f"192.0.2.{n}"), PASS) for p in (1, 2, 3) for n in (1, 2)],
    ),
]

HALF_OPEN: list[Case] = [
    Case(
        "SYNs never followed by an ACK pile up",
        rule(Measure.HALF_OPEN),
        [(0, packet(source_port=p), PASS) for p in (1, 2, 3)] + [(0, packet(source_port=4), DROP)],
    ),
    Case(
        "a repeated SYN is the same handshake",
        rule(Measure.HALF_OPEN),
        [(n * 1000, packet(), PASS) for n in range(9)],
    ),
    Case(
        "a finished handshake makes room",
        rule(Measure.HALF_OPEN),
        [
            event
            for p in range(1, 20)
            for event in ((0, packet(source_port=p), PASS), (1, first_ack(source_port=p), TRUST))
        ],
    ),
    Case(
        "an unfinished handshake is forgotten after a time",
        rule(Measure.HALF_OPEN),
        [(0, packet(source_port=p), PASS) for p in (1, 2, 3)]
        + [(10_000, packet(source_port=4), PASS)],
    ),
]

BRIEF: dict[str, Any] = {"shorter_than": 10 * SECOND}


def visit(port: int, start: int, length: int, last: str) -> list[tuple[int, Packet, str]]:
    return [
        (start, packet(source_port=port), PASS),
        (start + length, closing(source_port=port), last),
    ]


def refused(port: int) -> list[tuple[int, Packet, str]]:
    answer = packet(RST | ACK, port=port, source_port=port, state=OUTBOUND | OVER).turned()
    return [(0, packet(port=port, source_port=port), PASS), (0, answer, PASS)]


REFUSED: list[Case] = [
    Case(
        "three closed ports are allowed, and whoever met a fourth is hit at his next SYN",
        rule(Measure.REFUSED_PORTS),
        [event for port in (1, 2, 3, 3, 4) for event in refused(port)]
        + [(1, packet(port=80), DROP), (1, packet(port=80, source="192.0.2.9"), PASS)],
    ),
    Case(
        "silence counts after four seconds, whoever comes then",
        rule(Measure.REFUSED_PORTS),
        [(0, packet(port=p, source_port=p), PASS) for p in (1, 2, 3, 4)]
        + [(3_900, packet(port=80), PASS), (4_100, packet(source="192.0.2.9"), PASS)]
        + [(4_100, packet(port=81), DROP)],
    ),
    Case(
        "what is answered counts for nobody, be it late, nor what its client gives up",
        rule(Measure.REFUSED_PORTS),
        [(0, packet(port=p, source_port=p), PASS) for p in range(1, 10)]
        + [(10, first_ack(port=p, source_port=p), TRUST) for p in range(1, 5)]
        + [(20, packet(RST, port=p, source_port=p, state=OVER), PASS) for p in range(5, 8)]
        + [(4_100, packet(port=80), PASS)],
    ),
    Case(
        "it is over when the refusals are too old",
        rule(Measure.REFUSED_PORTS),
        [event for port in (1, 2, 3, 4) for event in refused(port)]
        + [(1, packet(port=80), DROP), (10_100, packet(port=80), PASS)],
    ),
]

SHORT: list[Case] = [
    Case(
        "a fourth connection that ends early is one too many",
        rule(Measure.SHORT_CONNECTIONS, period=60 * SECOND, **BRIEF),
        visit(1, 0, 9, PASS)
        + visit(2, 10, 9, PASS)
        + visit(3, 20, 9, PASS)
        + visit(4, 30, 9, DROP),
    ),
    Case(
        "connections that last do not count",
        rule(Measure.SHORT_CONNECTIONS, period=60 * SECOND, **BRIEF),
        [event for p in range(9) for event in visit(p, p * 20_000, 10_000, PASS)],
    ),
    Case(
        "a connection counts once, however many FINs and RSTs it ends with",
        rule(Measure.SHORT_CONNECTIONS, period=60 * SECOND, **BRIEF),
        visit(1, 0, 9, PASS) + [(10, closing(flags, source_port=1), PASS) for flags in (RST,) * 9],
    ),
    Case(
        "one that the server ends counts against the client too",
        rule(Measure.SHORT_CONNECTIONS, limit=1, period=60 * SECOND, **BRIEF),
        [
            (0, packet(source_port=1), PASS),
            (1, reply(RST | ACK, source_port=1, state=ESTABLISHED | OUTBOUND), PASS),
            *visit(2, 10, 5, DROP),
        ],
    ),
    Case(
        "a close of a connection whose beginning nobody saw does not count",
        rule(Measure.SHORT_CONNECTIONS, period=60 * SECOND, **BRIEF),
        [(p, closing(source_port=p), PASS) for p in range(9)],
    ),
]

STALL: dict[str, Any] = {"limit": 30 * SECOND, "window": 256}

STALLED: list[Case] = [
    Case(
        "a window kept shut for longer than the limit",
        rule(Measure.STALLED, **STALL),
        [(0, packet(window_scale=7), PASS)]
        + [(t, small_window(0, 1000), PASS) for t in (1_000, 6_000, 16_000, 30_999)]
        + [(31_000, small_window(0, 1000), DROP)],
    ),
    Case(
        "a window that opens in between starts the time anew: more was acknowledged than it let in",
        rule(Measure.STALLED, **STALL),
        [
            (0, packet(window_scale=7), PASS),
            (1_000, small_window(0, 1_000), PASS),
            (20_000, small_window(0, 900_000), PASS),
            (49_000, small_window(0, 900_000), PASS),
            (50_000, small_window(0, 900_000), DROP),
        ],
    ),
    Case(
        "a trickle through a small window is no opening",
        rule(Measure.STALLED, **STALL),
        [(0, packet(window_scale=0), PASS)]
        + [(t * 1000, small_window(200, 1000 + 200 * t), PASS) for t in range(1, 31)]
        + [(31_000, small_window(200, 1000 + 200 * 31), DROP)],
    ),
    Case(
        "the window is scaled by what the SYN offered",
        rule(Measure.STALLED, **STALL),
        [(0, packet(window_scale=7), PASS)]
        + [(t, small_window(3, 1000), PASS) for t in (0, 31_000, 62_000)],
    ),
    Case(
        "two small enough units are small",
        rule(Measure.STALLED, **STALL),
        [(0, packet(window_scale=7), PASS), (0, small_window(2, 1000), PASS)]
        + [(30_000, small_window(2, 1000), DROP)],
    ),
    Case(
        "without the SYN only a window of 0 is surely small",
        rule(Measure.STALLED, **STALL),
        [(0, small_window(1, 1000), PASS), (40_000, small_window(1, 1000), PASS)]
        + [(50_000, small_window(0, 1000), PASS), (80_000, small_window(0, 1000), DROP)],
    ),
    Case(
        "the acknowledged number may wrap around",
        rule(Measure.STALLED, **STALL),
        [(0, packet(window_scale=0), PASS), (0, small_window(100, 0xFFFFFFF0), PASS)]
        + [(30_000, small_window(100, 0x50), DROP)],
    ),
]

CASES = RATE + TARGETS + HALF_OPEN + REFUSED + SHORT + STALLED


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule.measure.value}: {case.text}")
def test_measure(case: Case) -> None:
    engine = Engine(ruleset(case.rule))
    for step, (at, seen, wanted) in enumerate(case.events, 1):
        decision = engine.decide(seen, 1_000 * SECOND + at * MILLISECOND)
        assert outcome(decision) == wanted, f"packet {step}: {seen}"
        if wanted in {DROP, RESET}:
            assert decision.rule == case.rule.name
            assert decision.reason is Reason[case.rule.measure.name]


def crossed_by(measure: Measure) -> list[Packet]:
    """Return packets of which the last crosses a rule that allows none of the kind before."""
    match measure:
        case Measure.SYN_RATE:
            return [packet(), packet()]
        case Measure.CONNECTION_RATE:
            return [first_ack(source_port=1), first_ack(source_port=2)]
        case Measure.HALF_OPEN:
            return [packet(source_port=1), packet(source_port=2)]
        case Measure.DISTINCT_PORTS:
            return [packet(port=1), packet(port=2)]
        case Measure.DISTINCT_HOSTS:
            return [packet(), packet(destination="203.0.113.99")]
        case Measure.BAD_FLAGS:
            return [packet(0), packet(XMAS)]
        case Measure.OUT_OF_STATE:
            return [packet(ACK, state=STRAY)] * 2
        case Measure.RESET_RATE:
            return [closing(RST)] * 2
        case Measure.SHORT_CONNECTIONS:
            return [p for n in (1, 2) for p in (packet(source_port=n), closing(source_port=n))]
        case _:
            raise AssertionError(measure)


SOURCE_MEASURES = [
    Measure.SYN_RATE,
    Measure.CONNECTION_RATE,
    Measure.HALF_OPEN,
    Measure.DISTINCT_PORTS,
    Measure.DISTINCT_HOSTS,
    Measure.BAD_FLAGS,
    Measure.OUT_OF_STATE,
    Measure.RESET_RATE,
    Measure.SHORT_CONNECTIONS,
]


@pytest.mark.parametrize("measure", SOURCE_MEASURES, ids=lambda m: m.value)
@pytest.mark.parametrize("proven", [False, True], ids=["unproven", "proven"])
@pytest.mark.parametrize("action", Action, ids=lambda a: a.name.lower())
def test_each_measure_with_each_action(measure: Measure, action: Action, proven: bool) -> None:
    engine = Engine(ruleset(rule(measure, action, limit=1, shorter_than=10 * SECOND)))
    *before, last = crossed_by(measure)
    for seen in before:
        decision = engine.decide(seen, SECOND)
        assert decision.verdict is Verdict.ACCEPT
        assert decision.reason is Reason.PASSED
    last = last._replace(state=last.state & ~PROVEN | PROVEN * proven)
    decision = engine.decide(last, SECOND)
    assert decision.reason is Reason[measure.name]
    assert decision.rule == f"{measure.value}-rule"
    no_connection = measure in (Measure.BAD_FLAGS, Measure.OUT_OF_STATE)
    wanted = {
        Action.OBSERVE: TRUST if measure is Measure.CONNECTION_RATE else PASS,
        Action.DROP: DROP,
        Action.RESET: DROP if no_connection else RESET,
        Action.BAN: SHUN,
    }
    if proven:  # one of them proves too little, but a shun would keep away the next
        wanted[Action.BAN] = {
            Measure.CONNECTION_RATE: RESET,
            Measure.SHORT_CONNECTIONS: PASS,
        }.get(measure, SHUN)
    assert outcome(decision) == wanted[action]
    if action is Action.RESET:
        condemned = [effect for effect in decision.effects if isinstance(effect, Condemn)]
        assert [effect.flow for effect in condemned] == [last[:4]] * bool(last.state & KNOWN)


@pytest.mark.parametrize("measure", SOURCE_MEASURES, ids=lambda m: m.value)
def test_packets_of_proven_connections_ban(measure: Measure) -> None:
    """If there are such packets among what is counted, and four where each may be forged."""
    engine = Engine(ruleset(rule(measure, Action.BAN, limit=1, shorter_than=10 * SECOND)))
    outcomes = []
    for number in range(4):
        for bare in crossed_by(measure):
            no_connection = bare.state & STRAY or (not bare.flags & SYN and not bare.state)
            opens = measure is Measure.SHORT_CONNECTIONS and bare.flags & SYN
            state = bare.state if no_connection or opens else ESTABLISHED
            port = bare.source_port + 10 * number
            seen = bare._replace(state=state, source_port=port)
            outcomes.append(outcome(engine.decide(seen, SECOND)))
    assert (BAN in outcomes) == (measure not in NEVER_BANS)


def test_a_scanner_is_shunned_by_the_refusal_that_is_one_too_many() -> None:
    engine = Engine(ruleset(rule(Measure.REFUSED_PORTS, Action.BAN)))
    scan = [seen for port in range(1, 5) for _, seen, _ in refused(port)]
    decisions = [engine.decide(seen, SECOND) for seen in scan]
    assert [bool(decision.effects) for decision in decisions] == 7 * [False] + [True]
    (effect,) = decisions[-1].effects
    assert isinstance(effect, Shun)
    assert decisions[-1].verdict is Verdict.ACCEPT  # a RST frees the other end


def test_silence_where_only_one_side_is_seen_says_nothing() -> None:
    engine = Engine(
        ruleset(rule(Measure.REFUSED_PORTS)), one_sided=OneSided(lambda _address, port: port < 9)
    )
    for port in range(1, 12):
        engine.decide(packet(port=port, source_port=port), SECOND)
    assert engine.decide(packet(port=80), 6 * SECOND).verdict is Verdict.ACCEPT
    engine.decide(packet(port=80), 6 * SECOND)
    for port in (12, 13):
        engine.decide(packet(port=port, source_port=port), 7 * SECOND)
    assert engine.decide(packet(port=81), 11 * SECOND + 1).verdict is Verdict.DROP


def test_data_that_overtakes_the_verdict_on_its_handshake_is_no_second_connection() -> None:
    engine = Engine(ruleset(rule(Measure.CONNECTION_RATE, Action.DROP, limit=1, burst=2)))
    first = packet(ACK, state=KNOWN | PROVEN, source_port=1)
    assert [outcome(engine.decide(first, SECOND)) for _ in range(5)] == [TRUST] * 5
    second = packet(ACK, state=KNOWN | PROVEN, source_port=2)
    assert outcome(engine.decide(second, SECOND)) == TRUST
    assert outcome(engine.decide(first, 9 * SECOND)) == TRUST  # the port again, seconds later
    third = packet(ACK, state=KNOWN | PROVEN, source_port=3)
    assert [outcome(engine.decide(third, 9 * SECOND)) for _ in range(2)] == [TRUST, TRUST]


def test_a_dropped_handshake_stays_dropped_when_it_comes_again() -> None:
    engine = Engine(ruleset(rule(Measure.CONNECTION_RATE, Action.DROP, limit=1, burst=1)))
    first, second = (packet(ACK, state=KNOWN | PROVEN, source_port=port) for port in (1, 2))
    assert outcome(engine.decide(first, SECOND)) == TRUST
    for now in (1, 2, 4, 8, 12):  # with the server's repeated SYN-ACKs
        assert outcome(engine.decide(second, now * SECOND)) == DROP
    assert outcome(engine.decide(second, 20 * SECOND)) == TRUST  # judged anew


@pytest.mark.parametrize("action", [Action.DROP, Action.BAN])
def test_forged_syns_use_up_nothing_of_who_returns_cookies(action: Action) -> None:
    """The owner has his whole burst; one more, and it is he who is too fast."""
    engine = Engine(ruleset(rule(Measure.SYN_RATE, action, limit=2, burst=2)))
    forged = [outcome(engine.decide(packet(source_port=port), 0)) for port in range(1, 99)]
    assert forged.count(PASS) <= 3
    owner = [packet(state=ESTABLISHED, source_port=port) for port in (101, 102, 103)]
    too_many = DROP if action is Action.DROP else BAN
    assert [outcome(engine.decide(one, 0)) for one in owner] == [TRUST, TRUST, too_many]


def test_what_the_kernel_counted_is_not_counted_again() -> None:
    """Only what found no room in the kernel's table counts here: no mark, and no cookie."""
    counted = rule(Measure.SYN_RATE, limit=2, burst=2, in_kernel=True)
    engine = Engine(ruleset(counted))
    for now in range(3):
        assert outcome(engine.decide(packet(state=OVER), now)) == DROP
        assert outcome(engine.decide(packet(state=KNOWN | PROVEN), now)) != DROP
        assert outcome(engine.decide(packet(state=KNOWN | PROVEN | OVER), now)) == DROP
    found = [outcome(engine.decide(packet(source_port=port), 10)) for port in range(3)]
    assert [one == DROP for one in found] == [False, False, True]
