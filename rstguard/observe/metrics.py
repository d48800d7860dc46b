"""Prometheus metrics: one table, from which the exposition and the reference derive.

Everything is read from a snapshot, what `rstguard status --json` prints, so that the page, the
commands and the metrics can never disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Snapshot = Mapping[str, Any]
"""The data that the control socket answers to `status`."""
Sample = tuple[tuple[str, ...], float]
"""The values of the labels, and the value."""

CONDITIONS = ("not filtering", "degraded", "filtering")
"""What `state` can be in a snapshot, the worst first."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Row:
    """One metric; `read` takes its samples from a snapshot."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    read: Callable[[Snapshot], Iterable[Sample]]


def _one(value: Callable[[Snapshot], float]) -> Callable[[Snapshot], Iterable[Sample]]:
    return lambda data: [((), float(value(data)))]


def _each_worker(key: str) -> Callable[[Snapshot], Iterable[Sample]]:
    """Read a value of each worker; what is not known while a queue has no reader is left out."""
    return lambda data: [
        ((str(worker["queue"]),), float(worker[key]))
        for worker in data["workers"]
        if worker[key] is not None
    ]


def _counted(prefix: str) -> Callable[[Snapshot], Iterable[Sample]]:
    """Read the counts whose names begin so, the rest of the name being the label."""
    return lambda data: [
        ((name.removeprefix(prefix),), float(count))
        for name, count in data["counts"].items()
        if name.startswith(prefix)
    ]


def _count(name: str) -> Callable[[Snapshot], Iterable[Sample]]:
    return _one(lambda data: data["counts"].get(name, 0))


def _named(*names: str) -> Callable[[Snapshot], Iterable[Sample]]:
    """Read these counts, the name being the label."""
    return lambda data: [((name,), float(data["counts"].get(name, 0))) for name in names]


def _restarts(data: Snapshot) -> Iterator[Sample]:
    for worker in data["workers"]:
        yield (f"worker (queue {worker['queue']})",), float(worker["restarts"])
    yield ("sweeper",), float(data["sweeper"]["restarts"])
    if data["asker"]:
        yield ("asker",), float(data["asker"]["restarts"])


def _events(data: Snapshot) -> Iterator[Sample]:
    for kind, by_rule in data["counts"].items():
        if isinstance(by_rule, dict):
            for rule, count in by_rule.items():
                yield (kind, "" if rule == kind else rule), float(count)


def _resets(data: Snapshot) -> Iterator[Sample]:
    for row in data["resets"]:
        yield (row["rule"], row["reason"] or ""), float(row["count"])


def _cookies(data: Snapshot) -> Iterator[Sample]:
    told = data["syn_budget"] or data["shun"]
    for outcome, count in told["cookies"].items():
        yield (outcome,), float(count)


def _untracked(data: Snapshot) -> Iterator[Sample]:
    for name in ("low_ttl", "spoofed", "spoofed_passed"):
        yield (name,), float(data["untracked"][name])


def _forgotten(data: Snapshot) -> Iterator[Sample]:
    for name, count in data["forgotten"].items():
        yield (name,), float(count)


def _limited(data: Snapshot) -> Iterator[Sample]:
    for name, count in data["limited"].items():
        yield (name,), float(count)


def _foreign(data: Snapshot) -> Iterator[Sample]:
    for name in ("cleared", "spared"):
        yield (name,), float(data["foreign_marks"][name])


def _services(data: Snapshot) -> Iterator[Sample]:
    if budget := data["syn_budget"]:
        for service in budget["services"]:
            yield (service["service"],), float(service["engaged_s"] is not None)


def _half_open(data: Snapshot) -> Iterator[Sample]:
    for service in (data["syn_budget"] or {"services": []})["services"]:
        if held := service["half_open"]:
            for kind in ("open", "beside"):
                yield (service["service"], kind), float(held[kind])


def _half_open_limit(data: Snapshot) -> Iterator[Sample]:
    for service in (data["syn_budget"] or {"services": []})["services"]:
        if held := service["half_open"]:
            yield (service["service"],), float(held["most"])


def _build(data: Snapshot) -> Iterator[Sample]:
    policy = data["policy"]
    yield (data["version"], policy["name"], policy["mode"]), 1.0


TABLE: tuple[Row, ...] = (
    Row("rstguard_build_info", "gauge", ("version", "policy", "mode"),
        "Always 1; the labels say which version guards by which policy.", _build),
    Row("rstguard_filtering", "gauge", (),
        "1 while the guard filters and lacks nothing, else 0.",
        _one(lambda data: data["filtering"])),
    Row("rstguard_condition", "gauge", (),
        "2 while the guard filters and lacks nothing, 1 while it is degraded, 0 while it does not "
        "filter; `rstguard status` names what is wrong.",
        _one(lambda data: CONDITIONS.index(data["state"]))),
    Row("rstguard_panic", "gauge", (),
        "1 while the panic switch lets all traffic pass.", _one(lambda data: data["panic"])),
    Row("rstguard_sysctl_in_place", "gauge", ("name",),
        "1 while a sysctl that the guard needs has its value, 0 from when another program has "
        "changed it until it is put back.",
        lambda data: [((name,), float(right)) for name, right in data["sysctls"].items()]),
    Row("rstguard_uptime_seconds", "gauge", (),
        "How long the guard has been running.", _one(lambda data: data["uptime_s"])),
    Row("rstguard_packets_total", "counter", ("queue",),
        "Packets that the worker of a queue has judged.", _each_worker("packets")),
    Row("rstguard_queue_waiting_packets", "gauge", ("queue",),
        "Packets that wait in a queue for their verdict.", _each_worker("waiting")),
    Row("rstguard_queue_overrun_total", "counter", ("queue",),
        "Packets that the kernel did not put into a queue, or lost from it, as it was full.",
        _each_worker("overrun")),
    Row("rstguard_worker_overload_level", "gauge", ("queue",),
        "How much load a worker sheds to keep up; 0 is none.", _each_worker("overload")),
    Row("rstguard_shed_total", "counter", (),
        "Packets that passed or were dropped unjudged because of overload.",
        _count("shed")),
    Row("rstguard_process_restarts_total", "counter", ("process",),
        "How often a process of the guard died and was started again.", _restarts),
    Row("rstguard_verdicts_total", "counter", ("verdict",),
        "Packets that hit a rule, by verdict; in observe mode the verdict is not carried out.",
        _counted("verdict.")),
    Row("rstguard_rule_hits_total", "counter", ("rule",),
        "How often a rule was the most severe that a packet or connection hit.",
        _counted("rule.")),
    Row("rstguard_events_total", "counter", ("kind", "rule"),
        "Events by kind and rule; in observe mode those that would have been are counted.",
        _events),
    Row("rstguard_resets_total", "counter", ("rule", "reason"),
        "Connections reset, by rule and reason; in observe mode those that would have been.",
        _resets),
    Row("rstguard_kills_total", "counter", ("outcome",),
        "Condemned connections by outcome: confirmed (seen to die) or unconfirmed.",
        _named("confirmed", "unconfirmed")),
    Row("rstguard_believed_resets_total", "counter", ("outcome",),
        "RSTs from outside that the gateway took and the server did not: outlived (the connection "
        "went on at its server, and was ended there), window_cured (it had only moved the window).",
        _named("outlived", "window_cured")),
    Row("rstguard_weighed_resets_total", "counter", ("outcome",),
        "RSTs of guarded connections whose sender was asked: held (all of them), forged (dropped), "
        "honest, unconfirmed (no answer) and crowded (no room to wait in), which passed; and lost "
        "(in a full queue, over a limit: only their connections were asked for).",
        lambda data: [
            ((outcome,), float(data["counts"].get(f"{outcome}_resets", 0)))
            for outcome in ("held", "forged", "honest", "unconfirmed", "crowded", "lost")
        ]),
    Row("rstguard_untracked_total", "counter", ("what",),
        "Segments that the rules before the connection tracker found: low_ttl (dropped: they would "
        "not have reached their server), spoofed (dropped: from outside, in the name of an address "
        "that answers from inside), spoofed_passed (the same, only counted).", _untracked),
    Row("rstguard_forgotten_total", "counter", ("what",),
        "What the connection tracker did not know any more: adopted (connections that were taken "
        "up again as their server spoke), dropped (segments of no connection beyond what all "
        "sources together may send).", _forgotten),
    Row("rstguard_limited_total", "counter", ("measure",),
        "Segments beyond a rule that the kernel dropped in front of the queue, whatever the load, "
        "by the rule's measure: out_of_state, bad_flags, reset_rate.", _limited),
    Row("rstguard_foreign_marks_total", "counter", ("what",),
        "Marks of other programs with bits of the guard's: cleared (packets that they were taken "
        "off), spared (segments that went on though such a mark condemns their connection).",
        _foreign),
    Row("rstguard_failures_total", "counter", ("what",),
        "What went wrong, and the log tells of: failed (a packet or a sweep could not be judged), "
        "block_failed (a ban or shun was not set), lost_reports (a process was not heard in time).",
        _named("failed", "block_failed", "lost_reports")),
    Row("rstguard_reports_left_out_total", "counter", (),
        "Reports of workers that were counted but not told one by one.",
        _count("reports_left_out")),
    Row("rstguard_capped_rules", "gauge", ("rule",),
        "1 for each rule that banned in too many networks in a minute and shuns instead.",
        lambda data: [((rule,), 1.0) for rule in data["capped"]]),
    Row("rstguard_blocked_sources", "gauge", ("kind",),
        "Sources blocked now, by kind: ban or shun.",
        lambda data: [((kind,), float(count)) for kind, count in data["blocked"].items()]),
    Row("rstguard_connections", "gauge", (),
        "Connections in the kernel's table at the last sweep.", _count("flows")),
    Row("rstguard_sweeps_total", "counter", (),
        "Sweeps through the kernel's connection table.", _count("sweeps")),
    Row("rstguard_sweep_cpu_seconds_total", "counter", (),
        "Processor time that sweeps took.",
        _one(lambda data: data["counts"].get("sweep_cpu_us", 0) / 1e6)),
    Row("rstguard_sweep_period_seconds", "gauge", (),
        "Time from one sweep to the next: `sweep_every`, or five times what the last one took of a"
        " core, if that is longer.",
        _one(lambda data: data["counts"].get("sweep_period_ms", 0) / 1e3)),
    Row("rstguard_counting_cpu_seconds_total", "counter", (),
        "Processor time that it took to count connections as they begin and end, between sweeps.",
        _one(lambda data: data["counts"].get("counting_cpu_us", 0) / 1e6)),
    Row("rstguard_counted_keys", "gauge", (),
        "Sources, prefixes and services so near a limit of `connections` that theirs are counted "
        "as they begin and end.", _count("watched")),
    Row("rstguard_counting_incomplete", "gauge", ("why",),
        "1 while limits of `connections` hold by the kernel's own count or by sweeps alone: "
        "uncounted (more began in the last minute than could be heard of), cannot_count (nothing "
        "can be heard of at all).", _named("uncounted", "cannot_count")),
    Row("rstguard_pressed_connections", "gauge", ("service",),
        "Live connections of each service that is in distress now.",
        lambda data: [((row["service"],), float(row["connections"])) for row in data["pressure"]]),
    Row("rstguard_large_source_connections", "gauge", ("source",),
        "Proven connections of each source that carries a large share of all, and of which nobody "
        "has said yet what it is.",
        lambda data: [
            ((row["source"],), float(row["connections"])) for row in data["large_sources"]
        ]),
    Row("rstguard_syn_budget_engaged", "gauge", ("service",),
        "1 while the kernel answers a service's SYNs with SYN cookies, else 0.", _services),
    Row("rstguard_half_open_handshakes", "gauge", ("service", "kind"),
        "Handshakes of a service that wait for their client: open (counted for `half_open`), beside"
        " (of sources proven lately). Services beyond the first 64 of an address family are counted"
        " together, and each shows what all of them have.", _half_open),
    Row("rstguard_half_open_limit", "gauge", ("service",),
        "How many open handshakes of a service have the kernel answer its SYNs with SYN cookies:"
        " `half_open`, or half of it if it answers at the same port in both address families.",
        _half_open_limit),
    Row("rstguard_syn_cookies_total", "counter", ("outcome",),
        "SYN cookies by outcome: sent, accepted, refused, or late (too late to go on).", _cookies),
)  # fmt: skip
"""All metrics, in the order in which they are shown."""


class _Snapshots(Collector):
    """Turns one snapshot into metric families."""

    def __init__(self, data: Snapshot) -> None:
        self._data = data

    def collect(self) -> Iterator[Metric]:
        for row in TABLE:
            family = (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(
                row.name, row.help, labels=row.labels
            )
            for labels, value in row.read(self._data):
                family.add_metric(labels, value)
            yield family


def exposition(data: Snapshot) -> bytes:
    """Return a snapshot in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(data))
    return generate_latest(registry)


def metrics_table() -> str:
    """Return the table of metrics in Markdown, as docs/metrics.md shows it."""
    rows = [
        f"| `{row.name}` | {row.kind} | {', '.join(row.labels)} | {row.help} |" for row in TABLE
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows, ""])
