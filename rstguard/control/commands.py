"""What the guard answers on its control socket: one function per command."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from rstguard import __version__
from rstguard.control.ban_import import Imports
from rstguard.control.explain import Explanations
from rstguard.control.nearest import Closest
from rstguard.engine.address import Prefix, parse_prefix
from rstguard.engine.shedding import UNDONE, Level
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Blocked
from rstguard.ipc.requests import ControlError, Request
from rstguard.kernel import KernelError, ipset
from rstguard.kernel.cookies import in_force
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.kernel.nfqueue import QueueState, states
from rstguard.kernel.sets import Sets
from rstguard.observe.events import Event
from rstguard.supervisor.child import Child

if TYPE_CHECKING:
    from rstguard.supervisor.supervisor import Supervisor

MANUAL = "manual"
"""The rule name of a ban that an administrator asked for."""
_RECENT = 50
_SILENT = 2.0
"""Seconds without a report after which a worker does not count as filtering."""


class Requests:
    """Answers requests on behalf of a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        """Answer for this supervisor."""
        self._guard = supervisor
        self._commands: dict[str, Callable[[Request], Awaitable[object]]] = {
            "status": self._status,
            "policy-show": self._policy_show,
            "ban-list": self._ban_list,
            "ban-add": self._ban_add,
            "ban-remove": self._ban_remove,
            "ban-import": Imports(supervisor).take,
            "kill": self._kill,
            "events": self._events,
            "explain": Explanations(supervisor).explain,
            "nearest": Closest(supervisor).answer,
            **supervisor.policies.commands,
            **supervisor.learning.commands,
        }

    async def answer(self, request: Request) -> object:
        """Carry out one request.

        Raises:
            ControlError: it cannot be met, and why.
        """
        command = self._commands.get(request["command"])
        if command is None:
            known = ", ".join(self._commands)
            raise ControlError(f"unknown command {request['command']!r}; there are {known}")
        try:
            return await command(request)
        except KernelError as error:
            raise ControlError(str(error)) from None

    async def _status(self, _request: Request) -> object:
        guard = self._guard
        missing = await asyncio.to_thread(guard.footprint.lost, guard.ruleset)
        queues = states()
        counts = guard.counts
        blocked = await asyncio.to_thread(ipset.blocked_by_kind)
        return {
            "filtering": not missing
            and not guard.upkeep.panic
            and all(
                worker.ready.is_set() and worker.pid and worker.silent_for() < _SILENT
                for worker in guard.workers
            ),
            "missing": missing,
            "version": __version__,
            "uptime_s": round(time.monotonic() - guard.started, 1),
            "policy": {
                "name": guard.ruleset.name,
                "file": guard.file,
                "mode": "enforce" if guard.ruleset.enforce else "observe",
                "on_failure": "open" if guard.ruleset.fail_open else "closed",
                "rules": [rule.name for rule in guard.ruleset.rules],
                "confirm_s": guard.policies.waits_s,
            },
            "not_remembered": guard.record.problem,
            "panic": guard.upkeep.panic,
            "runaway": guard.runaway,
            "lifelines": lifelines_of(guard),
            "supervisor": {"pid": os.getpid()},
            "workers": [
                _worker_status(worker, number, queues.get(number), guard.overload)
                for worker, number in zip(guard.workers, guard.queues, strict=True)
            ],
            "sweeper": {
                "pid": guard.sweeper.pid,
                "ready": guard.sweeper.ready.is_set(),
                "restarts": guard.sweeper.restarts,
            },
            "blocked": blocked,
            "syn_budget": _budget(guard),
            "productive": _productive(guard),
            "learning": guard.learning.status,
            "counts": {
                **{kind: dict(by_rule) for kind, by_rule in guard.events.counts.items()},
                **dict(counts),
            },
            "resets": [
                {"rule": rule, "reason": reason, "count": count}
                for (rule, reason), count in guard.events.resets.items()
            ],
            "recent": guard.events.recent(_RECENT),
        }

    async def _policy_show(self, _request: Request) -> object:
        guard = self._guard
        rules = guard.footprint.rules(guard.ruleset)
        return {"file": guard.file, "text": guard.loaded.text, "iptables": rules}

    async def _ban_list(self, _request: Request) -> object:
        return [
            {
                "source": str(element.source),
                "kind": element.kind,
                "rule": element.rule,
                "remaining_s": element.remaining,
            }
            for element in await asyncio.to_thread(self._listed)
        ]

    def _listed(self) -> list[Element]:
        with Sets() as sets:
            return sets.list()

    async def _ban_add(self, request: Request) -> object:
        source = _prefix(request)
        seconds = request.get("seconds")
        if type(seconds) is not int or not 1 <= seconds <= MAX_SECONDS:
            raise ControlError(f"a ban lasts 1 to {MAX_SECONDS} seconds (under 25 days)")
        for trusted in self._guard.ruleset.scope.trusted:
            if trusted.covers(source.network) or source.covers(trusted.network):
                raise ControlError(
                    f"{source} meets the trusted network {trusted} of the policy; "
                    "take it off that list first"
                )
        for line in self._guard.upkeep.lifelines:
            if line.address == source:
                raise ControlError(f"{source} is {line.what}, which is never banned")
        keep = request.get("keep_existing") is True
        element = Element(source, "ban", MANUAL, seconds, keep)
        with Sets() as sets:
            sets.add([element], shorten=True)
        self._guard.blocked(Blocked(element, Reason.KILLED))
        spared = [
            {"address": str(line.address), "what": line.what}
            for line in self._guard.upkeep.lifelines
            if source.covers(line.address.network)
        ]
        return {
            "source": str(source),
            "seconds": seconds,
            "keep_existing": keep,
            "spared": spared,
        }

    async def _ban_remove(self, request: Request) -> object:
        source = _prefix(request)
        with Sets() as sets:
            removed = sets.remove(source)
        self._guard.record.unblocked(str(source))
        if removed:
            self._guard.events.add(Event("unban", str(source), MANUAL))
        return {"source": str(source), "removed": removed}

    async def _events(self, request: Request) -> object:
        after, most = request.get("after"), request.get("most")
        if type(after) is not int or type(most) is not int or most < 1:
            raise ControlError("say after which number, and how many at most")
        return self._guard.events.after(after, most)

    async def _kill(self, request: Request) -> object:
        conditions: dict[str, Any] = {}
        for key in ("source", "destination"):
            if request.get(key) is not None:
                conditions[key] = _prefix(request, key)
        for key in ("source_port", "port"):
            port = request.get(key)
            if port is None:
                continue
            if type(port) is not int or not 1 <= port <= 65535:
                raise ControlError("a port is a number from 1 to 65535")
            conditions[key] = port
        if not conditions:
            raise ControlError(
                "say which connections: --source, --source-port, --destination or --port"
            )
        killed = await self._guard.kills.kill(**conditions)
        subject = ", ".join(f"{key} {value}" for key, value in conditions.items())
        self._guard.events.add(
            Event("kill", subject, MANUAL, Reason.KILLED, f"{killed.confirmed} confirmed")
        )
        return {
            "killed": killed.matched,
            "confirmed": killed.confirmed,
            "unconfirmed": [
                {"connection": str(one.flow), "why": one.sentence} for one in killed.unconfirmed
            ],
        }


