"""Whatever a capture holds, a replay comes to its end, and its counts add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.engine.gauges import Gauges
from rstguard.engine.ruleset import SECOND
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse
from rstguard.replay.capture import Batch
from rstguard.replay.play import Replay
from tests.replay.captures import START
from tests.replay.commands import BASE
from tests.support.packets import ipv4, ipv6, tcp

HEAD = "{interfaces: [eth0]"
POLICIES = [
    compile_policy(parse(text, "fuzz.yaml").policy)
    for text in (
        BASE,
        BASE.replace("version: 1", "version: 1\nmode: observe"),
        BASE.replace(HEAD, HEAD + ", ports: [80]").replace("1000000", "1"),
        BASE.replace("over: 100/s, burst: 300", "over: 1/m").replace("over: 10s", "over: 1s"),
    )
]
numbers = st.sampled_from([0, 1, 2, 1000, 1001, 9000, 9001, 2**32 - 1])
addresses = st.sampled_from([("10.0.0.1", "10.0.0.2"), ("10.0.0.2", "10.0.0.1"), ("1.1.1.1",) * 2])


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    ports = draw(st.sampled_from([(4000, 80), (80, 4000), (4001, 80), (80, 80), (0, 0)]))
    segment = tcp(
        draw(st.sampled_from([2, 18, 16, 24, 17, 4, 20, 0, 63, 3]) | st.integers(0, 255)),
        source_port=ports[0],
        destination_port=ports[1],
        sequence=draw(numbers),
        acknowledgement=draw(numbers),
        window=draw(st.sampled_from([0, 16, 65535])),
        payload=draw(st.sampled_from([b"", b"hello"])),
        options=draw(st.sampled_from([b"", b"\x03\x03\x0e\x00", b"\x03\xff\x03\x03"])),
    )
    source, destination = draw(addresses)
    if draw(st.booleans()):
        data = ipv4(segment, source=source, destination=destination)
    else:
        source, destination = f"2001:db8::{source[-1]}", f"2001:db8::{destination[-1]}"
        data = ipv6(segment, source=source, destination=destination)
    if draw(st.integers(0, 9)):
        return data
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 4)) :] or b"E"


traffic = st.lists(st.tuples(st.integers(-SECOND, 30 * SECOND), packets()), max_size=60)


def check(steps: list[tuple[int, bytes]], which: int) -> None:
    batch: Batch = []
    now = START
    for ahead, data in steps:
        now += ahead
        batch.append((now, data))
    ruleset = POLICIES[which]
    replay = Replay(ruleset, most=16)
    for start in range(0, len(batch), 7):
        replay.feed(batch[start : start + 7])
    assert replay.counts.packets == len(batch)
    lost = sum(hit.packets for hit in replay.hits)
    assert lost == sum(total.packets for total in replay.hits.totals.values()) <= len(batch)
    if not ruleset.enforce:
        assert lost == 0
    assert len(replay._table) <= 32
    gauges = Gauges(ruleset)
    Replay(ruleset, judge=gauges, sweeping=gauges).feed(batch)


@settings(max_examples=300)
@given(traffic, st.integers(0, len(POLICIES) - 1))
def test_any_traffic(steps: list[tuple[int, bytes]], which: int) -> None:
    check(steps, which)


@pytest.mark.fuzz_long
@settings(max_examples=30_000)
@given(traffic, st.integers(0, len(POLICIES) - 1))
def test_any_traffic_for_long(steps: list[tuple[int, bytes]], which: int) -> None:
    check(steps, which)
