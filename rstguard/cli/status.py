"""What ``rstguard status`` says to people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rstguard.observe.events import sentence

Status = dict[str, Any]

_MOST_PROBLEMS = 8
_MOST_PRESSED = 10
_MOST_EVENTS = 10
_QUIET_SECONDS = 60
"""A large source is told of every ten seconds; one that is silent for longer than this is away."""


def lines(data: Status) -> Iterator[str]:
    """Yield the lines that tell how a guard is."""
    policy = data["policy"]
    mark = data["state"] if data["filtering"] else data["state"].upper()
    yield f"{mark}, policy {policy['name']} ({policy['mode']}), up {data['uptime_s']:.0f} s"
    yield from _warnings(data)
    yield from _processes(data)
    blocked = data["blocked"]
    yield f"  blocked now: {blocked['ban']} banned, {blocked['shun']} shunned"
    yield from _shun(data["shun"], data["syn_budget"] is None)
    yield from _pressure(data["pressure"])
    yield from _large(data["large_sources"])
    yield from _untracked(data["untracked"])
    yield from _forgotten(data["forgotten"])
    yield from _limited(data["limited"])
    yield from _foreign(data["foreign_marks"])
    yield from _budget(data["syn_budget"])
    yield from (f"  {sentence(event)}" for event in data["recent"][-_MOST_EVENTS:])


def _warnings(data: Status) -> Iterator[str]:
    confirm = data["policy"]["confirm_s"]
    if confirm is not None:
        unless = "unless you run `rstguard policy confirm`"
        yield f"  NOT CONFIRMED: rolls back in {confirm:.0f} s {unless}"
    if data["panic"]:
        yield "  PANIC: all traffic passes; `rstguard panic --end` ends it"
    problems = data["problems"][data["panic"] :]
    yield from (f"  {problem}" for problem in problems[:_MOST_PROBLEMS])
    if len(problems) > _MOST_PROBLEMS:
        yield f"  and {len(problems) - _MOST_PROBLEMS} more"


def _processes(data: Status) -> Iterator[str]:
    for worker in data["workers"]:
        yield (
            f"  worker {worker['pid']}: {worker['packets']} packets, {worker['waiting']} waiting, "
            f"{worker['overrun']} overrun, {worker['restarts']} restarts"
        )
        if worker["overload"]:
            yield f"    overloaded: {worker['shed']}"
    sweeper, flows = data["sweeper"], data["counts"].get("flows", 0)
    period = data["counts"].get("sweep_period_ms", 0)
    often = f", one every {period / 1000:g} s" if period else ""
    yield (
        f"  sweeper {sweeper['pid']}: {flows} connections at the last sweep{often}, "
        f"{sweeper['restarts']} restarts"
    )
    if asker := data["asker"]:
        yield f"  asker {asker['pid']}: {_weighed(data['counts'])}, {asker['restarts']} restarts"
    if learning := data["learning"]:
        left = f"{learning['left_s']:.0f} s to go" if learning["left_s"] else "done"
        yield (
            f"  learning limits: {learning['productive']} productive sources in "
            f"{learning['seconds']:.0f} s, {left}; take them with `rstguard policy learn --live`"
        )


def _weighed(counts: Status) -> str:
    """Tell what became of the RSTs that were asked for."""
    kinds = ("held", "forged", "honest", "unconfirmed")
    held, *rest = (f"{counts.get(f'{kind}_resets', 0)} {kind}" for kind in kinds)
    return f"{held} RSTs, {', '.join(rest)}"


def _shun(shun: Status, counts: bool) -> Iterator[str]:
    """Tell what becomes of shunned sources; `counts` if they are of no SYN budget as well."""
    if shun["answer"] == "challenge":
        known, cookies = len(shun["services"]), shun["cookies"]
        services = "one service" if known == 1 else f"{known} services"
        count = f": {cookies['sent']} cookies sent, {cookies['accepted']} came back"
        yield (
            f"  shunned sources are challenged at the {services} whose offers are known"
            f"{count if counts else ''}"
        )
    elif shun["why_not"]:
        yield f"  shunned sources are blocked, not challenged: {shun['why_not']}"
    if shun["why_no_dnat"]:
        yield f"  services behind DNAT get no SYN cookies: {shun['why_no_dnat']}"


def fullest(services: list[Status]) -> list[Status]:
    """Return services in distress, the fullest first."""
    return sorted(services, key=lambda row: -row["connections"] / max(row["end"], 1))


def _pressure(services: list[Status]) -> Iterator[str]:
    """Tell of the services that are in distress, if there are any."""
    pressed = fullest(services)
    for row in pressed[:_MOST_PRESSED]:
        yield (
            f"  PRESSED for {row['pressed_s']:.0f} s: {row['service']}, {row['connections']} "
            f"connections; patience shrinks from {row['start']} on, to nothing at {row['end']}"
        )
    if rest := pressed[_MOST_PRESSED:]:
        yield f"  and {len(rest)} more services that are pressed"


def _large(sources: list[Status]) -> Iterator[str]:
    """Name the sources that carry a large share of all connections, and say what to do."""
    for row in sources:
        quiet = row["quiet_s"]
        before = f"; its large share was {quiet} s ago" if quiet > _QUIET_SECONDS else ""
        yield (
            f"  LARGE for {row['since_s']} s: {row['source']}, {row['percent']}% of all proven "
            f"connections ({row['connections']}); {_spared(row)}{before}"
        )
    if sources:
        yield (
            "    a proxy, load balancer or health checker: `trusted:`, or `except:` of rules; "
            "one like any other: `large_sources: {ordinary: [...]}`"
        )


def _spared(row: Status) -> str:
    if not row["may_hold"]:
        return "rules hit it as any other"
    return f"it may hold {row['may_hold']} while services are well, until you say what it is"


def _untracked(data: Status) -> Iterator[str]:
    """Tell what was dropped before the tracker, if there was any."""
    if data["low_ttl"]:
        yield f"  TTL below {data['least_ttl']}: {data['low_ttl']} segments dropped"
    if not data["spoofed"] + data["spoofed_passed"]:
        return
    left = data["drops_spoofed_in_s"]
    then = f"; dropped from {left:.0f} s on" if left is not None else ""
    yield (
        f"  from outside in the name of inside addresses: {data['spoofed']} segments dropped, "
        f"{data['spoofed_passed']} only counted{then}"
    )


def _forgotten(data: Status) -> Iterator[str]:
    """Tell what the tracker did not know any more, if there was any."""
    if data["adopted"]:
        yield (
            f"  forgotten by the connection tracker and taken up again: {data['adopted']} "
            "connections, whose age and window scale are not known"
        )
    if data["dropped"]:
        count = f"{data['dropped']} segments of no connection"
        yield f"  beyond what all sources together may send: {count} dropped"


def _limited(data: Status) -> Iterator[str]:
    """Tell what the kernel dropped in front of the queue, if there was any."""
    if any(data.values()):
        counts = ", ".join(f"{name} {count}" for name, count in data.items() if count)
        yield f"  beyond a rule, dropped in front of the queue: {counts}"


def _foreign(data: Status) -> Iterator[str]:
    """Tell what other programs do with the guard's bits of marks, if they do anything."""
    yield from (f"  MARKS: {problem}" for problem in data["problems"])
    if data["cleared"] + data["spared"]:
        yield (
            f"  mark bits of others: taken off {data['cleared']} packets; {data['spared']} segments"
            " went on though such a mark says that their connection is condemned"
        )


def _budget(budget: Status | None) -> Iterator[str]:
    if budget is None:
        return
    cookies = budget["cookies"]
    yield (
        f"  SYN budget {budget['limit']}: {cookies['sent']} cookies sent, "
        f"{cookies['accepted']} came back"
    )
    if budget["why_not"]:
        yield f"    no SYN cookies are given out: {budget['why_not']}"
    for service in budget["services"]:
        over, offers = service["engaged_s"], service["offers"]
        state = "within budget" if over is None else f"SYN cookies for {over:.0f} s"
        scale = f", wscale {offers['scale']}" if offers["scale"] >= 0 else ""
        to = f", translated to {' or '.join(offers['to'])}" if offers["to"] else ""
        state += waiting(service)
        yield f"    {service['service']}: {state} (mss {offers['mss']}{scale}{to})"


def waiting(service: Status) -> str:
    """Return what to say of the handshakes of a service that are open, "" if nobody counts them."""
    row = service["half_open"]
    if row is None:
        return ""
    beside = f", {row['beside']} beside" if row["beside"] else ""
    shared = ", with other services" if row["shared"] else ""
    return f", {row['open']} of {row['most']} handshakes open{beside}{shared}"
