"""Messages between the guard's processes: what is said last is heard, whoever left what unread."""

from __future__ import annotations

import pytest

from rstguard.ipc.channel import Channel, Closed, pair


def test_last_words_are_heard_though_something_was_left_unread() -> None:
    ours, theirs = map(Channel, pair())
    ours.send("never read")
    theirs.send("I cannot go on")
    theirs.close()
    assert ours.receive() == ["I cannot go on"]
    with pytest.raises(Closed):
        ours.receive()


def test_messages_keep_their_order_and_bounds() -> None:
    ours, theirs = map(Channel, pair())
    for number in range(100):
        ours.send((number, "x" * number))
    assert theirs.receive() == [(number, "x" * number) for number in range(100)]
    assert theirs.receive() == []
