"""A guard's state for tests, without processes or kernel."""

from __future__ import annotations

import asyncio

from rstguard.observe.events import EventLog
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import Loaded, parse
from rstguard.supervisor.child import Child, State
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import Condition, health
from tests.supervisor.children import Stage, Told


def policy(name: str = "first", more: str = "", rules: str = "[]") -> Loaded:
    """Return a policy that protects eth0 and has no SYN cookies given out.

    For that a real loop would have to wait for what the fake kernel logs.
    """
    head = f"version: 1\nname: {name}\nshun: drop\nsyn_budget: off\n{more}\n"
    text = f"{head}protect: {{interfaces: [eth0]}}\nrules: {rules}\n"
    return parse(text, f"{name}.yaml")


def guard_of(loaded: Loaded | None = None) -> Guard:
    """Return the state of a guard that filters, with two workers and a sweeper."""
    loaded = loaded or policy()
    guard = Guard(
        loaded=loaded,
        file="first.yaml",
        ruleset=compile_policy(loaded.policy),
        events=EventLog(),
        started=asyncio.get_running_loop().time(),
        diverts=True,
    )
    stage = Stage()
    for name in ("worker (queue 0)", "worker (queue 1)"):
        child = Child(name, "worker", stage.spawn, None, list, list[object]().append, Told())
        guard.workers.append(child)
    guard.sweepers.append(
        Child("sweeper", "sweeper", stage.spawn, None, list, list[object]().append, Told())
    )
    for child in guard.children:
        child.state = State.SERVING
        child.forgive()
    return guard


def condition_of(guard: Guard) -> Condition:
    """Return how a guard is, with processes that all work."""
    for child in guard.children:
        child.forgive()
    return health(guard, asyncio.get_running_loop().time()).condition


def kinds(guard: Guard) -> list[str]:
    """Return the kinds of the events so far."""
    return [str(event["kind"]) for event in guard.events.recent(1000)]
