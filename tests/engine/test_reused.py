"""What is a connection's own, if its entry had been another's."""

from __future__ import annotations

from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.reused import Reused
from rstguard.engine.ruleset import ANEW, BEGUN, CONFIRMED, DEFAULT_LABELS, LIKELY, REUSED

OTHERS = 1 << DEFAULT_LABELS + LIKELY | 1 << DEFAULT_LABELS + CONFIRMED
AGAIN, FRESH = 1 << DEFAULT_LABELS + REUSED, 1 << DEFAULT_LABELS + ANEW
STAYS = 1 << DEFAULT_LABELS + BEGUN


def flow(labels: int, client: int, server: int = 0) -> Flow:
    there, back = Tuple(1, 2, 3, 4), Tuple(2, 1, 4, 3)
    return Flow(
        1, there, back, TcpState.ESTABLISHED, 0, True, 9, client, 9, server, 77, 60, 0, labels
    )


def test_others_are_left_alone() -> None:
    usual = [flow(OTHERS | STAYS, 100)]
    reused = Reused(DEFAULT_LABELS)
    assert reused.own(usual) == usual
    assert reused.began(usual) == []


def test_each_one_counts_from_its_own_beginning() -> None:
    reused = Reused(DEFAULT_LABELS)
    for before in (1000, 5000):
        first = flow(AGAIN | FRESH | OTHERS | STAYS, before, 2 * before)
        assert reused.began([first]) == [first]
        (own,) = reused.own([first])
        assert (own.client_bytes, own.server_bytes, own.age) == (0, 0, 0)
        assert own.labels == AGAIN | STAYS
        (later,) = reused.own([flow(AGAIN | OTHERS, before + 10, 2 * before + 20)])
        assert (later.client_bytes, later.server_bytes, later.age) == (10, 20, -1)
        assert later.labels == AGAIN | OTHERS  # cleared meanwhile, so these are its own


def test_who_has_not_seen_it_begin_counts_from_the_first_look() -> None:
    reused = Reused(DEFAULT_LABELS)
    (own,) = reused.own([flow(AGAIN, 1000, 50)])
    assert (own.client_bytes, own.server_bytes, own.age) == (0, 0, -1)
    reused.own([])  # it is gone, and forgotten
    (own,) = reused.own([flow(AGAIN, 2000, 50)])
    assert own.client_bytes == 0
