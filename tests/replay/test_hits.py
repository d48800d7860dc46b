"""Records are bounded, totals are whole, and whoever listens hears of what matters."""

from __future__ import annotations

from rstguard.engine.address import parse_prefix
from rstguard.engine.verdict import Reason
from rstguard.replay.hits import Hits


def test_what_has_no_record_is_counted() -> None:
    hits = Hits(most=2)
    told: list[tuple[str, int]] = []
    hits.tell = lambda hit, now: told.append((str(hit.subject), now))
    for now in range(8):
        source = parse_prefix(f"192.0.2.{now % 4}")
        hit = hits.add("ban" if now == 7 else "drop", source, "it", Reason.SYN_RATE, now)
        hits.lost(hit, packets=1, connections=now % 2)
    assert [(str(hit.subject), hit.times, hit.packets) for hit in hits] == [
        ("192.0.2.0", 2, 2),
        ("192.0.2.1", 2, 2),
    ]
    total = hits.totals["it"]
    assert (total.times, total.packets, total.connections) == ({"drop": 7, "ban": 1}, 8, 4)
    assert total.subjects == {"drop": 2}
    assert hits.left_out == 4
    # The first time of each that has a record, and every ban.
    assert told == [("192.0.2.0", 0), ("192.0.2.1", 1), ("192.0.2.3", 7)]


def test_the_same_hit_again_has_the_last_time() -> None:
    hits = Hits()
    source = parse_prefix("192.0.2.0/24")
    for now in (5, 9):
        hit = hits.add("shun", source, "it", Reason.SYN_RATE, now)
    assert (hit.first, hit.last, hit.times) == (5, 9, 2)
    assert len(hits) == 1
