"""What children say is checked value by value: nothing else reaches the supervisor."""

from __future__ import annotations

import contextlib
import json
import random
import tracemalloc
from statistics import median
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.engine.address import V6, parse_prefix
from rstguard.engine.flow import Tuple
from rstguard.engine.verdict import Ban, Reason, Shun
from rstguard.ipc.channel import Closed, child_end, pair, supervisor_end
from rstguard.ipc.codec import Unreadable, decoded, encoded
from rstguard.ipc.messages import (
    Blocked,
    Failed,
    FromChild,
    Kill,
    Learn,
    Recheck,
    Stop,
    Tell,
    ToChild,
    blocked_message,
)
from rstguard.kernel.elements import Element
from tests.bench.figures import ratios
from tests.bench.messages import costs
from tests.ipc.examples import BAN, EXAMPLES, FLOW

MANY = 20_000
LARGEST = 1 << 20
MEMORY = 64 << 20
REASON = json.dumps(Reason.SYN_RATE.value)


def test_there_is_an_example_of_each() -> None:
    assert {type(message) for message in EXAMPLES} == set(get_args(FromChild))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was_sent(message: FromChild) -> None:
    assert decoded(encoded(message)) == message
    assert decoded(memoryview(encoded(message))) == message
    assert show(message)


DOWN = [m for m in EXAMPLES if type(m) in get_args(ToChild)]
DOWN += [Stop(), Recheck(), Learn(on=True), Tell(1), Kill(1, parse_prefix("::/0"), port=80)]  # type: ignore[list-item]


@pytest.mark.parametrize("message", DOWN, ids=lambda message: type(message).__name__)
def test_a_message_goes_down_as_it_is(message: ToChild) -> None:
    ours, theirs = pair()
    above, below = supervisor_end(ours), child_end(theirs)
    above.send(message)
    assert below.receive() == [message]
    above.close()
    below.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '["Stop"]',
        '["Start",{}]',
        '["Ready"]',
        '["Ready",-1]',
        '["Ready",true]',
        '["Ready",1.0]',
        '["Ready",0,"a b"]',
        '["Ready",0,"",1]',
        '["Ready",9223372036854775808]',
        f'["Ready",{"9" * 4000}]',
        f'["Observed",[1,2,3,4],"a b",{REASON}]',
        f'["Observed",[1,2,3,4],"a\\n",{REASON}]',
        f'["Observed",[1,2,3,4],"",{REASON}]',
        f'["Observed",[1,2,3,4],"{"a" * 49}",{REASON}]',
        '["Observed",[1,2,3,4],"a","no reason"]',
        f'["Observed",[1,2,3],"a",{REASON}]',
        f'["Observed",[-1,2,3,4],"a",{REASON}]',
        f'["Observed",[1,2,3,65536],"a",{REASON}]',
        f'["Observed",[1,{1 << 32},3,4],"a",{REASON}]',
        f'["Observed",[1,{V6 << 1},3,4],"a",{REASON}]',
        f'["Blocked",[[1,33],"ban","a",1,false],{REASON}]',
        f'["Blocked",[[1,-1],"ban","a",1,false],{REASON}]',
        f'["Blocked",[[0,0],"ban","a",1,false],{REASON}]',
        f'["Blocked",[[1,24],"ban","a",1,false],{REASON}]',
        f'["Blocked",[[1,32],"lift","a",1,false],{REASON}]',
        f'["Blocked",[[1,32],"ban","a;b",1,false],{REASON}]',
        f'["Blocked",[[1,32],"ban","a",0,false],{REASON}]',
        f'["Blocked",[[1,32],"ban","a",2147484,false],{REASON}]',
        f'["Blocked",[[1,32],"ban","a",1,false],{REASON},true,true,65]',
        '["Overloaded",1,5]',
        '["Counts",{"a":-1}]',
        '["Counts",{"":1}]',
        '["Counts",{"a\\u001b]52;":1}]',
        f'["Counts",{{"{"a" * 65}":1}}]',
        json.dumps(["Counts", {f"c{number}": 1 for number in range(4097)}]),
        '["Productive",{"1":101}]',
        '["Productive",{"-1":1}]',
        f'["Productive",{{"{V6 << 17}":1}}]',
        '["Large",[[[1,32],101,1,1,1]]]',
        '["Large",[[[1,32],1,-1,1,1]]]',
        '["Large",[[[1,31],1,1,1,1]]]',
        json.dumps(["Large", [[[1, 32], 1, 1, 1, 1]] * 17]),
        '["Explained",1,{"a":NaN}]',
        '["Explained",1,{"a":1e999}]',
        '["Explained",1,{"a":null}]',
        '["NearestAre",1,[["a","b\\u202e",1.0]]]',
        '["NearestAre",1,[["a","b\\u0000",1.0]]]',
        f'["NearestAre",1,[["a","{"b" * 1001}",1.0]]]',
        '["Killed",1,1,1,[[[1,2,3,4],"a\\nb"]]]',
        f'["Killed",1,1,1,[[[1,2,3,4],"{"a" * 1001}"]]]',
        '["Measured",1,"a",[[-1,1]]]',
        '["Measured",1,"a",[[1,-1]]]',
        f'["Measured",1,"a",[[{"9" * 100},1]]]',
        f'["LookProductive",1,[{"9" * 100}]]',
        "[" * 100_000,
        '["Killed",1,1,1,[],' + "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(Unreadable) as refused:
        decoded(text.encode())
    said = str(refused.value)
    assert said.isprintable()
    assert 0 < len(said) <= 200


