"""What the guard answers on its control socket: one function per command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from rstguard.control.ban_import import Imports
from rstguard.control.explain import Explanations
from rstguard.control.nearest import Closest
from rstguard.control.status import Status
from rstguard.engine.address import Prefix, parse_prefix
from rstguard.engine.verdict import Reason
from rstguard.ipc.messages import Kill
from rstguard.ipc.requests import ControlError, Request, text_of
from rstguard.kernel import KernelError
from rstguard.kernel.elements import MAX_SECONDS, Element
from rstguard.kernel.footprint import Footprint
from rstguard.kernel.seam import Kernel
from rstguard.observe.events import Event
from rstguard.supervisor.bans import MANUAL, Bans
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.hearing import Hearing
from rstguard.supervisor.protected import Protected
from rstguard.supervisor.upkeep import Upkeep

Command = Callable[[Request], Awaitable[object]]

_KILL_SECONDS: Final = 12.0


class Commands:
    """Answers requests on behalf of a guard."""

    def __init__(
        self,
        kernel: Kernel,
        guard: Guard,
        footprint: Footprint,
        protected: Protected,
        bans: Bans,
        hearing: Hearing,
        upkeep: Upkeep,
        status: Status,
        more: dict[str, Command],
    ) -> None:
        """Answer for these parts; `more` are the commands that parts answer themselves."""
        self._guard = guard
        self._footprint = footprint
        self._protected = protected
        self._bans = bans
        self._hearing = hearing
        self._upkeep = upkeep
        self._status = status
        self._commands: dict[str, Command] = {
            "status": status.answer,
            "policy-show": self._policy_show,
            "ban-list": self._ban_list,
            "ban-add": self._ban_add,
            "ban-remove": self._ban_remove,
            "ban-import": Imports(protected, bans).take,
            "kill": self._kill,
            "panic": self._panic,
            "events": self._events,
            "explain": Explanations(
                kernel, guard, protected, hearing.explained, lambda: status.challenges
            ).explain,
            "nearest": Closest(kernel, guard, hearing.nearest).answer,
            **more,
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

    async def _policy_show(self, _request: Request) -> object:
        guard = self._guard
        rules = self._footprint.rules(guard.ruleset)
        return {"file": guard.file, "text": guard.loaded.text, "iptables": rules}

    async def _ban_list(self, _request: Request) -> object:
        return [
            {
                "source": str(element.source),
                "kind": element.kind,
                "answer": self._answer_to(element),
                "rule": element.rule,
                "remaining_s": element.remaining,
            }
            for element in await self._bans.listed()
        ]

    def _answer_to(self, element: Element) -> str:
        """Return what the source's SYNs get: `challenge`, or what the policy calls `blocking`."""
        may_prove = element.kind == "shun" and not element.keep_existing
        challenged = may_prove and self._status.challenges
        return "challenge" if challenged else self._guard.ruleset.blocking

    async def _ban_add(self, request: Request) -> object:
        source = _prefix(request)
        if source.length == 0:
            raise ControlError(f"{source} would ban everybody: name a narrower prefix")
        seconds = request.get("seconds")
        if type(seconds) is not int or not 1 <= seconds <= MAX_SECONDS:
            raise ControlError(f"a ban lasts 1 to {MAX_SECONDS} seconds (under 25 days)")
        if why := self._protected.refusal()(source):
            raise ControlError(f"{source} is not banned: {why}")
        keep = request.get("keep_existing") is True
        await self._bans.add(source, seconds, keep)
        return {
            "source": str(source),
            "seconds": seconds,
            "keep_existing": keep,
            "protected": [
                {"address": str(line.address), "what": line.what}
                for line in self._protected.addresses
                if source.covers(line.address.network)
            ],
        }

    async def _ban_remove(self, request: Request) -> object:
        source = _prefix(request)
        return {"source": str(source), "removed": await self._bans.remove(source)}

    async def _panic(self, _request: Request) -> object:
        """Look at the panic switch at once: what the command has done is to be told by all."""
        await self._upkeep.obey_panic()
        return {"panic": self._guard.panic}

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
        question = partial(Kill, **conditions)
        answers = await self._hearing.killed.ask(question, self._guard.sweepers, _KILL_SECONDS)
        if not answers:
            raise ControlError("the sweeper gave no answer; `rstguard status` says more")
        (killed,) = answers
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


def _prefix(request: Request, key: str = "source") -> Prefix:
    text = text_of(request, key)
    try:
        return parse_prefix(text)
    except ValueError as error:
        raise ControlError(f"{text!r} is no address or network ({error})") from None
