"""Messages between the guard's processes: what is said last is heard, whoever left what unread."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rstguard.ipc import channel
from rstguard.ipc.channel import ChildEnd, Closed, Garbled, SupervisorEnd, child_end, supervisor_end
from rstguard.ipc.entry import last_words
from rstguard.ipc.messages import Counts, Failed, Ready, Stop, Tell
from rstguard.kernel import KernelError


@pytest.fixture
def ends() -> Iterator[tuple[SupervisorEnd, ChildEnd]]:
    ours, theirs = channel.pair()
    ends = supervisor_end(ours), child_end(theirs)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw() -> Iterator[tuple[SupervisorEnd, socket.socket]]:
    """The supervisor's end, and a child that may send anything."""
    ours, theirs = channel.pair()
    theirs.setblocking(False)
    end = supervisor_end(ours)
    yield end, theirs
    end.close()
    theirs.close()


def test_last_words_are_heard_though_something_was_left_unread(
    ends: tuple[SupervisorEnd, ChildEnd],
) -> None:
    ours, theirs = ends
    ours.send(Stop())
    theirs.send(Failed("I cannot go on"))
    theirs.close()
    assert ours.receive() == [Failed("I cannot go on")]
    with pytest.raises(Closed):
        ours.receive()


def test_messages_keep_their_order_and_bounds(ends: tuple[SupervisorEnd, ChildEnd]) -> None:
    ours, theirs = ends
    for number in range(100):
        ours.send(Tell(number))
        theirs.send(Failed("x" * number))
    assert theirs.receive() == [Tell(number) for number in range(100)]
    assert theirs.receive() == []
    assert ours.receive() == [Failed("x" * number) for number in range(100)]


def test_one_who_never_stops_talking_is_heard_in_parts(
    ends: tuple[SupervisorEnd, ChildEnd],
) -> None:
    ours, theirs = ends
    for number in range(2000):
        theirs.send(Ready(number))
    heard = 0
    while messages := ours.receive():
        assert len(messages) <= 1024
        heard += len(messages)
        theirs.flush()
    assert heard == 2000


class Trap:
    """A pickle of it makes a file appear when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_from_a_child_is_not_read(
    raw: tuple[SupervisorEnd, socket.socket], tmp_path: Path
) -> None:
    ours, theirs = raw
    theirs.send(pickle.dumps(Trap(tmp_path / "run")))
    with pytest.raises(Garbled, match="sent what is no message"):
        ours.receive()
    assert not (tmp_path / "run").exists()


def test_what_was_right_before_it_is_heard_first(
    raw: tuple[SupervisorEnd, socket.socket],
) -> None:
    """A ban that a worker placed before it went wrong must reach the store."""
    ours, theirs = raw
    theirs.send(b'["Ready",0]')
    theirs.send(b'["Ready","0"]')
    theirs.send(b'["Ready",1]')
    assert ours.receive() == [Ready(0)]
    for _ in range(2):  # the second time as the first: nothing after it is believed
        with pytest.raises(Garbled, match="Expected `int`, got `str`"):
            ours.receive()


def test_one_that_sent_garbage_notices_that_it_is_not_heard(
    raw: tuple[SupervisorEnd, socket.socket],
) -> None:
    ours, theirs = raw
    theirs.send(b"garbage")
    with pytest.raises(Garbled):
        ours.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        theirs.send(b"more")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may have so large a buffer")
def test_a_message_of_any_size_takes_no_more_memory_than_the_largest(
    raw: tuple[SupervisorEnd, socket.socket],
) -> None:
    ours, theirs = raw
    size = (1 << 20) + 1
    theirs.setsockopt(socket.SOL_SOCKET, 32, 8 << 20)  # SO_SNDBUFFORCE
    theirs.send(b"x" * size)
    with pytest.raises(Garbled, match=f"{size} bytes are more than a message has"):
        ours.receive()


def test_a_message_that_never_fits_is_counted_and_does_not_block_the_others() -> None:
    ours, theirs = channel.pair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    end, other = child_end(ours), supervisor_end(theirs)
    end.send(Counts({f"count-{number}": number for number in range(4000)}))
    end.send(Ready(1))
    assert other.receive() == [Ready(1)]
    assert end.lost == 1


def test_what_nobody_expected_is_told_before_the_end(
    ends: tuple[SupervisorEnd, ChildEnd], caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = ends
    with pytest.raises(SystemExit) as ended, last_words(theirs):
        raise ZeroDivisionError("in the middle\nof a sweep")
    assert ended.value.code == 1
    said = "it failed on something unexpected: ZeroDivisionError('in the middle\\nof a sweep')"
    assert ours.receive() == [Failed(said)]
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("expected", [Closed(), KernelError("the kernel refused")])
def test_what_was_expected_goes_its_way(
    ends: tuple[SupervisorEnd, ChildEnd], expected: Exception
) -> None:
    with pytest.raises(type(expected)), last_words(ends[1]):
        raise expected
    assert ends[0].receive() == []


def test_last_words_do_not_wait_behind_what_nobody_reads(
    ends: tuple[SupervisorEnd, ChildEnd],
) -> None:
    """A supervisor that hangs must not keep a failed process from ending."""
    _, theirs = ends
    while not theirs.waiting:
        theirs.send(Failed("x" * 900))
    theirs.send_last(Failed("the last"))  # gives up after a second
    assert theirs.waiting
