"""Who is at work in the simulated world besides the guard: administrators, clients, attackers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from rstguard.engine.flow import TcpState
from rstguard.engine.wire import ACK, SYN
from rstguard.kernel.cookies import LOG_GROUP
from tests.simulation.ledger import Ledger
from tests.simulation.policies import Policies
from tests.simulation.traffic import ATTACKERS, HONEST, Traffic, text
from tests.simulation.world import Gone, Refused, World
from tests.support.packets import ipv4, tcp

Act = Callable[[], Awaitable[None]]
MANUAL: Final = tuple(f"100.64.{n}.1" for n in range(6))


class Actors:
    """Each of `acts` does one thing, once."""

    def __init__(self, world: World, traffic: Traffic, ledger: Ledger, policies: Policies) -> None:
        self._world, self._traffic, self._ledger = world, traffic, ledger
        self._policies = policies
        self.rng = random.Random(world.rng.random())
        self._attackers = 0
        self.administrators: Sequence[Act] = (
            self.apply, self.apply, self.apply_wrong, self.confirm, self.rollback, self.reload,
            self.ban, self.ban, self.unban, self.bring_list, self.kill, self.panic, self.ask,
            self.learn,
        )  # fmt: skip
        self.clients: Sequence[Act] = (
            self.honest, self.honest, self.burst, self.forge, self.hoard, self.guess, self.scan,
            self.crowd, self.offer,
        )  # fmt: skip

    async def _ask(self, **request: Any) -> Any:
        """Ask; return None if nobody answers, or the guard refuses."""
        try:
            return await self._world.ask(**request)
        except (Gone, Refused) as error:
            self._world.note(f"{request['command']}: {error!r}")
            return None

    # Administrators

    async def apply(self) -> None:
        """Apply a policy, perhaps one to be confirmed."""
        policy = self._policies.draw()
        wait = self.rng.choice((None, None, 2, 5, 20))
        if self.rng.random() < 0.3:  # the file, too, as people do
            self._world.file.write_text(policy)
        self._world.note(f"apply {policy.split()[3]}, confirm within {wait}")
        request: dict[str, Any] = {"text": policy, "name": str(self._world.file)}
        if wait is not None:
            request["confirm_s"] = wait
        if self.rng.random() < 0.3:
            request["ssh"] = "192.0.2.77"
        done = await self._ask(command="policy-apply", **request)
        if done is not None and done["name"] != self._ledger.policy:
            self._world.broken(
                f"apply says that {done['name']} is in force, and the events {self._ledger.policy}"
            )

    async def apply_wrong(self) -> None:
        """Apply what is no policy."""
        before = self._ledger.policy
        done = await self._ask(command="policy-apply", text=self._policies.wrong(), name="wrong")
        if done is not None:
            self._world.broken(f"a wrong policy was accepted after {before}")

    async def confirm(self) -> None:
        await self._ask(command="policy-confirm")

    async def rollback(self) -> None:
        done = await self._ask(command="policy-rollback")
        if done is not None and done["name"] != self._ledger.policy:
            self._world.broken("rollback says that another policy is in force than the events")

    async def reload(self) -> None:
        """The service manager sends SIGHUP, perhaps after the file was edited."""
        if self.rng.random() < 0.5:
            wrong = self.rng.random() < 0.2
            self._world.file.write_text(self._policies.wrong() if wrong else self._policies.draw())
            if wrong:
                good = self._policies.draw()
                self._world.loop.outside(3.0, self._world.file.write_text, good)
        one = self._world.works
        if one is not None:
            one.parts.service._hangup.set()

    async def ban(self) -> None:
        """Ban a source by hand, longer or shorter than before."""
        source = self.rng.choice((*MANUAL, "10.1.2.3", "10.0.0.0/8", "192.0.2.77"))
        seconds = self.rng.choice((20, 300, 3600))
        keep = self.rng.random() < 0.15
        kind = (source, "ban")
        self._ledger.doubts[kind] += 1
        done = await self._ask(
            command="ban-add", source=source, seconds=seconds, keep_existing=keep
        )
        if done is not None:
            self._ledger.doubts[kind] -= 1
            if source.startswith("10."):
                self._world.broken(f"a trusted source was banned: {source}")

    async def unban(self) -> None:
        sources = [*MANUAL, *(source for source, _ in self._ledger.bans)]
        source = self.rng.choice(sources)
        keys = {(source, "ban"), (source, "shun")}
        self._ledger.doubts.update(keys)
        if await self._ask(command="ban-remove", source=source) is not None:
            self._ledger.doubts.subtract(keys)

    async def bring_list(self) -> None:
        """Import a list, in which there may be trusted sources."""
        count = self.rng.randrange(1, 30)
        rows: list[list[Any]] = [
            [f"100.65.{self.rng.randrange(2)}.{self.rng.randrange(40)}", self.rng.choice((60, 900))]
            for _ in range(count)
        ]
        rows.append([self.rng.choice(MANUAL), 600])
        rows.append(["10.1.9.9", 600])
        keys = {(str(source), "ban") for source, _ in rows}
        self._ledger.doubts.update(keys)
        began = self._world.loop.time()
        done = await self._ask(command="ban-import", bans=rows)
        if done is None:
            return
        if [row["source"] for row in done["refused"]] != ["10.1.9.9"]:
            self._world.broken("an import bans a trusted source, or refuses one that is not")
        self._ledger.doubts.subtract(keys)
        for source, seconds in rows[:-1]:
            self._ledger.promise(source, "ban", began + seconds, "imported")

    async def kill(self) -> None:
        """End the connections of a source."""
        source = HONEST + self.rng.randrange(50)
        flows = [self._traffic.connect(source) for _ in range(3)]
        done = await self._ask(command="kill", source=text(source))
        if done is not None and done["killed"] < len(flows):
            self._world.broken(
                f"{len(flows)} connections were to be killed, and {done['killed']} were found"
            )

    async def panic(self) -> None:
        """All traffic is to pass for a while."""
        self._world.panic_file.touch()
        await self._ask(command="panic")
        await asyncio.sleep(self.rng.uniform(0.1, 15))
        self._world.panic_file.unlink(missing_ok=True)
        await self._ask(command="panic")

    async def ask(self) -> None:
        """Ask for what changes nothing."""
        source = text(ATTACKERS + 256)
        request: dict[str, Any] = self.rng.choice(
            (
                {"command": "status"},
                {"command": "explain", "source": source},
                {"command": "nearest", "most": 5},
                {"command": "ban-list"},
                {"command": "events", "after": 0, "most": 10},
                {"command": "policy-show"},
            )
        )
        await self._ask(**request)

    async def learn(self) -> None:
        for request in (
            {"command": "learn-start", "seconds": 10},
            {"command": "learn-status"},
            {"command": "learned"},
            {"command": "learn-stop"},
        ):
            await self._ask(**request)
            await asyncio.sleep(self.rng.uniform(0, 3))

    # Clients

    def attacker(self) -> int:
        """Return an address that nobody has had before, alone in its /24."""
        self._attackers += 1
        return ATTACKERS + (self._attackers << 8)

    def honest_source(self) -> int:
        """Return an honest client that has not been there before."""
        return HONEST + 255

    async def honest(self) -> None:
        """Some clients connect, one now and then."""
        for _ in range(self.rng.randrange(1, 6)):
            source = HONEST + self.rng.randrange(250)
            self._traffic.handshake(source, honest=True)
            if self.rng.random() < 0.1:
                self._traffic.connect(source)
            await asyncio.sleep(self.rng.uniform(0, 0.5))

    async def burst(self) -> None:
        """A source sends SYNs much too fast; its address is known to be real."""
        source = self.attacker()
        for _ in range(self.rng.randrange(20, 60)):
            self._traffic.syn(source, proven=True)
            await asyncio.sleep(0.01)

    async def forge(self) -> None:
        """The same, but nobody knows whether the address is real."""
        source = self.attacker()
        for _ in range(self.rng.randrange(20, 60)):
            self._traffic.syn(source, proven=False)
            await asyncio.sleep(0.01)

    async def hoard(self) -> None:
        """A source holds more connections than anybody may."""
        source = self.attacker()
        if self.rng.random() < 0.05:
            self._traffic.mute.add(source)
        for _ in range(self.rng.randrange(5, 16)):
            self._traffic.connect(source)
        self._traffic.connect(source, TcpState.SYN_RECV, mark=0)

    async def guess(self) -> None:
        """A source guesses passwords: its connections end early."""
        source = self.attacker()
        for _ in range(self.rng.randrange(4, 12)):
            self._traffic.short(source, self.rng.randrange(1024, 65536))
            await asyncio.sleep(0.1)

    async def scan(self) -> None:
        source = self.attacker()
        for port in range(20, 20 + self.rng.randrange(4, 16)):
            self._traffic.syn(source, proven=True, to=port)

    async def crowd(self) -> None:
        """So many are too fast that a policy may run away."""
        for _ in range(self.rng.randrange(8, 20)):
            source = self.attacker()
            for _ in range(25):
                self._traffic.syn(source, proven=True)
            await asyncio.sleep(0.05)

    async def offer(self) -> None:
        """A server answers a SYN; the rules show the guard what it offers."""
        options = bytes([2, 4, 5, 180 - self.rng.randrange(2), 1, 3, 3, 7])
        body = tcp(SYN | ACK, source_port=80, destination_port=4000, options=options)
        packet = ipv4(body, source="203.0.113.10", destination="192.0.2.9")
        self._world.kernel.packets.log(LOG_GROUP, packet)
        await asyncio.sleep(0)
