"""The metrics: one table, a valid exposition, and a reference and dashboard that fit it.

After a change that is meant: GOLDEN=write pytest tests/observe/test_metrics.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rstguard.observe.metrics import TABLE, exposition, metrics_table
from tests.support import dashboard

DOCS = Path(__file__).parent.parent.parent / "docs"
REFERENCE = """# Metrics

`rstguard run --http 127.0.0.1:9788` serves them at `/metrics`. docs/grafana-rstguard.json is a
Grafana dashboard that shows them.

"""
SNAPSHOT: dict[str, Any] = {
    "state": "degraded",
    "filtering": False,
    "sysctls": {"net.netfilter.nf_conntrack_acct": False},
    "panic": False,
    "capped": ["hoarder"],
    "version": "1.2.3",
    "uptime_s": 12.5,
    "policy": {"name": 'a "quoted"\nname', "mode": "enforce"},
    "workers": [
        {"queue": 5640, "packets": 7, "waiting": None, "overload": 0, "overrun": 2, "restarts": 1},
        {"queue": 5641, "packets": 9, "waiting": 3, "overload": 2, "overrun": 0, "restarts": 0},
    ],
    "sweeper": {"restarts": 4},
    "asker": {"restarts": 5},
    "blocked": {"ban": 2, "shun": 1},
    "shun": {
        "answer": "challenge", "services": [], "why_not": "", "why_no_dnat": "", "cookies": {},
    },
    "untracked": {"low_ttl": 7, "spoofed": 3, "spoofed_passed": 2},
    "forgotten": {"adopted": 4, "dropped": 9},
    "limited": {"out_of_state": 6, "bad_flags": 2, "reset_rate": 0},
    "foreign_marks": {"problems": [], "cleared": 4, "spared": 5},
    "large_sources": [
        {"source": "203.0.113.9", "percent": 61, "connections": 1234, "bore": 1000,
         "may_hold": 2000, "since_s": 1500, "quiet_s": 5},
    ],
    "pressure": [
        {"service": "10.0.0.1:80", "pressed_s": 3.0, "connections": 700, "start": 384, "end": 729},
    ],
    "syn_budget": {
        "half_open": 128,
        "cookies": {"sent": 30, "accepted": 20, "refused": 1, "late": 5},
        "services": [
            {"service": "10.0.0.1:80", "engaged_s": 3.5,
             "half_open": {"open": 127, "beside": 3, "most": 128, "shared": False}},
            {"service": "10.0.0.1:443", "engaged_s": None, "half_open": None},
        ],
    },
    "counts": {
        "ban": {"rate": 6}, "start": {"start": 1}, "verdict.drop": 11, "rule.rate": 12,
        "flows": 100, "unconfirmed": 3, "block_failed": 2, "sweep_cpu_us": 1_500_000,
        "sweep_period_ms": 4500, "counting_cpu_us": 250_000, "watched": 7, "uncounted": 1,
    },
    "resets": [{"rule": "idle", "reason": "idle", "count": 8}],
}  # fmt: skip


def samples(data: dict[str, Any]) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(exposition(data).decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("build_info", ("enforce", 'a "quoted"\nname', "1.2.3"), 1),
        ("filtering", (), 0),
        ("condition", (), 1),
        ("sysctl_in_place", ("net.netfilter.nf_conntrack_acct",), 0),
        ("panic", (), 0),
        ("capped_rules", ("hoarder",), 1),
        ("uptime_seconds", (), 12.5),
        ("packets_total", ("5641",), 9),
        ("queue_waiting_packets", ("5641",), 3),
        ("queue_overrun_total", ("5640",), 2),
        ("worker_overload_level", ("5641",), 2),
        ("process_restarts_total", ("worker (queue 5640)",), 1),
        ("process_restarts_total", ("sweeper",), 4),
        ("process_restarts_total", ("asker",), 5),
        ("verdicts_total", ("drop",), 11),
        ("rule_hits_total", ("rate",), 12),
        ("events_total", ("ban", "rate"), 6),
        ("events_total", ("start", ""), 1),
        ("resets_total", ("idle", "idle"), 8),
        ("kills_total", ("confirmed",), 0),
        ("kills_total", ("unconfirmed",), 3),
        ("failures_total", ("block_failed",), 2),
        ("blocked_sources", ("shun",), 1),
        ("connections", (), 100),
        ("sweep_cpu_seconds_total", (), 1.5),
        ("sweep_period_seconds", (), 4.5),
        ("counting_cpu_seconds_total", (), 0.25),
        ("counted_keys", (), 7),
        ("counting_incomplete", ("uncounted",), 1),
        ("counting_incomplete", ("cannot_count",), 0),
        ("pressed_connections", ("10.0.0.1:80",), 700),
        ("syn_budget_engaged", ("10.0.0.1:80",), 1),
        ("syn_budget_engaged", ("10.0.0.1:443",), 0),
        ("half_open_handshakes", ("open", "10.0.0.1:80"), 127),
        ("half_open_handshakes", ("beside", "10.0.0.1:80"), 3),
        ("half_open_limit", ("10.0.0.1:80",), 128),
        ("syn_cookies_total", ("late",), 5),
    ],
)
def test_a_snapshot_comes_out_whole(name: str, labels: tuple[str, ...], value: float) -> None:
    assert samples(SNAPSHOT)["rstguard_" + name, labels] == value


def test_what_is_not_known_is_left_out() -> None:
    found = samples(SNAPSHOT | {"syn_budget": None})
    assert ("rstguard_queue_waiting_packets", ("5640",)) not in found
    assert not any(name.startswith(("rstguard_syn_", "rstguard_half_")) for name, _ in found)
    assert ("rstguard_half_open_handshakes", ("open", "10.0.0.1:443")) not in samples(SNAPSHOT)


def test_names_follow_the_conventions() -> None:
    for row in TABLE:
        assert re.fullmatch(r"rstguard_[a-z_]+", row.name)
        assert row.name.endswith("_total") == (row.kind == "counter")
        assert row.help.endswith(".")
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_the_reference_is_current() -> None:
    file = DOCS / "metrics.md"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(REFERENCE + metrics_table())
    assert file.read_text() == REFERENCE + metrics_table()


def test_the_dashboard_asks_only_for_what_exists() -> None:
    labels = {row.name: {*row.labels, "instance"} for row in TABLE}
    asked = dashboard.asked()
    assert len(asked) > 15
    for expression, legend in asked:
        found = dashboard.selectors(expression)
        assert found, expression
        for name, _ in found:
            assert name in labels, f"there is no metric {name}"
        known = set.intersection(*(labels[name] for name, _ in found))
        assert {label for _, wanted in found for label in wanted} <= known, expression
        assert set(re.findall(r"{{(\w+)}}", legend)) <= known, legend
        for grouped in re.findall(r" by \(([^)]*)\)", expression):
            assert set(grouped.split(", ")) <= known, expression
        # A metric that is shown otherwise than as it is must be a counter, and the other way round.
        counted = bool(re.search(r"\b(rate|increase)\(", expression))
        assert all(name.endswith("_total") == counted for name, _ in found), expression
