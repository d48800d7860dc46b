"""Events: one line for each thing the guard did, and why."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rstguard.engine.verdict import Reason

log = logging.getLogger("rstguard.events")

_KEPT = 256
_LINES_A_SECOND = 20


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    `kind` is ban, unban, shun, reset, observed, kill, not_killed, policy, start, stop, restart,
    cookies_on, cookies_off (a service goes over its SYN budget, and has been below it for some
    seconds), learned (what a service offers in its SYN-ACKs) or overload (what a worker leaves
    undone).
    `subject` is the source or connection concerned; `enforced` False tells that the policy only
    observes.
    """

    kind: str
    subject: str
    rule: str = ""
    reason: Reason | None = None
    detail: str = ""
    enforced: bool = True

    @property
    def text(self) -> str:
        """The event as a line for people."""
        would = "" if self.enforced else "would "
        rule = f" by rule {self.rule}" if self.rule else ""
        why = f": {self.reason.value}" if self.reason else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{would}{self.kind.replace('_', ' ')} {self.subject}{rule}{detail}{why}"


def reasons_table() -> str:
    """Return the table of reasons in Markdown, as the README shows it."""
    rows = [f"| `{reason.code}` | {reason.value} |" for reason in Reason]
    return "\n".join(["| reason | meaning |", "|---|---|", *rows, ""])


class EventLog:
    """Keeps the latest events, counts all, and logs them without flooding the log."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Use `clock` (seconds since 1970) to stamp events."""
        self._clock = clock
        self._recent: deque[dict[str, object]] = deque(maxlen=_KEPT)
        self.counts: dict[str, Counter[str]] = {}
        self.resets: Counter[tuple[str, str | None]] = Counter()
        """Resets by rule and reason."""
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def add(self, event: Event) -> None:
        """Count and keep an event; log it unless the log is flooded, then say how many were not."""
        now = self._clock()
        self.counts.setdefault(event.kind, Counter())[event.rule or event.kind] += 1
        record = asdict(event) | {
            "time": round(now, 3),
            "reason": event.reason.code if event.reason else None,
            "why": event.reason.value if event.reason else None,
        }
        self._recent.append(record)
        if event.kind == "reset":
            self.resets[event.rule, event.reason.code if event.reason else None] += 1
        if int(now) != self._second:
            if self._left_out:
                log.info("%d more events in the last second were not logged", self._left_out)
            self._second, self._lines, self._left_out = int(now), 0, 0
        self._lines += 1
        if self._lines <= _LINES_A_SECOND:
            log.info("%s", event.text)
        else:
            self._left_out += 1

    def recent(self, most: int) -> list[dict[str, object]]:
        """Return the latest events, oldest first."""
        return list(self._recent)[-most:]
