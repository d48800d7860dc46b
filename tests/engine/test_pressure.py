"""Pressure: when a service is in distress, and whom it can do without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest

from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.listed import Listed
from rstguard.engine.patience import BARREN, FEW, SILENT, SPARED, WAITING, Ranked, shed
from rstguard.engine.pressure import (
    FAST,
    FEWEST_FAILING,
    LEAST_BORNE,
    MOST_SERVICES,
    SHORTEST,
    Load,
    Pressure,
    Room,
)
from rstguard.engine.ruleset import (
    ADOPTED,
    CONFIRMED,
    DEFAULT_LABELS,
    LIKELY,
    SECOND,
    Measure,
    Rule,
    RuleSet,
)
from rstguard.engine.sweep import Judgement, Sweep
from rstguard.engine.verdict import Action
from tests.support.flows import START, flow
from tests.support.packets import rule, ruleset

MINUTE, DAY = 60 * SECOND, 86400 * SECOND
WEB = 0x0A000001 << 16 | 80
SERVED = 1 << DEFAULT_LABELS + CONFIRMED | 1 << DEFAULT_LABELS + LIKELY
ASKS = 1 << DEFAULT_LABELS + LIKELY
BY_COOKIE = 1 << DEFAULT_LABELS + CONFIRMED
CAPACITY = 60


def held(live: int, borne: int = 0, begun: int = 0, failing: int = 0) -> dict[int, Load]:
    return {WEB: Load(live, borne, begun, failing)}


def looked(*looks: tuple[float, dict[int, Load]], capacity: int = 0) -> list[Room | None]:
    """Return what became of a service, look by look, at times in seconds."""
    pressure = Pressure()
    pressure.capacity = {80: capacity} if capacity else {}
    rooms = []
    for at, loads in looks:
        pressure.look(loads, START + int(at * SECOND))
        rooms.append(pressure.pressed.get(WEB))
    return rooms


# Which services


def test_a_stated_capacity_presses_from_half_of_it_on() -> None:
    below, above = looked((0, held(384)), (1, held(385)), capacity=768)
    assert below is None
    assert above is not None
    assert above[:4] == (385, 384, 614, 729)


def test_without_one_twice_what_it_bore_does() -> None:
    rooms = looked((0, held(500, 500)), (1, held(1000, 500)), (2, held(1001, 500)))
    assert rooms == [None, None, Room(1001, 1000, None, 1900)]


def test_a_crowd_that_is_served_never_presses() -> None:
    assert looked(*((at, held(10 << at, 10 << at)) for at in range(12))) == [None] * 12


def test_what_is_not_served_teaches_nothing() -> None:
    """The room for honest ones does not grow under a long attack."""
    rooms = looked(*((at, held(5000, 100)) for at in range(500)))
    assert set(rooms) == {Room(5000, 200, None, 380)}


def test_every_server_bears_a_few() -> None:
    assert looked((0, held(2 * LEAST_BORNE)))[0] is None
    assert looked((0, held(2 * LEAST_BORNE + 1)))[0] is not None


def test_what_it_bore_is_forgotten_by_half_a_day() -> None:
    pressure = Pressure()
    for day in range(4):
        pressure.look(held(1, 1600 if day == 0 else 0), START + day * DAY)
    pressure.look(held(401), START + 3 * DAY)
    assert pressure.pressed[WEB].start == 400


def test_it_is_calm_ten_seconds_after_the_last_sign() -> None:
    signs = [(0, 31), (1, 24), (9, 24), (10.5, 25), (20, 24), (20.5, 24)]
    rooms = looked(*((at, held(live)) for at, live in signs), capacity=60)
    assert [room is not None for room in rooms] == [True] * 5 + [False]


def test_a_service_that_fails_half_of_the_new_ones_is_pressed() -> None:
    few, many = FEWEST_FAILING - 1, FEWEST_FAILING
    assert looked((0, held(40, 40, 7, few)))[0] is None
    assert looked((0, held(40, 40, 2 * many + 1, many)))[0] is None
    room = looked((0, held(40, 40, 2 * many, many)))[0]
    assert room is not None
    assert room.late is None
    # Whatever it bears, patience is half of what it is at first, and a third at most goes at once.
    assert abs(2 * (room.patience(20 * SECOND, 40, served=False) or 0) - 20 * SECOND) < 2 * SECOND
    assert 0.65 * 40 <= room.start < 40


@pytest.mark.parametrize(
    ("looks", "coming"),
    [
        pytest.param([(0, 500)], 0, id="at the first look nobody knows"),
        pytest.param([(0, 400), (0.25, 500)], 100, id="as many as since the last"),
        pytest.param([(0, 400), (1, 500)], 100, id="of a look that came late, too"),
        pytest.param([(0, 100), (2, 500)], 50, id="an eighth of what came in two seconds of calm"),
        pytest.param([(0, 400), (0.25, 500), (0.5, 400)], 50, id="what was ended hides who came"),
        pytest.param([(0, 400), (0.25, 500), (0.5, 500), (0.75, 500)], 25, id="forgotten by half"),
    ],
)
def test_who_is_expected_by_the_next_look(looks: list[tuple[float, int]], coming: int) -> None:
    room = looked(*((at, held(live)) for at, live in looks), capacity=768)[-1]
    assert room is not None
    assert room.coming == coming


def test_patience_is_that_of_the_next_look_for_who_was_never_served() -> None:
    room = Room(0, 100, 160, 200, coming=30)
    shown = [room.patience(20 * SECOND, live, served=False) for live in (100, 120, 170, 199)]
    assert shown == [None, 10 * SECOND, SHORTEST, SHORTEST]
    assert room.patience(20 * SECOND, 180, served=True) == 10 * SECOND


def test_patience_shrinks_with_what_is_left() -> None:
    room = Room(0, 100, 160, 200)
    shown = [room.patience(20 * SECOND, live, served=False) for live in (100, 101, 150, 199, 200)]
    assert shown == [None, 19_800_000_000, 10 * SECOND, SHORTEST, SHORTEST]
    assert room.patience(20 * SECOND, 160, served=True) is None
    assert room.patience(20 * SECOND, 180, served=True) == 10 * SECOND
    assert Room(0, 100, None, 200).patience(SECOND, 500, served=True) is None


def test_sweeps_are_more_frequent_before_a_service_is_pressed() -> None:
    pressure = Pressure()
    pressure.look(held(50, 50), START)
    pressure.look(held(70, 50), START + SECOND)
    assert not pressure.urgent
    pressure.look(held(100, 50), START + 2 * SECOND)
    assert (pressure.urgent, pressure.pressed) == (True, {})


def test_what_is_kept_of_services_is_bounded() -> None:
    pressure = Pressure()
    many = {WEB + (number << 16): Load(500, 0, 0, 0) for number in range(MOST_SERVICES + 50)}
    pressure.look(many, START)
    assert len(pressure.pressed) == len(pressure._states) == MOST_SERVICES
    pressure.look({}, START + 11 * SECOND)
    pressure.look({}, START + 12 * SECOND)
    assert not pressure._states


# Whom


def policy(*rules: Rule, capacity: int = CAPACITY) -> RuleSet:
    return replace(ruleset(*rules), capacity=((80, capacity),) if capacity else ())


def unanswered(seconds: int = 20, action: Action = Action.RESET) -> Rule:
    made = rule(Measure.UNANSWERED, action, seconds * SECOND, when_pressed=True)
    return replace(made, name=f"unanswered-{action.name.lower()}")


def bot(number: int, **more: object) -> Flow:
    """Return a connection of its own source that has asked and was not answered."""
    values = {"source": f"10.{number >> 8}.{number & 255}.1", "sent": 200, "age": 5, "labels": ASKS}
    return flow(number + 1, **(values | more))  # type: ignore[arg-type]


def ports(judgement: Judgement) -> list[int]:
    return [objection.flow.original.source_port for objection in judgement.condemned]


def judged(rules: RuleSet, *tables: Iterable[Flow], step: int = SECOND) -> list[list[int]]:
    sweep = Sweep(rules)
    return [ports(sweep.judge(list(t), START + n * step)) for n, t in enumerate(tables)]


pytestmark = pytest.mark.usefixtures("as_table")


def test_the_oldest_go_first_and_no_more_than_bring_it_to_the_start() -> None:
    bots = [bot(number, age=number) for number in range(57)]
    (gone,) = judged(policy(unanswered()), bots)
    assert sorted(gone) == list(range(31, 58))


def test_patience_is_as_long_as_the_load_allows() -> None:
    bots = [bot(number, age=number % 40) for number in range(43)]  # half way: ten seconds
    (gone,) = judged(policy(unanswered()), bots)
    assert len(gone) == 13
    young = [bot(number, age=9) for number in range(43)]
    assert judged(policy(unanswered()), young) == [[]]


def test_in_calm_nothing_goes() -> None:
    rules = [unanswered(), rule(Measure.IDLE, Action.RESET, SECOND, when_pressed=True)]
    bots = [bot(number, age=900) for number in range(30)]
    assert judged(policy(*rules), bots, bots, step=60 * SECOND) == [[], []]


def test_who_holds_many_goes_before_the_older_ones_of_others() -> None:
    single = [bot(number, age=500) for number in range(20)]
    hoard = [bot(100 + number, source="10.9.9.9", age=30) for number in range(40)]
    (gone,) = judged(policy(unanswered()), single + hoard)
    assert min(gone) > 100
    assert len(gone) == 30


def test_nobody_goes_in_place_of_one_who_holds_many_and_has_just_come() -> None:
    single = [bot(number, age=500) for number in range(15)]
    hoard = [bot(100 + number, source="10.9.9.9", age=0) for number in range(60)]
    now, then = judged(policy(unanswered()), single + hoard, single + hoard)
    assert now == []
    assert min(then) > 100
    assert len(then) == 45


def test_a_visitor_with_some_connections_is_not_taken_for_one_who_holds_many() -> None:
    visitor = [bot(100 + number, source="10.9.9.9", age=6) for number in range(FEW)]
    (gone,) = judged(policy(unanswered()), visitor + [bot(n, age=7) for n in range(50)])
    assert max(gone) <= 50


def test_a_network_that_holds_many_counts_as_one_source_that_does() -> None:
    network = [bot(n, source=f"2001:db8:1:{n:x}::1", destination="2001:db8::1") for n in range(90)]
    others = [
        bot(200 + n, source=f"2001:db9:{n:x}::1", destination="2001:db8::1", age=30)
        for n in range(30)
    ]
    (gone,) = judged(policy(unanswered(), capacity=100), others + network)
    assert max(gone) <= 90


def test_who_was_served_elsewhere_is_spared_so_often() -> None:
    known = [bot(100, age=500), bot(101, age=400, source="10.0.100.1")]
    closed = flow(
        9, source="10.0.100.1", received=5000, age=60, labels=SERVED, state=TcpState.TIME_WAIT
    )
    bots = [bot(number, age=30) for number in range(58)]
    (gone,) = judged(policy(unanswered()), [*bots, *known, closed])
    assert 101 in gone  # the older one of two, where one was served
    assert 102 not in gone


def test_whose_bytes_still_come_goes_last_of_those_not_served() -> None:
    def table(sent: int) -> list[Flow]:
        slow = [bot(100 + n, age=8 + sent, sent=200 + 300 * sent, packets=3) for n in range(5)]
        return [*slow, *(bot(n, age=7 + sent) for n in range(38))]

    tables = [table(sent) for sent in range(5)]
    gone = [port for one in judged(policy(unanswered()), *tables) for port in one]
    assert len(gone) >= 13  # ten seconds are over for all
    assert max(gone) <= 100


def test_a_connection_begun_by_a_cookie_is_not_served_by_that() -> None:
    cookies = [bot(number, age=30, labels=BY_COOKIE) for number in range(60)]
    assert len(judged(policy(unanswered()), cookies)[0]) == 30


def test_served_ones_go_only_near_a_stated_capacity_and_polls_last() -> None:
    def table(asked: int) -> list[Flow]:
        polls = [bot(100 + n, labels=SERVED, age=900, sent=200 + 300 * asked) for n in range(10)]
        return [*polls, *(bot(n, labels=SERVED, age=900) for n in range(47))]

    rules = policy(unanswered(5))
    looks = [table(0), table(1), *[table(1)] * 40]
    gone = [port for one in judged(rules, *looks) for port in one]
    assert gone
    assert max(gone) <= 47
    assert all(len(set(one)) == 9 for one in judged(rules, *looks) if one)  # down to 80 %
    learned = policy(unanswered(5), capacity=0)
    many = [bot(n, labels=SERVED, age=900) for n in range(100)]
    bots = [bot(1000 + n, age=90) for n in range(400)]
    assert min(judged(learned, many + bots)[0], default=0) > 1000


def test_other_rules_say_who_may_go_and_pressure_how_many() -> None:
    idle = rule(Measure.IDLE, Action.RESET, 0, when_pressed=True)
    table = [bot(number, age=1) for number in range(40)]
    assert judged(policy(idle), table) == [list(range(1, 11))]
    assert judged(policy(idle), table[:30]) == [[]]


def test_slow_may_look_at_the_last_minute_alone() -> None:
    lately = rule(Measure.SLOW, Action.RESET, 50, after=20 * SECOND, over_last=MINUTE)
    looks = [flow(1, sent=1_000_000, age=age) for age in range(30, 300, 10)]
    gone = judged(ruleset(lately), *([one] for one in looks), step=10 * SECOND)
    assert next(n for n, one in enumerate(gone) if one) == 9  # the second time a minute was over
    busy = [flow(1, sent=1_000_000 + 100 * age, age=age) for age in range(30, 300, 10)]
    assert not any(judged(ruleset(lately), *([one] for one in busy), step=10 * SECOND))


def test_trusted_and_observed_ones_go_not() -> None:
    rules = policy(unanswered(), unanswered(10, Action.OBSERVE))
    rules = replace(rules, rules=rules.rules[1:])
    sweep = Sweep(rules)
    bots = [bot(number, age=30) for number in range(60)]
    judgement = sweep.judge(bots, START)
    assert not judgement.condemned
    assert len(judgement.observed) == 30


def test_how_often_it_is_swept() -> None:
    sweep = Sweep(policy(unanswered()))
    sweep.judge([], START)
    assert sweep.every == 2 * SECOND
    sweep.judge([bot(number) for number in range(60)], START + SECOND)
    assert sweep.every == FAST


# The order, against a plain reading of it


def plainly(room: Room, ranked: list[Ranked], whole: int, now: int) -> list[Ranked]:
    """Take one after the other away, and ask each time who is next."""
    left, gone, live = sorted(ranked), [], room.live
    for kind in (BARREN, SPARED, SILENT, WAITING):
        start = room.start if kind < SILENT else room.late
        if start is None:
            break
        live = room.live - sum(one.kind < kind for one in left)
        full = max(room.end - live, 0) / (room.end - start)
        patience = max(whole * 2**kind * full, SHORTEST)
        for one in [one for one in left if one.kind == kind]:
            if live > start and now - one.since >= patience:
                gone.append(one)
                live -= 1
            elif live > start and one.weight < 0 and now - one.since < SHORTEST:
                live -= 1
    return gone


@pytest.mark.parametrize("seed", range(200))
def test_the_order_against_a_plain_reading_of_it(seed: int) -> None:
    random = Random(seed)
    start = random.randrange(1, 60)
    end = start + random.randrange(2, 60)
    late = random.choice((None, random.randrange(start, end)))
    room = Room(random.randrange(150), start, late, end)
    ranked = sorted(
        Ranked(
            random.randrange(4),
            -random.randrange(4),
            START - random.choice((0, random.randrange(100 * SECOND))),
            (number,),
            flow(number + 1),
        )
        for number in range(room.live)
    )
    by = unanswered(8)
    gone = [gone.original.source_port for _, gone in shed(room, ranked, [by], {}, START)]
    wanted = plainly(room, ranked, 8 * SECOND, START)
    assert gone == [one.flow.original.source_port for one in wanted]
    assert len(gone) <= max(room.live - room.start, 0)


def test_lists_tell_the_load_of_each_service() -> None:
    """`test_columns` holds columns against lists; here lists against what they stand for."""
    refused = [
        bot(50 + n, age=1, state=TcpState.TIME_WAIT)._replace(server_first=True) for n in range(5)
    ]
    waiting = [
        bot(60 + n, age=age, state=TcpState.SYN_SENT) for n, age in enumerate((0.5, 2, 4, 9))
    ]
    flows = [
        *(bot(n, age=601, labels=0) for n in range(3)),
        *(bot(10 + n, labels=SERVED) for n in range(4)),
        *(bot(20 + n, age=2) for n in range(5)), *(bot(30 + n, age=601) for n in range(2)),
        bot(40, age=90_000), *(bot(41 + n, labels=1 << DEFAULT_LABELS + ADOPTED) for n in range(3)),
        *refused, *waiting, *refused,
    ]  # fmt: skip
    sweep = Sweep(policy(unanswered()))
    table = Listed(flows)
    sweep.judge(table, START)
    known = table.known(None, (START, START - SECOND), sweep._grades)  # type: ignore[arg-type]
    service = flow().original.destination << 16 | 80
    assert known.loads(1) == {service: Load(15, 8, 5 + 10 + 3, 10 + 2)}