def lifelines_of(guard: Supervisor) -> list[dict[str, str]]:
    """Return whom the guard spares, and why."""
    return [{"address": str(line.address), "what": line.what} for line in guard.upkeep.lifelines]


def _productive(guard: Supervisor) -> int:
    """Return how many sources are productive enough for some rule to be lenient."""
    least = min((rule.unless.productive for rule in guard.ruleset.rules if rule.unless), default=0)
    return sum(percent >= least for percent in guard.productive.percents.values())


def _budget(guard: Supervisor) -> object:
    """Return the state of the SYN budget, or None if the policy in force has none that acts."""
    budget = guard.ruleset.syn_budget
    if budget is None or not in_force(guard.ruleset):
        return None
    now = time.monotonic()
    since = guard.budget.engaged
    return {
        "rate": budget.rate,
        "cookies": {**guard.budget.counts._asdict(), "late": guard.budget.late},
        "services": [
            {
                "service": str(service),
                "offers": offer._asdict(),
                "engaged_s": round(now - since[service], 1) if service in since else None,
            }
            for service, offer in guard.footprint.known.items()
        ],
    }


def _worker_status(
    worker: Child, number: int, queue: QueueState | None, overload: dict[int, Level]
) -> dict[str, object]:
    level = overload.get(worker.pid, Level.NOTHING)
    return {
        "pid": worker.pid,
        "ready": worker.ready.is_set(),
        "restarts": worker.restarts,
        "queue": number,
        "reader": worker.reader,
        "packets": worker.totals["packets"],
        "waiting": queue.waiting if queue else None,
        "overload": int(level),
        "left_undone": UNDONE[level],
        "overrun": queue.dropped_full + queue.dropped_reader if queue else None,
    }


def _text(request: Request, key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str):
        raise ControlError(f"the request lacks {key!r}")
    return value


def _prefix(request: Request, key: str = "source") -> Prefix:
    text = _text(request, key)
    try:
        return parse_prefix(text)
    except ValueError as error:
        raise ControlError(f"{text!r} is no address or network ({error})") from None
