"""The composition root: builds the parts of a guard and names who needs whom."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Final

from rstguard.control.commands import Commands
from rstguard.control.protocol import serve
from rstguard.control.status import Status
from rstguard.engine.ruleset import RuleSet
from rstguard.kernel.footprint import Footprint
from rstguard.observe.events import EventLog
from rstguard.policy.compile import compile_policy
from rstguard.state.record import Record
from rstguard.supervisor.around import around
from rstguard.supervisor.bans import Bans
from rstguard.supervisor.capped import Capped
from rstguard.supervisor.change import Change, Follower
from rstguard.supervisor.foreign import ForeignMarks
from rstguard.supervisor.fullness import Fullness
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import health
from rstguard.supervisor.hearing import Hearing
from rstguard.supervisor.ingress import Ingress
from rstguard.supervisor.interfaces import Interfaces
from rstguard.supervisor.learning import Learning
from rstguard.supervisor.onesided import OneSided
from rstguard.supervisor.options import Options
from rstguard.supervisor.policies import Policies
from rstguard.supervisor.processes import Processes
from rstguard.supervisor.protected import Protected
from rstguard.supervisor.service import Service
from rstguard.supervisor.settings import Settings
from rstguard.supervisor.supervisor import Parts, Supervisor
from rstguard.supervisor.syn_budget import Budget
from rstguard.supervisor.upkeep import Upkeep

_SWITCH_SECONDS: Final = 0.0005
"""How long a thread that computes, such as one that reads a policy, may hold up the loop."""
_THREADS: Final = 8
"""What waits for the disk, for iptables or for the kernel's tables does so beside the loop."""


async def guard(options: Options) -> None:
    """Guard a network namespace until SIGTERM or SIGINT, then undo everything.

    Raises:
        KernelError: the guard could not be brought up, or not be taken down whole.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(_threads())
    sys.setswitchinterval(_SWITCH_SECONDS)
    # To look through all that is there for good would take a tenth of a second each time.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    supervisor, commands, service = build(options)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    service.listen()
    await supervisor.run(commands.answer, serve)


def build(options: Options) -> tuple[Supervisor, Commands, Service]:
    """Return a guard's parts, put together; nothing is changed on the machine.

    An event loop must be running.
    """
    state = Guard(
        loaded=options.policy,
        file=options.file,
        ruleset=compile_policy(options.policy.policy),
        events=EventLog(options.wall),
        started=asyncio.get_running_loop().time(),
    )
    workers = len(options.spawned) - 1
    kernel = options.kernel
    queues = range(options.queue, options.queue + workers)
    footprint = Footprint(kernel, options.directory, queues)
    record = Record(options.state, kernel.sets, options.wall)
    state.memory = lambda: record.problem
    protected = Protected(kernel, state)
    learning = Learning(state)
    upkeep = Upkeep(kernel, state, footprint, record, options.directory)
    budget = Budget(kernel, footprint, state.events, upkeep.rewrite)
    state.unheard = lambda: budget.problem
    followers: list[Follower] = []
    change = Change(state, protected, followers)
    bans = Bans(kernel, state, record, capped := Capped(state, change))
    ingress = Ingress(kernel, state, change, footprint.hits)
    foreign = ForeignMarks(kernel, state)
    hearing = Hearing(state, bans, learning, record)
    processes = Processes(state, record, learning, hearing.hear, options)

    async def rules(old: RuleSet, new: RuleSet) -> None:
        await asyncio.to_thread(footprint.replace, old, new, divert=not state.panic)

    followers += [
        Follower("the processes", processes.adopt),
        Follower("rules and sets", rules),
        Follower("the SYN budget", budget.follow),
        Follower("the protected addresses", protected.follow),
        Follower("the learning of limits", learning.follow),
    ]
    policies = Policies(state, change, record, protected)
    service = Service(options.file, lambda: _summary(state), around(kernel))
    parts = Parts(
        state, processes, footprint, record, protected, change, bans, capped, policies, upkeep,
        Settings(state, footprint), OneSided(kernel, state, footprint.hits),
        Interfaces(kernel, state, footprint.hits), Fullness(kernel, state), budget, ingress,
        foreign, service,
    )  # fmt: skip
    status = Status(
        kernel, state, footprint, protected, policies, learning, upkeep, budget, ingress, foreign
    )
    more = {**policies.commands, **learning.commands}
    commands = Commands(kernel, state, footprint, protected, bans, hearing, upkeep, status, more)
    return Supervisor(options, parts), commands, service


def _summary(state: Guard) -> str:
    """Return the line that the service manager shows."""
    workers = "1 worker" if len(state.workers) == 1 else f"{len(state.workers)} workers"
    how = health(state, asyncio.get_running_loop().time())
    return f"{how}; policy {state.ruleset.name} ({state.mode}), {workers}"


def _threads() -> ThreadPoolExecutor:
    """Return threads that are there already: later there may be none to be had."""
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="beside")
    all_there = Barrier(_THREADS)
    for one in [threads.submit(all_there.wait) for _ in range(_THREADS)]:
        one.result()
    return threads
