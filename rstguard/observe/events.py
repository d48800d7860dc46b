"""Events: one record for each thing the guard did, and why."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rstguard.engine.verdict import Reason
from rstguard.observe.sinks import Sink
from rstguard.observe.text import LONGEST, plain

log = logging.getLogger("rstguard.events")

_KEPT = 4096
_LINES_A_SECOND = 20
_RECORDS_A_SECOND = 500

KINDS = MappingProxyType(
    {
        "start": "the guard began to filter",
        "stop": "the guard was told to stop",
        "policy": "another policy is in force, or one was confirmed",
        "ban": "a source was banned",
        "import": "a list of bans was imported",
        "unban": "an administrator lifted a ban",
        "shun": "a source was shunned (challenged, or kept out): what crossed the limit may have "
        "been forged in its name",
        "reset": "a connection was condemned, or a SYN refused",
        "forged_reset": "a RST was forged: the end that it names was asked, and did not send it",
        "observed": "a rule that only observes was hit",
        "kill": "an administrator ended connections",
        "not_killed": "a condemned connection was not seen to die",
        "restart": "a process of the guard died or could not start, and why; it is started again",
        "overload": "a worker sheds more, or less, load",
        "cookies_on": "a service is over its SYN budget: the kernel answers with SYN cookies",
        "cookies_off": "a service has been within its SYN budget for some seconds",
        "learned": "a service offers something new in its SYN-ACKs",
        "restored": "rules, sets or sysctls that another program had removed, passed over or "
        "changed were put back",
        "conflict": "another program removes or changes them again and again",
        "sysctl": "the start has given a sysctl another value, until the guard ends",
        "process": "a process of the guard starts, serves, failed at the start, or has stopped",
        "capped": "a rule banned in too many networks in a minute, and shuns instead for a while",
        "rearmed": "a rule that was capped bans again",
        "gated": "so many sources of a network are banned that its other SYNs are dropped as well",
        "low_ttl": "segments that would not have reached their server begin to be dropped",
        "strays": "more segments of no connection come than all sources together may send: the "
        "rest is dropped",
        "limited": "segments beyond a rule begin to be dropped in front of the queue: of no "
        "connection, with impossible flags, or RSTs",
        "adopted": "the connection tracker had forgotten connections whose servers go on: they are "
        "taken up again",
        "spoofed": "segments begin to come from outside in the name of an address that answers "
        "from inside: counted, then dropped",
        "foreign_marks": "another program uses mark bits of the guard's",
        "one_sided": "of a service only one side is seen, or no more: its answers pass elsewhere",
        "unseen": "a protected interface or destination is such that the rules do not see its "
        "traffic",
        "large_source": "a source carries a large share of all proven connections, as a proxy does",
        "pressed": "a service is in distress: what makes no progress at it has ever less time",
        "calm": "a service is in distress no more",
        "table_full": "the connection table is or was full, so that connections were dropped",
        "panic": "all traffic passes on an administrator's word, or no longer",
        "left_out": "events of the last second that were not written, by their number",
    }
)
"""Every kind of event, and what it tells; the reference is made of this table."""

FIELDS = MappingProxyType(
    {
        "number": "counts up by one with each event since the guard started",
        "time": "seconds since 1970, to the millisecond",
        "kind": "one of the kinds above",
        "subject": "the source, connection, service or process concerned",
        "rule": 'the rule that was hit, `manual` for an administrator, or ""',
        "reason": "the reason's code, or null",
        "why": "the reason in words, or null",
        "detail": "more in words",
        "enforced": "false if the policy only observes: it would have been done",
    }
)
"""Every field of an event's record."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    `kind` is one of `KINDS`; `subject` is the source or connection concerned; `enforced` False
    tells that the policy only observes.
    """

    kind: str
    subject: str
    rule: str = ""
    reason: Reason | None = None
    detail: str = ""
    enforced: bool = True

    def record(self, number: int, now: float) -> dict[str, object]:
        """Return the event as data, with all of `FIELDS`; what others supplied is made plain."""
        reason = self.reason
        return {
            "number": number,
            "time": round(now, 3),
            "kind": self.kind,
            "subject": plain(self.subject),
            "rule": self.rule,
            "reason": reason.code if reason else None,
            "why": reason.value if reason else None,
            "detail": plain(self.detail),
            "enforced": self.enforced,
        }


def sentence(record: Mapping[str, object]) -> str:
    """Return an event's record as a line for people, without its time.

    This is how the log, the journal, `rstguard events`, `status`, `top` and the page all say it.
    """
    would = "" if record["enforced"] else "would "
    kind = str(record["kind"]).replace("_", " ")
    rule = f" by rule {record['rule']}" if record["rule"] else ""
    detail = f" ({record['detail']})" if record["detail"] else ""
    why = f": {record['why']}" if record["why"] else ""
    return plain(f"{would}{kind} {record['subject']}{rule}{detail}{why}", 4 * LONGEST)


def reasons_table() -> str:
    """Return the table of reasons in Markdown, as docs/how-it-works.md shows it."""
    rows = [f"| `{reason.code}` | {reason.value} |" for reason in Reason]
    return "\n".join(["| reason | meaning |", "|---|---|", *rows, ""])


def reference() -> str:
    """Return the reference of events in Markdown."""
    kinds = [f"| `{kind}` | {meaning} |" for kind, meaning in KINDS.items()]
    fields = [f"| `{name}` | {meaning} |" for name, meaning in FIELDS.items()]
    head = ["| kind | meaning |", "|---|---|", *kinds, ""]
    return "\n".join([*head, "| field | meaning |", "|---|---|", *fields, ""])


class EventLog:
    """Keeps the latest events, counts all, and passes them on without flooding anybody."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Use `clock` (seconds since 1970) to stamp events."""
        self._clock = clock
        self._recent: deque[dict[str, object]] = deque(maxlen=_KEPT)
        self.counts: dict[str, Counter[str]] = {}
        self.sinks: list[Sink] = []
        self.resets: Counter[tuple[str, str | None]] = Counter()
        """Resets by rule and reason."""
        self._number = 0
        self._second = 0
        self._in_second = 0

    def add(self, event: Event) -> None:
        """Count and keep an event; write it unless there are too many, and then say how many."""
        now = self._clock()
        self.counts.setdefault(event.kind, Counter())[event.rule or event.kind] += 1
        if int(now) != self._second:
            self._next_second(int(now))
        self._in_second += 1
        record = self._keep(event, now)
        if self._in_second <= _LINES_A_SECOND:
            log.info("%s", sentence(record))
        if self._in_second <= _RECORDS_A_SECOND:
            self._write(record)

    def tick(self) -> None:
        """Tell what was left out, also if nothing more happens; call it once a second."""
        now = int(self._clock())
        if now != self._second:
            self._next_second(now)

    def _keep(self, event: Event, now: float) -> dict[str, object]:
        self._number += 1
        record = event.record(self._number, now)
        self._recent.append(record)
        if event.kind == "reset":
            self.resets[event.rule, event.reason.code if event.reason else None] += 1
        return record

    def _next_second(self, second: int) -> None:
        unlogged = self._in_second - _LINES_A_SECOND
        if unlogged > 0:
            log.info("%d more events in the last second were not logged", unlogged)
        unwritten = self._in_second - _RECORDS_A_SECOND
        self._second, self._in_second = second, 0
        if unwritten > 0:
            event = Event("left_out", str(unwritten), detail="more than 500 in a second")
            self._write(self._keep(event, float(second)))

    def _write(self, record: dict[str, object]) -> None:
        if self.sinks:
            text = sentence(record)
            for sink in self.sinks:
                sink.write(record, text)

    def recent(self, most: int) -> list[dict[str, object]]:
        """Return the latest events, oldest first."""
        return list(self._recent)[-most:]

    def after(self, number: int, most: int) -> list[dict[str, object]]:
        """Return at most `most` events that came after the one of this number, oldest first.

        A number that was not reached yet is one of an earlier guard: all events came after it.
        """
        missing = self._number - (number if number <= self._number else 0)
        return list(self._recent)[-missing:][:most] if missing > 0 else []

    def close(self) -> None:
        """Close all sinks."""
        for sink in self.sinks:
            sink.close()
        self.sinks.clear()
