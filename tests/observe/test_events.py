"""Events: numbered, counted, written in full to files and journal, and never a flood."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest

from rstguard.engine.verdict import Reason
from rstguard.observe.events import FIELDS, KINDS, Event, EventLog, reference, sentence
from rstguard.observe.sinks import Journal, JsonLines
from rstguard.observe.text import plain

ROOT = Path(__file__).parent.parent.parent
BAN = Event("ban", "198.51.100.7", "syn-rate", Reason.SYN_RATE, "for 600 s")


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_has_every_field_and_no_other(tmp_path: Path) -> None:
    events = EventLog(Clock())
    events.sinks.append(JsonLines(tmp_path / "events.jsonl"))
    events.add(BAN)
    events.close()
    (record,) = lines(tmp_path / "events.jsonl")
    assert list(record) == list(FIELDS)
    assert record["number"] == 1
    assert record["reason"] == "syn_rate"
    assert record["why"] == Reason.SYN_RATE.value


EVIL = "a\x1b]52;c;ZXZpbA==\x07b\r\nc\x07d\x9b31me\u202ef\x00g\x85h\x1b[31m"


def test_what_others_supplied_is_plain_wherever_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    events = EventLog(Clock())
    events.sinks.append(JsonLines(tmp_path / "events.jsonl"))
    events.add(Event("policy", EVIL, detail=f"confirmed by root ({EVIL})"))
    events.close()
    (record,) = [*lines(tmp_path / "events.jsonl")]
    assert str(record["subject"]).isprintable()
    assert str(record["detail"]).isprintable()
    assert record["detail"] == f"confirmed by root ({plain(EVIL)})"
    assert all(message.isprintable() for message in caplog.messages)
    assert sentence(record | {"rule": EVIL, "why": "x" * 10_000}).isprintable()


def test_a_file_may_be_rotated_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = EventLog(Clock())
    events.sinks.append(JsonLines(path))
    events.add(BAN)
    path.rename(tmp_path / "old")
    events.add(BAN)
    path.unlink()
    events.add(BAN)
    events.close()
    assert [row["number"] for row in lines(tmp_path / "old")] == [1]
    assert [row["number"] for row in lines(path)] == [3]


def test_a_full_disk_loses_events_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    events = EventLog(Clock())
    events.sinks.append(JsonLines(Path("/dev/full")))
    for _ in range(3):
        events.add(BAN)
    events.close()
    said = [record.message for record in caplog.records if "events are lost" in record.message]
    assert len(said) == 1
    assert "No space left" in said[0]


def test_a_flood_is_summed_up(tmp_path: Path) -> None:
    clock = Clock()
    events = EventLog(clock)
    events.sinks.append(JsonLines(tmp_path / "events.jsonl"))
    for _ in range(800):
        events.add(BAN)
    clock.now += 1
    events.add(BAN)
    events.close()
    written = lines(tmp_path / "events.jsonl")
    assert len(written) == 502
    assert (written[500]["kind"], written[500]["subject"]) == ("left_out", "300")
    assert events.counts["ban"]["syn-rate"] == 801


def test_what_was_left_out_is_told_though_nothing_more_happens(tmp_path: Path) -> None:
    clock = Clock()
    events = EventLog(clock)
    events.sinks.append(JsonLines(tmp_path / "events.jsonl"))
    for _ in range(503):
        events.add(BAN)
    events.tick()
    assert len(lines(tmp_path / "events.jsonl")) == 500
    clock.now += 1
    events.tick()
    events.tick()
    events.close()
    (left_out,) = lines(tmp_path / "events.jsonl")[500:]
    assert (left_out["kind"], left_out["subject"]) == ("left_out", "3")


def test_a_pipe_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        JsonLines(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    sink = JsonLines(tmp_path / "pipe")
    for number in range(5000):
        sink.write({"number": number}, "")
    os.close(reader)
    sink.close()


def test_a_line_that_was_cut_by_a_full_disk_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = JsonLines(tmp_path / "events.jsonl")
    real = os.write
    sink.write({"number": 1}, "")
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, line: real(file, line[:5]))
        sink.write({"number": 2}, "")
    sink.write({"number": 3}, "")
    sink.close()
    rows = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [rows[0], rows[2]] == ['{"number":1}', '{"number":3}']


def test_what_came_after_a_number() -> None:
    events = EventLog(Clock())
    for _ in range(5):
        events.add(BAN)
    assert [row["number"] for row in events.after(3, 10)] == [4, 5]
    assert [row["number"] for row in events.after(0, 2)] == [1, 2]
    assert events.after(5, 10) == []
    # Of an earlier guard: this one has begun to count anew.
    assert [row["number"] for row in events.after(99, 10)] == [1, 2, 3, 4, 5]


def test_the_journal_gets_fields(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        events = EventLog(Clock())
        events.sinks.append(Journal(path))
        events.add(BAN)
        events.sinks[0].write({"kind": "capped", "detail": "two\nlines"}, "one")
        first, second = journal.recv(4096), journal.recv(4096)
        events.close()
    assert b"MESSAGE=ban 198.51.100.7 by rule syn-rate" in first
    assert b"PRIORITY=6\n" in first
    assert b"RSTGUARD_RULE=syn-rate\n" in first
    assert b"PRIORITY=4\n" in second
    assert b"RSTGUARD_DETAIL\n\x09\0\0\0\0\0\0\0two\nlines\n" in second


def test_a_busy_journal_loses_events_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        sink = Journal(path)
        written = 0
        while not sink.lost:
            sink.write({"kind": "ban"}, "one")
            written += 1
        for _ in range(written - 1):
            journal.recv(4096)
        sink.write({"kind": "ban"}, "one")
        sink.close()
    assert sink.lost == 0
    assert "1 events did not get into it" in caplog.text


def test_without_a_journal() -> None:
    with pytest.raises(OSError, match="No such file"):
        Journal("/nonexistent/journal")


def test_every_kind_in_the_code_is_in_the_table() -> None:
    used = set()
    for path in (ROOT / "rstguard").rglob("*.py"):
        used |= set(re.findall(r'Event\(\s*"(\w+)"', path.read_text()))
    assert used <= set(KINDS)


def test_the_reference_is_current() -> None:
    path = ROOT / "docs" / "events.md"
    head = "# Events\n\n"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(path.read_text().partition("| kind |")[0] + reference())
    text = path.read_text()
    assert text.startswith(head)
    assert text.endswith(reference())
