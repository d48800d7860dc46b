"""The sweep: what the connection table showed at some times, and what each sweep made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.flow import Flow, TcpState
from rstguard.engine.ruleset import (
    ADOPTED,
    CONFIRMED,
    DEFAULT_LABELS,
    LIKELY,
    SECOND,
    Measure,
    Per,
    Rule,
)
from rstguard.engine.sweep import Judgement, Sweep
from rstguard.engine.verdict import Action, Ban, Reason, Shun
from tests.support.flows import START, flow
from tests.support.packets import CLIENT, rule, ruleset

pytestmark = pytest.mark.usefixtures("as_table")


def ports_of(judgement: Judgement) -> list[int]:
    return sorted(objection.flow.original.source_port for objection in judgement.condemned)


def condemned(rule_: Rule, *sweeps: tuple[float, list[Flow]]) -> list[list[int]]:
    """Return, for each sweep at its time in seconds, the client ports that it condemned."""
    sweep = Sweep(ruleset(rule_))
    return [ports_of(sweep.judge(flows, START + int(at * SECOND))) for at, flows in sweeps]


def resets(measure: Measure, limit: int, **more: object) -> Rule:
    return rule(measure, Action.RESET, limit, **more)


# connections


def test_the_newest_connections_beyond_the_limit_are_reset() -> None:
    flows = [flow(port, age=port) for port in (50, 10, 40, 20, 30)]
    assert condemned(resets(Measure.CONNECTIONS, 3), (0, flows)) == [[10, 20]]


def test_as_many_connections_as_the_limit_are_left_alone() -> None:
    flows = [flow(port, age=port) for port in (1, 2, 3)]
    assert condemned(resets(Measure.CONNECTIONS, 3), (0, flows)) == [[]]


def test_connections_count_for_each_source_alone() -> None:
    flows = [flow(port, source=f"192.0.2.{port}") for port in range(1, 9)]
    assert condemned(resets(Measure.CONNECTIONS, 1), (0, flows)) == [[]]


def test_connections_of_a_prefix_count_together() -> None:
    flows = [flow(port, source=f"192.0.2.{port}", age=port) for port in (1, 2, 3)]
    by_prefix = resets(Measure.CONNECTIONS, 2, per=Per.PREFIX, ipv4_length=24)
    assert condemned(by_prefix, (0, flows)) == [[1]]


def test_connections_of_a_slash_64_count_together() -> None:
    flows = [
        flow(n, source=f"2001:db8::{n}", destination="2001:db8:1::1", age=n) for n in (1, 2, 3)
    ]
    assert condemned(resets(Measure.CONNECTIONS, 2), (0, flows)) == [[1]]


def test_connections_of_a_service_count_together() -> None:
    flows = [flow(n, source=f"192.0.{n}.1", age=n) for n in (1, 2, 3)]
    flows += [flow(9, service=443), flow(8, destination="203.0.113.11")]
    by_service = resets(Measure.CONNECTIONS, 2, per=Per.SERVICE)
    assert condemned(by_service, (0, flows)) == [[1]]


def test_what_the_server_may_hold_counts_and_nothing_else() -> None:
    opening = [flow(n, state=TcpState.SYN_RECV) for n in range(10, 19)]
    over = [flow(n, state=state) for n, state in ((20, TcpState.TIME_WAIT), (21, TcpState.CLOSE))]
    assert condemned(resets(Measure.CONNECTIONS, 1), (0, opening + over)) == [[]]
    closing = [flow(1, state=TcpState.FIN_WAIT), flow(2, state=TcpState.CLOSE_WAIT), flow(3)]
    assert len(condemned(resets(Measure.CONNECTIONS, 1), (0, closing))[0]) == 2


def test_without_age_the_connections_of_an_earlier_sweep_are_the_older_ones() -> None:
    first = [flow(1, age=-1), flow(2, age=-1)]
    second = [flow(4, age=-1), *first, flow(3, age=-1)]
    assert condemned(resets(Measure.CONNECTIONS, 2), (0, first), (2, second)) == [[], [3, 4]]


def test_a_connection_that_would_not_die_is_condemned_again() -> None:
    flows = [flow(1, age=5), flow(2, age=1)]
    once_more = [flow(1, age=7), flow(2, age=3)]
    assert condemned(resets(Measure.CONNECTIONS, 1), (0, flows), (2, once_more)) == [[2], [2]]


# idle and age


def test_a_silent_connection_is_reset_when_its_time_is_over() -> None:
    idle = resets(Measure.IDLE, 10 * SECOND)
    sweeps = [(seconds, [flow(1, sent=100, age=seconds)]) for seconds in (0, 9, 10)]
    assert condemned(idle, *sweeps) == [[], [], [1]]


def test_a_connection_of_the_same_ports_is_another_one() -> None:
    """The kernel may give its entry the same number, and it may have sent more by now."""
    old = resets(Measure.AGE, 10 * SECOND)
    sweeps = [(0, flow(1, sent=100, age=9)), (2, flow(1, sent=900, age=1)), (4, flow(1, age=3))]
    assert condemned(old, *((at, [one]) for at, one in sweeps)) == [[], [], []]
    other = flow(1, sent=900, age=-1)._replace(ident=7)
    assert condemned(old, (0, [flow(1, sent=100, age=-1)]), (11, [other])) == [[], []]


def test_any_packet_of_either_end_starts_the_time_anew() -> None:
    idle = resets(Measure.IDLE, 10 * SECOND)
    sweeps = [(at, [flow(1, packets=3 + at // 8)]) for at in range(0, 60, 2)]
    assert condemned(idle, *sweeps) == [[]] * 30


def test_a_half_closed_connection_can_be_idle_too() -> None:
    idle = resets(Measure.IDLE, 10 * SECOND)
    for state in (TcpState.FIN_WAIT, TcpState.CLOSE_WAIT):
        still = [flow(1, state=state)]
        assert condemned(idle, (0, still), (10, still)) == [[], [1]]


def test_a_new_connection_with_the_ports_of_an_old_one_is_not_idle() -> None:
    idle = resets(Measure.IDLE, 10 * SECOND)
    sweeps = [(0, [flow(1, packets=50)]), (9, [flow(1, packets=2)]), (11, [flow(1, packets=2)])]
    assert condemned(idle, *sweeps) == [[], [], []]


def test_a_connection_that_was_gone_for_a_sweep_is_a_new_one() -> None:
    idle = resets(Measure.IDLE, 10 * SECOND)
    assert condemned(idle, (0, [flow(1)]), (5, []), (11, [flow(1)])) == [[], [], []]


def test_a_connection_older_than_the_limit_is_reset_however_busy() -> None:
    old = resets(Measure.AGE, 60 * SECOND)
    sweeps = [(0, [flow(1, sent=1, age=50)]), (9, [flow(1, sent=9000, age=59)])]
    sweeps += [(10, [flow(1, sent=10_000, age=60)])]
    assert condemned(old, *sweeps) == [[], [], [1]]


def test_without_age_the_first_sweep_is_the_beginning() -> None:
    old = resets(Measure.AGE, 60 * SECOND)
    sweeps = [(at, [flow(1, sent=at, age=-1)]) for at in (0, 59, 60)]
    assert condemned(old, *sweeps) == [[], [], [1]]


# slow


SLOW = resets(Measure.SLOW, 50, after=20 * SECOND)


@pytest.mark.parametrize(
    ("text", "of", "seen", "slow"),
    [
        ("too young to judge", "client", flow(1, sent=0, age=19), False),
        ("old enough, and too slow", "client", flow(1, sent=999, age=20), True),
        ("just fast enough", "client", flow(1, sent=1000, age=20), False),
        ("slow on the whole", "client", flow(1, sent=4999, age=100), True),
        (
            "what the server sends is not the client's",
            "client",
            flow(1, received=9999, age=20),
            True,
        ),
        ("the server is slow", "server", flow(1, sent=9999, received=999, age=20), True),
        ("the server is fast enough", "server", flow(1, received=1000, age=20), False),
        ("both together are too slow", "both", flow(1, sent=500, received=499, age=20), True),
        ("both together are fast enough", "both", flow(1, sent=500, received=500, age=20), False),
        (
            "a half-closed one is held as well",
            "client",
            flow(1, state=TcpState.FIN_WAIT, age=99),
            True,
        ),
    ],
)
def test_slow(text: str, of: str, seen: Flow, slow: bool) -> None:
    rule_ = resets(Measure.SLOW, 50, after=20 * SECOND, of=of)
    assert condemned(rule_, (0, [seen])) == [[1] if slow else []], text


# byte_rate

BYTES = resets(Measure.BYTE_RATE, 1000, burst=5000)


def moving(rate: int, seconds: int, every: int = 2) -> list[tuple[float, list[Flow]]]:
    """Return sweeps over a connection that moves `rate` bytes a second from its beginning."""
    return [(at, [flow(1, sent=rate * at, age=at)]) for at in range(0, seconds, every)]


def test_a_source_at_the_limit_is_left_alone() -> None:
    assert condemned(BYTES, *moving(1000, 60)) == [[]] * 30


def test_a_source_over_the_limit_is_reset_when_its_burst_is_used_up() -> None:
    found = condemned(BYTES, *moving(2000, 20))
    assert found[:3] == [[], [], []]
    assert [1] in found[:6]


def test_bytes_moved_before_anybody_looked_do_not_count() -> None:
    assert condemned(BYTES, (0, [flow(1, sent=10**9, age=-1)])) == [[]]


def test_the_connections_of_a_source_count_together_and_the_silent_ones_are_left() -> None:
    sweeps = [
        (at, [flow(n, sent=900 * at, age=at) for n in (1, 2)] + [flow(3, sent=1, age=at)])
        for at in range(0, 40, 2)
    ]
    found = condemned(BYTES, *sweeps)
    assert [1, 2] in found
    assert not any(3 in ports for ports in found[1:])


def test_bytes_moved_in_gusts_count_as_much_as_a_steady_stream() -> None:
    total, sweeps = 0, []
    for at in range(0, 120, 2):
        total += 6900 if at % 4 else 0
        sweeps.append((at, [flow(1, sent=total, age=at)]))
    assert [1] in condemned(BYTES, *sweeps)


# packet_rate

PACKETS = resets(Measure.PACKET_RATE, 100, burst=500, period=SECOND)
EACH = resets(Measure.PACKET_RATE, 100, burst=100, period=SECOND, per=Per.CONNECTION)


def asking(port: int, asked: int, age: float) -> Flow:
    """Return a connection that has made so many requests of 60 bytes, each answered by 100."""
    return flow(port, sent=asked * 112, received=asked * 152, packets=asked, age=age)


def test_requests_of_all_connections_of_a_source_count_together() -> None:
    sweeps = [(at, [asking(n, 80 * at, at) for n in (1, 2, 3)]) for at in range(0, 20, 2)]
    found = condemned(PACKETS, *sweeps)
    assert found[0] == []
    assert [1, 2, 3] in found
    calm = [(at, [asking(n, 30 * at, at) for n in (1, 2, 3)]) for at in range(0, 20, 2)]
    assert condemned(PACKETS, *calm) == [[]] * 10


def test_requests_of_each_connection_count_by_themselves() -> None:
    many = [(at, [asking(n, 90 * at, at) for n in range(1, 40)]) for at in range(0, 20, 2)]
    assert condemned(EACH, *many) == [[]] * 10
    one = [(at, [asking(1, 400 * at, at), asking(2, 90 * at, at)]) for at in range(0, 20, 2)]
    assert condemned(EACH, *one) == [[], *[[1]] * 9]


def test_what_a_connection_said_before_anybody_looked_is_no_rate() -> None:
    assert condemned(EACH, (0, [asking(1, 10**6, -1)]), (2, [asking(1, 10**6, -1)])) == [[], []]


def test_a_download_is_no_flood_of_packets() -> None:
    sweeps = [
        (at, [flow(1, sent=52 * 5000 * at, received=1500 * 10_000 * at, packets=5000 * at, age=at)])
        for at in range(0, 20, 2)
    ]
    assert condemned(EACH, *sweeps) == [[]] * 10
    assert condemned(PACKETS, *sweeps) == [[]] * 10


@pytest.mark.parametrize("per", [Per.SOURCE, Per.CONNECTION])
def test_a_flood_of_requests_bans_whom_the_server_has_answered(per: Per) -> None:
    bans = rule(Measure.PACKET_RATE, Action.BAN, 100, burst=100, period=SECOND, per=per)
    for answered, kind in ((True, Ban), (False, Shun)):
        sweep = Sweep(ruleset(bans))
        forged: dict[str, Any] = {} if answered else {"labels": 0, "server_bytes": 0}
        sweep.judge([asking(1, 1, 1)._replace(**forged)], START)
        judgement = sweep.judge([asking(1, 5000, 3)._replace(**forged)], START + 2 * SECOND)
        assert [type(block) for block in judgement.blocks] == [kind]


def test_how_near_a_source_is_to_a_limit_of_packets_is_told_of_sources_alone() -> None:
    sweep = Sweep(ruleset(replace(PACKETS, name="all"), replace(EACH, name="each")))
    sweep.judge([asking(1, 1, 1)], START)
    sweep.judge([asking(1, 600, 3)], START + 2 * SECOND)
    assert [near.rule for near in sweep.nearest(5)] == ["all"]
    assert list(sweep.explain(parse_address(CLIENT))) == ["all"]


# who, where, what


def test_a_rule_for_some_ports_leaves_the_others() -> None:
    old = resets(Measure.AGE, SECOND, ports=frozenset({22}))
    assert condemned(old, (0, [flow(1, service=22, age=2), flow(2, service=80, age=2)])) == [[1]]


def test_a_rule_for_some_destinations_and_sources_leaves_the_others() -> None:
    partial = resets(
        Measure.CONNECTIONS, 1, per=Per.DESTINATION, ipv4_length=24,
        destinations=(parse_prefix("203.0.113.0/24"),), excepted=(parse_prefix("192.0.2.1"),),
    )  # fmt: skip
    held = [
        flow(1, destination="203.0.113.1", age=9),
        flow(2, destination="203.0.113.2", source="192.0.2.2", age=8),
        flow(3, destination="203.0.114.3", age=7),
        flow(4, destination="203.0.114.4", age=6),
        flow(5, destination="203.0.113.5", source="192.0.2.1", age=5),
    ]
    assert condemned(partial, (0, held)) == [[2]]


def test_a_trusted_source_is_left_alone() -> None:
    old = rule(Measure.AGE, Action.BAN, SECOND)
    sweep = Sweep(ruleset(old, trusted=("198.51.100.0/24",)))
    judgement = sweep.judge([flow(1, age=9), flow(2, age=9, source="192.0.2.1")], START)
    assert [type(block) for block in judgement.blocks] == [Ban]
    assert judgement.blocks[0].source == parse_prefix("192.0.2.1")
    assert judgement.condemned == ()


def test_a_ban_from_the_sweep_names_source_rule_and_reason() -> None:
    hoarder = rule(Measure.CONNECTIONS, Action.BAN, 1, keep_existing=True)
    judgement = Sweep(ruleset(hoarder)).judge([flow(n) for n in range(5)], START)
    wanted = Ban(
        parse_prefix(CLIENT),
        600 * SECOND,
        "connections-rule",
        Reason.CONNECTIONS,
        keep_existing=True,
    )
    assert judgement.blocks == (wanted,)


def test_a_rule_that_is_capped_ends_connections_where_it_would_ban() -> None:
    old = rule(Measure.AGE, Action.BAN, SECOND)
    capped = replace(ruleset(old), capped=frozenset({old.name}))
    judgement = Sweep(capped).judge([flow(1, age=9)], START)
    (block,) = judgement.blocks
    assert isinstance(block, Shun)
    assert block.withheld
    assert ports_of(judgement) == [1]


LIKELY_ONE = 1 << DEFAULT_LABELS + LIKELY


def test_a_connection_that_may_be_forged_is_ended_and_its_source_shunned() -> None:
    old = rule(Measure.AGE, Action.BAN, SECOND)
    judgement = Sweep(ruleset(old)).judge([flow(1, age=9, labels=0)], START)
    assert [type(block) for block in judgement.blocks] == [Shun]
    assert ports_of(judgement) == [1]


@pytest.mark.parametrize("v6", [False, True])
def test_what_a_server_has_sent_proves_a_connection_older_than_labels(v6: bool) -> None:
    old = rule(Measure.AGE, Action.BAN, SECOND)
    # Ten of the longest segments without data, and one byte more.
    bare = flow(1, age=9, labels=0, received=1000 if v6 else 800)._replace(server_packets=10)
    if v6:
        bare = bare._replace(original=bare.original._replace(source=parse_address("2001:db8::1")))
    for one, wanted in ((bare, Shun), (bare._replace(server_bytes=bare.server_bytes + 1), Ban)):
        judgement = Sweep(ruleset(old)).judge([one], START)
        assert [type(block) for block in judgement.blocks] == [wanted]


@pytest.mark.parametrize(("silent", "wanted"), [(3, Shun), (4, Ban)])
def test_some_silent_connections_prove_an_address_together(silent: int, wanted: type) -> None:
    old = rule(Measure.AGE, Action.BAN, SECOND)
    flows = [flow(n, age=9, labels=LIKELY_ONE) for n in range(silent)]
    judgement = Sweep(ruleset(old)).judge(flows, START)
    assert {type(block) for block in judgement.blocks} == {wanted}


def test_forged_connections_in_a_visitors_name_neither_ban_him_nor_end_his_own() -> None:
    hoarder = rule(Measure.CONNECTIONS, Action.BAN, 10)
    own = [flow(n, age=1) for n in range(10)]
    forged = [flow(100 + n, age=9, labels=0) for n in range(20)]
    judgement = Sweep(ruleset(hoarder)).judge([*forged, *own], START)
    assert [type(block) for block in judgement.blocks] == [Shun]
    assert ports_of(judgement) == list(range(100, 120))
    one_more = flow(50, age=0)
    judgement = Sweep(ruleset(hoarder)).judge([*forged, *own, one_more], START)
    assert [type(block) for block in judgement.blocks] == [Ban]


def test_one_lucky_forgery_does_not_ban_a_visitor_who_is_known() -> None:
    idle = rule(Measure.IDLE, Action.BAN, 5 * SECOND)
    sweep = Sweep(ruleset(idle))
    own, lucky = flow(1), flow(2, labels=LIKELY_ONE)
    sweep.judge([own, lucky], START)
    own = own._replace(client_packets=own.client_packets + 1)
    judgement = sweep.judge([own, lucky], START + 9 * SECOND)
    assert [type(block) for block in judgement.blocks] == [Shun]
    assert ports_of(judgement) == [2]


def test_bytes_of_a_forged_connection_do_not_ban_a_visitor() -> None:
    sweep = Sweep(ruleset(rule(Measure.BYTE_RATE, Action.BAN, 1000, period=SECOND)))
    own, forged = flow(1, received=100), flow(2, sent=100, labels=0)
    sweep.judge([own, forged], START)
    forged = forged._replace(client_bytes=9_000_000, client_packets=9000)
    judgement = sweep.judge([own, forged], START + SECOND)
    assert [type(block) for block in judgement.blocks] == [Shun]
    assert ports_of(judgement) == [2]


def test_the_most_severe_rule_decides_about_a_connection() -> None:
    mild = rule(Measure.AGE, Action.RESET, SECOND, name="mild")
    stern = rule(Measure.IDLE, Action.BAN, 0, name="stern")
    for rules in ((mild, stern), (stern, mild)):
        judgement = Sweep(ruleset(*rules)).judge([flow(1, age=9)], START)
        assert judgement.condemned == ()
        assert [block.rule for block in judgement.blocks] == ["stern"]


def test_of_two_equally_stern_rules_a_connection_is_condemned_by_one() -> None:
    one, two = (resets(Measure.AGE, SECOND, name=name) for name in ("one", "two"))
    judgement = Sweep(ruleset(one, two)).judge([flow(1, age=9)], START)
    assert [objection.rule.name for objection in judgement.condemned] == ["one"]


def test_an_observing_rule_reports_each_connection_once() -> None:
    watch = rule(Measure.AGE, Action.OBSERVE, SECOND)
    sweep = Sweep(ruleset(watch))
    counts = []
    for at in range(3):
        judgement = sweep.judge([flow(1, age=9 + at), flow(2, age=at)], START + at * SECOND)
        assert judgement.condemned == ()
        assert judgement.blocks == ()
        counts.append([objection.flow.ident for objection in judgement.observed])
    assert counts == [[1], [2], []]


def test_an_observing_policy_condemns_each_connection_once() -> None:
    sweep = Sweep(ruleset(resets(Measure.AGE, SECOND), enforce=False))
    found = [ports_of(sweep.judge([flow(1, age=9 + at)], START + at * SECOND)) for at in range(3)]
    assert found == [[1], [], []]


def test_a_change_of_policy_keeps_what_is_known_of_connections() -> None:
    first = Sweep(ruleset(resets(Measure.IDLE, 10 * SECOND)))
    first.judge([flow(1, age=-1)], START)
    second = Sweep(ruleset(resets(Measure.AGE, 10 * SECOND)), previous=first)
    assert ports_of(second.judge([flow(1, age=-1)], START + 10 * SECOND)) == [1]


def test_nothing_is_remembered_of_connections_that_are_gone() -> None:
    sweep = Sweep(ruleset(resets(Measure.IDLE, SECOND), rule(Measure.AGE, Action.OBSERVE, 0)))
    sweep.judge([flow(n, age=1) for n in range(1000)], START)
    sweep.judge([], START + SECOND)
    assert not sweep._reported
    again = sweep.judge([flow(n, age=-1) for n in range(1000)], START + 2 * SECOND)
    assert (again.condemned, len(again.observed)) == ((), 1000)


def test_no_connections_no_objections() -> None:
    assert Sweep(ruleset(SLOW, BYTES)).judge([], START) == Judgement((), (), ())


ADOPTED_ONE = 1 << DEFAULT_LABELS + ADOPTED


def test_what_was_adopted_and_may_be_forged_is_ended_first() -> None:
    """A server with a half-open connection answers a stray ACK in anybody's name."""
    hoarder = resets(Measure.CONNECTIONS, 10)
    own = [flow(n, age=1) for n in range(10)]
    forged = [flow(100 + n, age=9, labels=ADOPTED_ONE) for n in range(20)]
    assert condemned(hoarder, (0, [*forged, *own])) == [list(range(100, 120))]
    # Its server has sent data since: it counts as any other.
    uploads = [one._replace(labels=ADOPTED_ONE | 1 << DEFAULT_LABELS + CONFIRMED) for one in forged]
    assert condemned(hoarder, (0, [*uploads, *own])) == [[*range(10), *range(110, 120)]]


def test_what_began_uncounted_is_not_slow_and_what_came_after_it_is() -> None:
    """Another program has switched accounting off for a while."""
    slow = rule(Measure.SLOW, Action.RESET, 50, after=5 * SECOND)
    uncounted = flow(1, age=60, packets=0)
    counted = flow(2, age=60, packets=3, sent=200)
    assert condemned(slow, (0, [uncounted]), (60, [uncounted, counted])) == [[], [2]]


def test_what_began_uncounted_is_idle_by_its_timer() -> None:
    quiet, lively = (flow(port, packets=0)._replace(timeout=1000) for port in (1, 2))
    later = [quiet._replace(timeout=940), lively]
    silent = resets(Measure.IDLE, 30 * SECOND)
    assert condemned(silent, (0, [quiet, lively]), (60, later)) == [[], [1]]
