"""How one source stands now: the answer to `rstguard policy explain`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from rstguard.engine.address import Prefix, address_text, is_v6, parse_address, source_key
from rstguard.engine.flow import Flow
from rstguard.ipc.messages import Explain, Explained
from rstguard.ipc.requests import ControlError, Request
from rstguard.kernel.elements import Element
from rstguard.kernel.marks import Labels
from rstguard.kernel.seam import Kernel
from rstguard.policy.compile import describe_rule
from rstguard.supervisor.guard import Guard
from rstguard.supervisor.inquiry import ANSWER_SECONDS, Inquiry
from rstguard.supervisor.protected import Protected


class Explanations:
    """Asks workers and sweeper how a source stands, and the kernel for the rest."""

    def __init__(
        self,
        kernel: Kernel,
        guard: Guard,
        protected: Protected,
        explained: Inquiry[Explained],
        challenges: Callable[[], bool],
    ) -> None:
        """`challenges` tells whether a shunned source is answered with SYN cookies now."""
        self._challenging = challenges
        self._kernel = kernel
        self._guard = guard
        self._protected = protected
        self._explained = explained

    async def explain(self, request: Request) -> object:
        """Answer the request."""
        text = request.get("source")
        try:
            source = parse_address(str(text))
        except ValueError as error:
            raise ControlError(f"{text!r} is no address ({error})") from None
        guard, kernel = self._guard, self._kernel
        used = await self._used(source)
        in_kernel = await asyncio.to_thread(kernel.explain, guard.ruleset, source)
        used = {name: max(used.get(name, 0), in_kernel.get(name, 0)) for name in used | in_kernel}
        ruleset = guard.ruleset
        adopted = 1 << Labels(ruleset.labels).adopted
        elements, flows, proven = await asyncio.to_thread(_in_kernel, kernel, source)
        key = source_key(source, ruleset.source_ipv4, ruleset.source_ipv6)
        return {
            "source": address_text(source),
            "state": self._state(source, elements, proven),
            "connections": len(flows),
            "adopted": sum(bool(flow.labels & adopted) for flow in flows),
            "proven": proven,
            "productive_percent": guard.productive.percents.get(key),
            "rules": [
                {
                    "name": rule.name,
                    "used_percent": round(100 * used[rule.name], 1) if rule.name in used else None,
                    "says": describe_rule(rule),
                }
                for rule in guard.ruleset.rules
            ],
        }

    async def _used(self, source: int) -> dict[str, float]:
        """Return the most that any says: one worker counts the source, the others do not."""
        question = partial(Explain, source=source)
        answers = await self._explained.ask(question, self._guard.judges, ANSWER_SECONDS)
        if not answers:
            raise ControlError("no worker answered; `rstguard status` says more")
        used: dict[str, float] = {}
        for answer in answers:
            for name, share in answer.used.items():
                used[name] = max(share, used.get(name, 0.0))
        return used

    def _state(self, source: int, elements: list[Element], proven: bool) -> str:
        guard = self._guard
        for prefix in guard.ruleset.scope.trusted:
            if prefix.covers(source):
                return f"trusted by the policy ({prefix}): nothing of it is counted"
        for line in self._protected.addresses:
            if line.address.covers(source):
                return f"{line.what}: it is never banned, shunned or reset"
        for element in elements:
            left = "for ever" if element.remaining is None else f"for {element.remaining} s yet"
            kind = "banned" if element.kind == "ban" else "shunned"
            sentence = f"{kind} as {element.source} by rule {element.rule}, {left}"
            if element.kind == "shun" and not element.keep_existing and self._challenging():
                return f"{sentence}: challenged, who returns a SYN cookie is served"
            return sentence
        if proven:
            return "free; its address is real: a server has lately answered it with data"
        return "free; whether its address is real is not known: no server has lately answered it"


def _in_kernel(kernel: Kernel, source: int) -> tuple[list[Element], list[Flow], bool]:
    """Return who blocks a source, its connections, and whether it proved itself."""
    with kernel.sets() as sets:
        elements = [one for one in sets.list() if one.source.covers(source)]
        proven = sets.proven(source)
    whole = Prefix(source, 128 if is_v6(source) else 32)
    with kernel.table() as table:
        flows = [flow for flow in table.dump() if whole.covers(flow.original.source)]
    return elements, flows, proven
