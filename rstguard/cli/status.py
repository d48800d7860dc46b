"""What ``rstguard status`` says to people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rstguard.observe.events import sentence

Status = dict[str, Any]

_MOST_PROBLEMS = 8
_MOST_EVENTS = 10


def lines(data: Status) -> Iterator[str]:
    """Yield the lines that tell how a guard is."""
    policy = data["policy"]
    mark = data["state"] if data["filtering"] else data["state"].upper()
    yield f"{mark}, policy {policy['name']} ({policy['mode']}), up {data['uptime_s']:.0f} s"
    yield from _warnings(data)
    yield from _processes(data)
    blocked = data["blocked"]
    yield f"  blocked now: {blocked['ban']} banned, {blocked['shun']} shunned"
    yield from _shun(data["shun"])
    yield from _untracked(data["untracked"])
    yield from _forgotten(data["forgotten"])
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
    yield (
        f"  sweeper {sweeper['pid']}: {flows} connections at the last sweep, "
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


def _shun(shun: Status) -> Iterator[str]:
    if shun["answer"] == "challenge":
        known, cookies = len(shun["services"]), shun["cookies"]
        yield (
            f"  shunned sources are challenged at the {known} services whose offers are known: "
            f"{cookies['sent']} cookies sent, {cookies['accepted']} came back"
        )
    elif shun["why_not"]:
        yield f"  shunned sources are blocked, not challenged: {shun['why_not']}"


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
        yield f"  beyond what the connection table is to hold: {count} dropped"


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
        f"  SYN budget {budget['rate']}/s: {cookies['sent']} cookies sent, "
        f"{cookies['accepted']} came back"
    )
    for service in budget["services"]:
        over, offers = service["engaged_s"], service["offers"]
        state = "within budget" if over is None else f"SYN cookies for {over:.0f} s"
        scale = f", wscale {offers['scale']}" if offers["scale"] >= 0 else ""
        yield f"    {service['service']}: {state} (mss {offers['mss']}{scale})"
