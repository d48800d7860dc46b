"""What `status` answers: a snapshot from which commands, page and metrics derive."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from rstguard import __version__
from rstguard.control import open_handshakes, sources
from rstguard.control.open_handshakes import Open
from rstguard.engine.service import Service
from rstguard.engine.shedding import SHED, Level
from rstguard.ipc.requests import Request
from rstguard.kernel import challenge, syn_budget
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.foreign import CLEARED, SPARED
from rstguard.kernel.nfqueue import QueueState
from rstguard.kernel.seam import Kernel
from rstguard.kernel.sysctl import TRACKING
from rstguard.kernel.untracked import (
    ADOPTED,
    LIMITED,
    LOW_TTL,
    SPOOFED,
    SPOOFED_PASSED,
    STRAYS,
)
from rstguard.supervisor.child import Child
from rstguard.supervisor.foreign import ForeignMarks
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.health import health
from rstguard.supervisor.ingress import Ingress
from rstguard.supervisor.learning import Learning
from rstguard.supervisor.policies import Policies
from rstguard.supervisor.protected import Protected
from rstguard.supervisor.syn_budget import Budget
from rstguard.supervisor.upkeep import Upkeep

_RECENT: Final = 50
_LOOK_SECONDS: Final = 0.08
"""How long `status` waits for a fresh look at the rules; else what was seen last is told."""


class Status:
    """Answers how a guard is."""

    def __init__(
        self,
        kernel: Kernel,
        guard: Guard,
        footprint: Footprint,
        protected: Protected,
        policies: Policies,
        learning: Learning,
        upkeep: Upkeep,
        budget: Budget,
        ingress: Ingress,
        foreign: ForeignMarks,
    ) -> None:
        """Tell of these parts."""
        self._kernel = kernel
        self._guard = guard
        self._footprint = footprint
        self._protected = protected
        self._policies = policies
        self._learning = learning
        self._upkeep = upkeep
        self._budget = budget
        self._ingress = ingress
        self._foreign = foreign
        self._blocked: dict[str, int] = {"ban": 0, "shun": 0}
        self._open: dict[Service, Open] = {}
        self._counting: asyncio.Task[None] | None = None
        self._current: asyncio.Task[object] | None = None
        self._next: asyncio.Task[object] | None = None

    async def answer(self, _request: Request) -> object:
        """Answer the request; all who ask before it is begun share one answer."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._after(self._current))
        return await asyncio.shield(self._next)

    async def _after(self, current: asyncio.Task[object] | None) -> object:
        if current is not None:
            await asyncio.wait({current})
        self._current, self._next = self._next, None
        return await self._look()

    async def _look(self) -> object:
        guard = self._guard
        await asyncio.gather(self._upkeep.look(_LOOK_SECONDS), self._count(_LOOK_SECONDS))
        now = asyncio.get_running_loop().time()
        how = health(guard, now)
        queues = self._kernel.queues()
        return {
            "state": how.condition.value,
            "filtering": how.filtering,
            "problems": list(how.problems),
            "missing": list(guard.missing),
            "one_sided": [str(service) for service in guard.one_sided],
            "sysctls": self._sysctls(),
            "version": __version__,
            "uptime_s": round(now - guard.started, 1),
            "policy": {
                "name": guard.ruleset.name,
                "file": guard.file,
                "mode": "enforce" if guard.ruleset.enforce else "observe",
                "on_failure": "open" if guard.ruleset.fail_open else "closed",
                "rules": [rule.name for rule in guard.ruleset.rules],
                "confirm_s": self._policies.waits_s,
            },
            "not_remembered": guard.not_remembered,
            "panic": guard.panic,
            "capped": sorted(guard.ruleset.capped),
            "protected": [
                {"address": str(line.address), "what": line.what}
                for line in self._protected.addresses
            ],
            "supervisor": {"pid": os.getpid()},
            "workers": [
                _worker(worker, number, queues.get(number), guard.overload)
                for number, worker in self._queues()
            ],
            "sweeper": {
                "pid": guard.sweeper.pid,
                "state": guard.sweeper.state.value,
                "ready": guard.sweeper.serves,
                "restarts": guard.sweeper.restarts,
            },
            "asker": self._asker(),
            "blocked": self._blocked,
            "shun": self._shun(),
            "syn_budget": self._syn_budget(now),
            "pressure": self._pressure(now),
            "untracked": self._untracked(),
            "forgotten": self._forgotten(),
            "limited": {name: self._ingress.counts[name] for name in LIMITED},
            "foreign_marks": self._foreign_marks(),
            "productive": sources.productive(guard),
            "large_sources": sources.large_sources(guard, now),
            "learning": self._learning.status,
            "counts": {
                **{kind: dict(by_rule) for kind, by_rule in guard.events.counts.items()},
                **dict(guard.counts),
            },
            "resets": self._resets(),
            "recent": guard.events.recent(_RECENT),
        }

    def _pressure(self, now: float) -> list[dict[str, object]]:
        return [
            {
                "service": str(service),
                "pressed_s": round(now - one.since, 1),
                "connections": one.live,
                "start": one.start,
                "end": one.end,
            }
            for service, one in self._guard.pressed.items()
        ]

    def _resets(self) -> list[dict[str, object]]:
        return [
            {"rule": rule, "reason": reason, "count": count}
            for (rule, reason), count in self._guard.events.resets.items()
        ]

    def _sysctls(self) -> dict[str, bool]:
        """Return the sysctls that the guard needs, and whether each has its value."""
        altered = {change.name for change in self._guard.altered}
        return {name: name not in altered for name in TRACKING}

    def _asker(self) -> object:
        """Return how the asker is, or None while the policy needs none."""
        for child in self._guard.askers:
            return {
                "pid": child.pid,
                "state": child.state.value,
                "ready": child.serves,
                "restarts": child.restarts,
            }
        return None

    def _queues(self) -> list[tuple[int, Child]]:
        return list(zip(self._footprint.queues, self._guard.workers, strict=True))

    async def _count(self, seconds: float) -> None:
        """Count anew what sets hold; what takes longer than `seconds` is told the next time."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.ensure_future(self._count_sets())
        await asyncio.wait({self._counting}, timeout=seconds)
        if self._counting.done():
            self._counting.result()

    async def _count_sets(self) -> None:
        known = {} if self._footprint.no_cookies else self._footprint.answered
        kinds, self._open = await asyncio.gather(
            asyncio.to_thread(self._kernel.blocked_by_kind),
            asyncio.to_thread(open_handshakes.read, self._kernel, self._guard.ruleset, known),
        )
        self._blocked = {"ban": kinds["ban"], "shun": kinds["shun"]}

    def _shun(self) -> dict[str, object]:
        """Return what a shunned source gets: at `services` a challenge; and why not, or ""."""
        ruleset, footprint = self._guard.ruleset, self._footprint
        known = [
            str(one)
            for one, offer in footprint.answered.items()
            if ruleset.scope.protects(*one) and len(offer.to) < 2
        ]
        challenges = self.challenges
        return {
            "answer": "challenge" if challenges else ruleset.blocking,
            "services": known if challenges else [],
            "cookies": self._cookies if challenges else {},
            "why_not": self._no_cookies if challenge.in_force(ruleset) else "",
            "why_no_dnat": footprint.translation.problem,
        }

    @property
    def challenges(self) -> bool:
        """Whether SYNs of shunned sources are answered with SYN cookies now."""
        return challenge.in_force(self._guard.ruleset) and not self._no_cookies

    @property
    def _cookies(self) -> dict[str, int]:
        return {**self._budget.counts._asdict(), "late": self._budget.late}

    @property
    def _no_cookies(self) -> str:
        return self._footprint.no_cookies or self._budget.problem

    def _untracked(self) -> object:
        """Return what was dropped before the tracker, in segments since the guard began."""
        ruleset, counts, left = self._guard.ruleset, self._ingress.counts, self._ingress.drops_in
        return {
            "least_ttl": ruleset.least_ttl if ruleset.enforce else 0,
            **{name: counts[name] for name in (LOW_TTL, SPOOFED, SPOOFED_PASSED)},
            "drops_spoofed": ruleset.drops_spoofed and ruleset.enforce,
            "drops_spoofed_in_s": None if left is None else round(left, 1),
        }

    def _forgotten(self) -> object:
        """Return what the tracker did not know any more."""
        counts = self._ingress.counts
        return {"adopted": counts[ADOPTED], "dropped": counts[STRAYS]}

    def _foreign_marks(self) -> object:
        """Return what other programs do with the guard's bits of marks."""
        counts = self._foreign.counts
        return {
            "problems": list(self._foreign.problems),
            **{what: counts[what] for what in (CLEARED, SPARED)},
        }

    def _syn_budget(self, now: float) -> object:
        """Return the state of the SYN budget, or None if the policy has none that acts."""
        budget = self._guard.ruleset.syn_budget
        if budget is None or not syn_budget.in_force(self._guard.ruleset):
            return None
        since = self._budget.engaged
        return {
            "rate": budget.rate,
            "half_open": budget.half_open,
            "limit": str(budget),
            "why_not": self._no_cookies,
            "cookies": self._cookies,
            "services": [
                {
                    "service": str(service),
                    "offers": {**offer._asdict(), "to": [str(target) for target in offer.to]},
                    "engaged_s": round(now - since[service], 1) if service in since else None,
                    "half_open": held._asdict() if (held := self._open.get(service)) else None,
                }
                for service, offer in self._footprint.answered.items()
                if budget.ports is None or service.port in budget.ports
            ],
        }


def _worker(
    worker: Child, number: int, queue: QueueState | None, overload: dict[int, Level]
) -> dict[str, object]:
    level = overload.get(worker.pid, Level.NOTHING)
    return {
        "pid": worker.pid,
        "state": worker.state.value,
        "ready": worker.serves,
        "restarts": worker.restarts,
        "queue": number,
        "reader": worker.reader,
        "packets": worker.totals["packets"],
        "waiting": queue.waiting if queue else None,
        "overload": int(level),
        "shed": SHED[level],
        "overrun": queue.dropped_full + queue.dropped_reader if queue else None,
    }
