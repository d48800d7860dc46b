"""Columns and objects give the same answers, whatever the table and the policy are."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from rstguard.engine.address import V6, Prefix
from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.grades import Grades
from rstguard.engine.lenient import LEAST
from rstguard.engine.listed import Listed
from rstguard.engine.reused import Reused
from rstguard.engine.ruleset import (
    ADOPTED,
    ANEW,
    BEGUN,
    CONFIRMED,
    DEFAULT_LABELS,
    LIKELY,
    REUSED,
    SECOND,
    Measure,
    Per,
    Rule,
    RuleSet,
    Unless,
)
from rstguard.engine.sweep import Sweep
from rstguard.engine.table import Moment
from rstguard.engine.verdict import Action
from tests.support.flows import flow
from tests.support.packets import rule, ruleset
from tests.support.tables import as_columns

TABLES = 100
START = 1_000 * SECOND
_MEASURES = (
    Measure.CONNECTIONS, Measure.BYTE_RATE, Measure.PACKET_RATE, Measure.SLOW, Measure.IDLE,
    Measure.AGE, Measure.UNANSWERED,
)  # fmt: skip
_WIDTHS = ((32, 64), (24, 48), (32, 128), (0, 0), (31, 100))


def random_address(random: Random) -> int:
    """Return one of few addresses, some of which differ in one half alone, or in the family."""
    last = random.choice((1, 2, 3, 256))
    if random.random() < 0.6:
        return last
    return V6 | random.choice((0, 1, 2, 1 << 63)) << 64 | random.choice((last, last << 60))


def random_flow(random: Random) -> Flow:
    source, port = random_address(random), random.choice((80, 443, 65535))
    destination = random.randrange(1, 3) | (source & V6)
    original = Tuple(source, destination, random.randrange(1, 400), port)
    labels = random.choice(
        (
            0,
            1 << BEGUN,
            1 << LIKELY,
            1 << CONFIRMED,
            1 << ADOPTED,
            3,
            5,
            6,
            1 << REUSED,
            1 << REUSED | 1 << ANEW,
        )
    )
    lately, long = random.randrange(30) * SECOND, random.choice((700, 90_000)) * SECOND
    age = random.choice((-1, lately, lately, random.randrange(SECOND), long))
    return Flow(
        ident=random.choice((random.getrandbits(32), random.randrange(3))),
        original=original,
        reply=original.turned,
        state=random.choice((*TcpState, *[TcpState.ESTABLISHED] * 9)),
        mark=random.choice((0, 1 << 26)),
        seen_reply=random.random() < 0.9,
        client_packets=random.choice((0, random.randrange(1, 40))),
        client_bytes=random.choice((random.randrange(4000), 1 << 19)),
        server_packets=random.choice((0, random.randrange(1, 40))),
        server_bytes=random.choice((0, random.randrange(4000), 1 << 40)),
        age=age,
        timeout=random.randrange(600),
        zone=0,
        labels=labels << DEFAULT_LABELS,
        server_first=random.random() < 0.5,
    )


def later(random: Random, was: Flow, elapsed: int, stays: bool) -> Flow:
    """Return a connection as it may be at the next sweep; the same one if it `stays`."""
    now = was._replace(
        age=was.age + elapsed if was.age >= 0 else -1,
        timeout=max(was.timeout - elapsed // SECOND + random.randrange(5), 0),
    )
    chance = random.random()
    if chance < 0.4:
        more = random.randrange(1, 9)
        now = now._replace(
            client_packets=now.client_packets + more,
            client_bytes=now.client_bytes + random.choice((0, 40, 52, 60, 75, 90, 1400)) * more,
            server_bytes=now.server_bytes + random.choice((0, 60 * more, 5000)),
        )
    elif (
        chance < 0.5 and not stays
    ):  # a new one of the same name, or one that the accounting has lost
        again = random_flow(random)._replace(original=was.original, reply=was.reply)
        now = again._replace(ident=was.ident) if random.random() < 0.5 else again
    return now


def random_rule(random: Random, number: int) -> Rule:
    measure = random.choice(_MEASURES)
    ipv4, ipv6 = random.choice(_WIDTHS)
    limit = {
        Measure.CONNECTIONS: random.randrange(8),
        Measure.BYTE_RATE: random.choice((10, 1000)),
        Measure.PACKET_RATE: random.choice((1, 5)),
        Measure.SLOW: random.choice((5, 100, 10**12)),
    }.get(measure, random.randrange(20) * SECOND)
    more: dict[str, object] = {}
    if measure is Measure.CONNECTIONS and random.random() < 0.4:
        more["unless"] = Unless(random.choice((0, 50)), 3)
    if measure not in (Measure.BYTE_RATE, Measure.PACKET_RATE):
        more["when_pressed"] = measure is Measure.UNANSWERED or random.random() < 0.4
    if measure is Measure.SLOW:
        more["over_last"] = random.choice((0, SECOND, 10 * SECOND))
    made = rule(
        measure,
        random.choice((Action.RESET, Action.BAN, Action.OBSERVE)),
        limit,
        per=random.choice(tuple(Per)),
        destinations=random.choice(((), (), (Prefix(1, 32), Prefix(V6 | 2, 128)))),
        excepted=random.choice(((), (), (Prefix(2, 31), Prefix(V6 | 1 << 64, 66)))),
        ports=random.choice((None, None, frozenset({80}), frozenset({443, 65535}))),
        ipv4_length=ipv4,
        ipv6_length=ipv6,
        of=random.choice(("client", "server", "both")),
        after=random.randrange(5) * SECOND,
        burst=random.choice((0, 2000)),
        keep_existing=random.random() < 0.3,
        **more,
    )
    return replace(made, name=f"rule-{number}")


def random_policy(random: Random) -> RuleSet:
    made = ruleset(*(random_rule(random, number) for number in range(random.randrange(1, 6))))
    trusted = random.choice(((), (Prefix(2, 32),), (Prefix(V6, 64),)))
    return replace(
        made,
        enforce=random.random() < 0.7,
        capacity=random.choice(((), ((80, 10), (443, 30), (65535, 60)))),
        source_ipv6=random.choice((56, 64, 128)),
        scope=replace(made.scope, trusted=trusted),
    )


def state_of(sweep: Sweep, sources: set[int]) -> tuple[object, ...]:
    """Return all that is told of a sweep, by order where there is one."""
    used = {rule.name: sweep._used(rule) for rule in sweep._rules}
    watches = sweep.admissions._watches
    return (
        used,
        [{key: (one.known, one.live, one.base) for key, one in of.items()} for of in watches],
        list(sweep.standings.percents().items()),
        sweep._reported,
        sweep.pressure.pressed,
        sweep.every,
        sweep.found_large(START),
        {source: sweep.explain(source) for source in sources},
        sorted(sweep.nearest(1000)),
        sorted(sweep.admissions.renewed()),
    )


@pytest.mark.parametrize("seed", range(TABLES))
def test_columns_are_judged_as_objects_are(seed: int) -> None:
    random = Random(seed)
    policy, now = random_policy(random), START
    objects, columns = Sweep(policy), Sweep(policy)
    reused = Reused(policy.labels), Reused(policy.labels)
    flows: list[Flow] = []
    for _ in range(random.randrange(2, 6)):
        elapsed = random.choice((SECOND // 4, 2 * SECOND, 20 * SECOND))
        now += elapsed
        stays = bool(flows) and random.random() < 0.3  # the same connections, in the same order
        kept = [
            later(random, one, elapsed, stays) for one in flows if stays or random.random() < 0.8
        ]
        new = [random_flow(random) for _ in range(0 if stays else random.randrange(120))]
        flows = list({one.original: one for one in kept + new}.values())
        if not stays and random.random() < 0.5:
            random.shuffle(flows)
        tables = Listed(flows), as_columns(flows)
        marked = [table.marked(1 << 26, 3 << 26) for table in tables]
        assert marked[0] == marked[1]
        for table in tables:
            table.as_held(1 << 26)
        begun = [table.begun(its) for table, its in zip(tables, reused, strict=True)]
        assert begun[0] == begun[1]
        for table, its in zip(tables, reused, strict=True):
            table.as_own(its)
        assert tables[1].flows() == tables[0].flows()
        adopted = 1 << policy.labels + ADOPTED
        tallies = [table.tally(policy.source_ipv4, policy.source_ipv6, adopted) for table in tables]
        assert list(tallies[1]) == [one for one in tallies[0] if one[1] >= LEAST]
        grades, widths = Grades(policy.labels), (policy.source_ipv4, policy.source_ipv6)
        known = (table.known(None, Moment(now, 0), grades) for table in tables)
        answered = [one.answered(widths, 2) for one in known]
        assert answered[1] == answered[0]
        mine, other = (s.judge(t, now) for s, t in zip((objects, columns), tables, strict=True))
        assert other == mine
        names = {one.original.source for one in flows}
        assert state_of(columns, names) == state_of(objects, names)
        if random.random() < 0.2:
            policy = random_policy(random)
            objects, columns = Sweep(policy, objects), Sweep(policy, columns)


def silent_after(flows: list[Flow], then: list[Flow]) -> list[Flow]:
    """Return who is told to be silent for ten seconds, after two sweeps."""
    sweep = Sweep(ruleset(rule(Measure.IDLE, Action.RESET, 10 * SECOND)))
    sweep.judge(as_columns(flows), START)
    judgement = sweep.judge(as_columns(then), START + 10 * SECOND)
    return [objection.flow for objection in judgement.condemned]


def test_connections_of_the_same_number_and_ports_are_told_apart() -> None:
    alike = [flow(1, source=f"192.0.2.{n}", age=-1) for n in range(1, 6)]
    assert silent_after(alike, alike[::-1]) == alike[::-1]
    assert silent_after(alike[:2], alike) == alike[:2]
    assert silent_after(alike, alike[3:]) == alike[3:]


def test_a_connection_of_ipv4_is_not_taken_for_one_of_ipv6() -> None:
    four = flow(1, source="0.0.0.1", destination="0.0.0.2", age=-1)
    six = flow(1, source="::1", destination="::2", age=-1)
    assert silent_after([four], [six]) == silent_after([six], [four]) == []
    assert silent_after([four, six], [six, four]) == [six, four]


def test_a_name_that_is_there_twice_holds_one_place() -> None:
    policy = ruleset(rule(Measure.CONNECTIONS, Action.RESET, 4))
    twice = [flow(1)._replace(zone=zone) for zone in (0, 1)]
    for as_table in (Listed, as_columns):
        sweep = Sweep(policy)
        sweep.judge(as_table([*twice, flow(2)]), START)
        (watch,) = sweep.admissions._watches[0].values()
        assert (watch.known, len(watch.live)) == (2, 2)