def test_what_a_failure_says_becomes_one_line() -> None:
    assert Failed("a\nb\x1b]52;c\x07  \u202ed").sentence == "a b ]52;c d"
    assert len(Failed("x" * 5000).sentence) == 1000
    assert decoded(json.dumps(["Failed", "a\r\n\x00b"]).encode()) == Failed("a b")


def test_the_report_of_a_ban_carries_its_element() -> None:
    ban = Ban(BAN.source, 1, "syn-rate", Reason.SYN_RATE, keep_existing=True, offence=2)
    assert blocked_message(ban, enforced=True) == Blocked(
        Element(BAN.source, "ban", "syn-rate", 1, keep_existing=True), Reason.SYN_RATE, offence=2
    )
    shun = Shun(BAN.source, 10**10, "overload", Reason.OVERLOAD)
    assert blocked_message(shun, enforced=False, by_worker=False) == Blocked(
        Element(BAN.source, "shun", "overload", 10), Reason.OVERLOAD, False, False
    )


def show(message: object) -> str:
    """Write everything of a message as the supervisor does; whatever was accepted can be."""
    if isinstance(message, Element):
        return f"{message.source} {message.comment} {message.set_name}"
    if isinstance(message, Tuple):
        return str(message)
    if isinstance(message, dict):
        return " ".join(f"{show(key)} {show(value)}" for key, value in message.items())
    if isinstance(message, tuple):
        return " ".join(map(show, message))
    fields = getattr(message, "__struct_fields__", None)
    if fields is None:
        return str(message)
    return " ".join([type(message).__name__, *(show(getattr(message, name)) for name in fields)])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70_000)
    | st.sampled_from([1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, V6, V6 << 1, 10**300, -(10**40)])
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["ban", "Reset", "both", "rstguard", Reason.IDLE.value]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real message of which a value or some bytes were changed."""
    data = encoded(draw(st.sampled_from(EXAMPLES)))
    if draw(st.booleans()):
        value = json.loads(data)
        _change(value, draw)
        return json.dumps(value).encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return data


def _change(value: Any, draw: st.DrawFn) -> None:
    """Change something in a list or object, at any depth."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = draw(st.sampled_from(keys))
    if isinstance(value[key], list | dict) and draw(st.booleans()):
        _change(value[key], draw)
    elif draw(st.booleans()):
        value[key] = draw(JSON)
    elif draw(st.booleans()) or isinstance(value, dict):
        del value[key]
    else:
        value.insert(key, draw(JSON))


def is_heard_or_refused(data: bytes) -> None:
    with contextlib.suppress(Unreadable):
        message = decoded(data)
        assert isinstance(message, get_args(FromChild))
        assert show(message).isprintable()


@given(st.one_of(st.binary(max_size=200), mutated(), JSON.map(lambda v: json.dumps(v).encode())))
@settings(max_examples=400)
def test_whatever_comes_is_heard_or_refused(data: bytes) -> None:
    is_heard_or_refused(data)


@pytest.mark.fuzz_long
@given(st.one_of(st.binary(max_size=2000), mutated(), mutated()))
@settings(max_examples=MANY)
def test_whatever_comes_at_length(data: bytes) -> None:
    is_heard_or_refused(data)


def test_nothing_but_an_end_comes_out_of_a_channel() -> None:
    """The same at the supervisor's end: what is refused ends that channel, by `Closed`."""
    chance = random.Random(7)
    originals = [encoded(message) for message in EXAMPLES]
    refused = 0
    for _ in range(600):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randrange(4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        ours, theirs = pair()
        end = supervisor_end(ours)
        theirs.send(data)
        try:
            assert len(end.receive()) == 1
        except Closed:
            refused += 1
        end.close()
        theirs.close()
    assert 100 < refused < 590


@pytest.mark.parametrize(
    "text",
    [
        "[" * LARGEST,
        '["Killed",1,1,1,[],' + "[" * (LARGEST - 20),
        '["Measured",1,"a",[' + "[1,1]," * (LARGEST // 6 - 4) + "[1,1]]]",
        '["LookProductive",1,[' + "1," * (LARGEST // 2 - 20) + "1]]",
        '["Productive",{' + ",".join(f'"{n}":1' for n in range(90_000)) + "}]",
        '["Failed","' + "\\u202e" * (LARGEST // 6 - 10) + '"]',
        '["Ready",' + "9" * (LARGEST - 20) + "]",
    ],
    ids=lambda text: text[:24],
)
def test_a_message_takes_a_bounded_multiple_of_its_size(text: str) -> None:
    data = text.encode()
    assert len(data) <= LARGEST
    tracemalloc.start()
    try:
        with contextlib.suppress(Unreadable):
            decoded(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY


def test_flows_are_written_the_same_on_both_sides() -> None:
    assert show(FLOW) == "198.51.100.7:40000 > 203.0.113.10:443"


def test_checked_messages_cost_no_more_than_pickles() -> None:
    ours, theirs = costs(5)
    assert median(ratios(ours, theirs)) < 1
