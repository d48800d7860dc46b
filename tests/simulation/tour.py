"""In calm, all that the guard promises is tried once: a few things drawn for each world."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from rstguard.engine.address import Prefix
from rstguard.engine.flow import TcpState
from rstguard.kernel.marks import Marks
from rstguard.kernel.protected import ProtectedAddress
from rstguard.kernel.seam import CookieCounts
from tests.simulation.actors import Actors
from tests.simulation.invariants import holds
from tests.simulation.ledger import Ledger
from tests.simulation.policies import Policies
from tests.simulation.traffic import SERVER, Traffic, text
from tests.simulation.world import QUEUE, Refused, World

_FAST: Final = 40
"""SYNs at once that no policy here lets through."""
_CONDEMNED: Final = Marks().condemned.value
_STAGE: Final = Marks().stage_mask


class Tour:
    """Each of `stations` tries one thing, under a policy that enforces all rules."""

    def __init__(
        self, world: World, traffic: Traffic, ledger: Ledger, actors: Actors, policies: Policies
    ) -> None:
        self._world, self._traffic, self._ledger = world, traffic, ledger
        self._actors, self._policies = actors, policies
        self.stations: tuple[Callable[[], Awaitable[None]], ...] = (
            self.escalates, self.tells, self.resets, self.kills, self.learns, self.confirms,
            self.goes_back, self.protects, self.panics, self.sheds, self.budgets, self.explains,
            self.imports, self.restarts_sweeper,
        )  # fmt: skip

    async def begin(self) -> None:
        """Put the tour's policy in force."""
        await self._apply(self._policies.whole())

    async def _apply(self, policy: str, **more: Any) -> Any:
        return await self._world.ask(
            command="policy-apply", text=policy, name=str(self._world.file), **more
        )

    def _left(self, source: int) -> float:
        promise = self._ledger.bans.get((text(source), "ban"))
        return promise.until - promise.told if promise else 0.0

    def _guess(self, source: int) -> None:
        for port in range(2000, 2012):
            self._traffic.short(source, port)

    async def escalates(self) -> None:
        """Each further ban of a source lasts twice as long, as offences are remembered."""
        source = self._actors.attacker()
        for seconds in (60, 120, 240):
            self._guess(source)
            await asyncio.sleep(2)
            found = self._left(source)
            holds(found == seconds, "a ban does not escalate", f"{found} s, not {seconds}")
            status = await self._world.ask(command="ban-remove", source=text(source))
            holds(status["removed"], "a ban cannot be lifted")
            holds(not self._traffic.is_blocked(source), "a ban that was lifted is in force")
            reader = self._world.processes.reading(QUEUE + (source & (self._world.workers - 1)))
            assert reader is not None
            reader.die()  # its successor is told of the offences
            await self._serve()

    async def _serve(self) -> None:
        await asyncio.sleep(0.1)  # until the death is known
        one = self._world.works
        assert one is not None
        await self._world.until(
            lambda: all(child.serves for child in one.guard.children), 10,
            "a process does not serve again",
        )  # fmt: skip

    async def tells(self) -> None:
        source = self._actors.attacker()
        for _ in range(_FAST):
            self._traffic.syn(source, proven=True)
        await asyncio.sleep(1)
        told = await self._world.ask(command="events", after=0, most=4096)
        holds(
            any(e["kind"] == "ban" and e["subject"] == text(source) for e in told),
            "a ban is not among the events",
        )
        number = told[-1]["number"]
        later = await self._world.ask(command="events", after=number, most=10)
        holds(all(event["number"] > number for event in later), "events come twice")

    async def resets(self) -> None:
        """What a sweep condemns is seen to die, at both ends; what does not die is told."""
        idle, stays = self._actors.attacker(), self._actors.attacker()
        flow = self._traffic.connect(idle)
        self._traffic.mute |= {stays}
        silent = self._traffic.connect(stays)
        await asyncio.sleep(20)
        for one in (flow, silent):
            held = self._world.kernel.connections.get(one.original)
            gone = held is None or held.mark & _CONDEMNED == _CONDEMNED
            holds(gone, "an idle connection is not condemned", one.original)
        held = self._world.kernel.connections.get(flow.original)
        holds(held is None or held.state == TcpState.CLOSE, "an idle connection lives on")
        holds(self._ledger.kinds.get("reset"), "a reset is not told")
        holds(self._ledger.kinds.get("not_killed"), "a connection that stays is not told")
        self._world.kernel.connections.drop(silent.original)

    async def kills(self) -> None:
        source, stays = self._actors.attacker(), self._actors.attacker()
        self._traffic.mute |= {stays}
        for _ in range(3):
            self._traffic.connect(source)
        left = self._traffic.connect(stays)
        done = await self._world.ask(command="kill", source=text(source), port=80)
        holds(done["killed"] == done["confirmed"] == 3, "a kill is not whole", done)
        done = await self._world.ask(command="kill", source=text(stays))
        answer = done["killed"], done["confirmed"], len(done["unconfirmed"])
        holds(answer == (1, 0, 1), "a kill that fails is not told", answer)
        done = await self._world.ask(command="kill", source=text(self._actors.attacker()))
        holds(done["killed"] == 0, "a kill of nobody finds somebody", done)
        self._world.kernel.connections.drop(left.original)

    async def learns(self) -> None:
        await self._apply(self._policies.whole("observe"))
        began = await self._world.ask(command="learn-start", seconds=6)
        holds(began["measuring"] and began["left_s"] == 6, "learning does not begin", began)
        source = self._actors.attacker()
        await asyncio.sleep(0.5)  # until all processes know
        for _ in range(3):
            self._traffic.connect(source)
        for _ in range(_FAST):
            self._traffic.syn(source, proven=True)
        await asyncio.sleep(4)
        half = await self._world.ask(command="learn-status")
        holds(3 <= half["seconds"] <= 5 and half["packets"] >= 3, "learning is not told", half)
        learned = await self._world.ask(command="learned")
        shown = {row["rule"]: row for row in learned["rules"]}
        for rule in ("syn", "many"):
            found = dict(shown[rule]["highest"]).get(text(source), 0)
            holds(found >= 3, "nothing was learned of a source", (rule, shown[rule]))
        await asyncio.sleep(4)
        over = await self._world.ask(command="learn-status")
        holds(not over["measuring"] and over["left_s"] == 0, "learning does not end", over)
        stopped = await self._world.ask(command="learn-stop")
        holds(stopped == {"stopped": True}, "learning cannot be ended")
        holds(await self._world.ask(command="learn-status") is None, "learning goes on")
        await self.begin()

    async def confirms(self) -> None:
        before = self._ledger.policy
        done = await self._apply(self._policies.whole(), confirm_s=3)
        status = await self._world.ask(command="status")
        wait = status["policy"]["confirm_s"]
        holds(wait is not None and 0 < wait <= 3, "status does not tell what waits", wait)
        await asyncio.sleep(5)
        holds(self._ledger.policy == before, "an unconfirmed policy stays", self._ledger.policy)
        rows = await self._world.ask(command="policy-history")
        states = {row["number"]: row["state"] for row in rows}
        holds(states[done["number"]] == "undone", "the history does not tell what was undone")
        done = await self._apply(self._policies.whole(), confirm_s=3)
        await self._world.ask(command="policy-confirm")
        await asyncio.sleep(5)
        holds(self._ledger.policy == done["name"], "a policy goes though it was confirmed")
        rows = await self._world.ask(command="policy-history")
        states = {row["number"]: row["state"] for row in rows}
        holds(states[done["number"]] == "kept", "the history does not tell what was confirmed")

    async def goes_back(self) -> None:
        before = self._ledger.policy
        after = await self._apply(self._policies.whole())
        done = await self._world.ask(command="policy-rollback")
        holds(done["name"] == before == self._ledger.policy, "a rollback goes elsewhere", done)
        rows = await self._world.ask(command="policy-history")
        states = {row["number"]: row["state"] for row in rows}
        holds(states[after["number"]] == "undone", "the history does not tell of a rollback")

    async def protects(self) -> None:
        source = self._actors.attacker()
        line = ProtectedAddress(Prefix(source, 32), "the next hop")
        self._world.kernel.host.protected.append(line)
        one = self._world.works
        assert one is not None
        # Looking takes a twentieth of the time, and was slow in trouble perhaps.
        await self._world.until(
            lambda: line in one.parts.protected.addresses, 150, "a next hop is not protected"
        )
        told = (await self._world.ask(command="status"))["protected"]
        here = {"address": text(source), "what": "the next hop"}
        holds(here in told, "a next hop is not told of as protected")
        with contextlib.suppress(Refused):
            await self._world.ask(command="ban-add", source=text(source), seconds=60)
            holds(False, "a protected address can be banned")
        for _ in range(_FAST):
            self._traffic.syn(source, proven=True)
        await asyncio.sleep(1)
        holds(not self._traffic.is_blocked(source), "a protected address was banned")
        self._world.kernel.host.protected.remove(line)
        await asyncio.sleep(8)

    async def panics(self) -> None:
        told = self._ledger.kinds.get("panic", 0)
        self._world.panic_file.touch()
        await self._world.ask(command="panic")
        holds(not self._traffic.diverts(), "in panic packets are diverted")
        status = await self._world.ask(command="status")
        holds(
            status["panic"] and status["state"] == "degraded", "panic is not told", status["state"]
        )
        self._world.panic_file.unlink()
        await asyncio.sleep(1)
        holds(self._traffic.diverts(), "panic does not end")
        holds(self._ledger.kinds.get("panic", 0) == told + 2, "panic is not an event")

    async def sheds(self) -> None:
        """A worker that is overrun says so, judges less, and all again when it is over."""
        source = self._actors.attacker() & ~1
        reader = self._world.processes.reading(QUEUE)
        assert reader is not None
        told = self._ledger.kinds.get("overload", 0)
        reader.stop()
        for number in range(3600):
            self._traffic.syn(source + 2 * (number % 900), proven=False)
        await asyncio.sleep(0.5)
        reader.go_on()
        await asyncio.sleep(0.05)
        status = await self._world.ask(command="status")
        holds(self._ledger.kinds.get("overload", 0) > told, "an overload is not told")
        holds(status["workers"][0]["overload"], "status does not tell of an overload")
        holds(status["state"] == "degraded", "an overrun guard is not degraded", status["state"])
        await asyncio.sleep(15)
        status = await self._world.ask(command="status")
        holds(not any(w["overload"] for w in status["workers"]), "an overload does not end")
        shed = [problem for problem in status["problems"] if "shed" in problem]
        holds(not shed, "an overload is told on")

    async def budgets(self) -> None:
        await self._apply(self._policies.whole(budget=True))
        kinds = self._ledger.kinds
        before = {kind: kinds.get(kind, 0) for kind in ("cookies_on", "cookies_off")}
        await self._actors.offer()
        await asyncio.sleep(2)
        kernel = self._world.kernel
        kernel.run(["ipset", "-exist", "add", "rstguard-engaged4", f"{text(SERVER)},tcp:80"])
        kernel.host.cookie_counts = CookieCounts(self._ledger.kinds.get("start", 0) + 900, 5, 1)
        await asyncio.sleep(3)
        status = await self._world.ask(command="status")
        budget = status["syn_budget"]
        holds(budget["services"][0]["engaged_s"] is not None, "cookies are not told", budget)
        holds(budget["cookies"]["accepted"] == 5, "cookies are not counted", budget)
        holds(kinds.get("cookies_on", 0) > before["cookies_on"], "cookies are no event")
        await asyncio.sleep(70)
        holds(kinds.get("cookies_off", 0) > before["cookies_off"], "the end of cookies is no event")
        kernel.host.cookie_counts = CookieCounts(0, 0, 0)
        await self.begin()

    async def explains(self) -> None:
        source = self._actors.attacker()
        for _ in range(10):
            self._traffic.syn(source, proven=True)
        await asyncio.sleep(0.1)
        said = await self._world.ask(command="explain", source=text(source))
        used = {row["name"]: row["used_percent"] for row in said["rules"]}
        holds(20 <= used["syn"] <= 60, "explain tells another number of SYNs", used)
        holds(said["state"].startswith("free"), "explain blocks somebody", said["state"])
        near = await self._world.ask(command="nearest", most=50)
        found = [row for row in near if row["source"] == text(source) and row["rule"] == "syn"]
        holds(found, "nearest leaves somebody out", near)

    async def imports(self) -> None:
        """Connections of sources on a list end, too; those of others do not."""
        source, other = self._actors.attacker(), self._actors.attacker()
        flows = self._traffic.connect(source), self._traffic.connect(other)
        await self._world.ask(command="ban-import", bans=[[text(source), 600]])
        self._ledger.promise(text(source), "ban", self._world.loop.time() + 600, "imported")
        await asyncio.sleep(3)
        ended, lives = (self._world.kernel.connections.get(one.original) for one in flows)
        holds(ended is None or ended.mark & _CONDEMNED, "a banned source keeps connections")
        holds(lives is not None and not lives.mark & _CONDEMNED, "others are reset, too")

    async def restarts_sweeper(self) -> None:
        """A sweeper that begins takes in older connections, and ends those of the banned."""
        banned, older = self._actors.attacker(), self._actors.attacker()
        await self._world.ask(command="ban-add", source=text(banned), seconds=600)
        sweeper = next(p for p in self._world.processes.alive if p.kind == "sweeper")
        sweeper.die()
        flow, old = self._traffic.connect(banned), self._traffic.connect(older, mark=0)
        await self._serve()
        await asyncio.sleep(2)
        held = self._world.kernel.connections.get(flow.original)
        holds(held is None or held.mark & _CONDEMNED, "a banned source's connection lives on")
        taken = self._world.kernel.connections.get(old.original)
        holds(taken is not None and taken.mark & _STAGE, "an older connection is not taken in")
