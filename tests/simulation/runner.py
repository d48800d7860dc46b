"""One run: minutes of trouble drawn from a seed, then calm, then everything is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

from rstguard.engine.flow import TcpState
from rstguard.kernel import KernelError
from rstguard.supervisor.health import Condition, health
from tests.simulation import invariants
from tests.simulation.actors import Act, Actors
from tests.simulation.ledger import Ledger
from tests.simulation.loop import BEGINNING
from tests.simulation.policies import Policies
from tests.simulation.quiet import quiet
from tests.simulation.tour import Tour
from tests.simulation.traffic import Traffic, text
from tests.simulation.trouble import Trouble
from tests.simulation.world import Broken, Gone, Incarnation, Refused, World


@dataclass(slots=True)
class Outcome:
    """What came of a seed."""

    seed: int
    problem: str
    """The sentence of the invariant that was broken, or ""."""
    seconds: float
    """Virtual seconds."""
    log: list[str] = field(default_factory=list)


class Run:
    """One world, and all who are at work in it."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.rng = random.Random(self.world.rng.random())
        self.ledger = Ledger(self.world)
        self.traffic = Traffic(self.world, self.ledger)
        self.policies = Policies(random.Random(self.world.rng.random()))
        self.actors = Actors(self.world, self.traffic, self.ledger, self.policies)
        self.trouble = Trouble(self.world, self.traffic, self.ledger)
        self.tour = Tour(self.world, self.traffic, self.ledger, self.actors, self.policies)
        self._acting: set[asyncio.Task[None]] = set()

    async def main(self) -> None:
        """Live through it all.

        Raises:
            Broken: an invariant does not hold.
        """
        world = self.world
        world.file.write_text(self.policies.draw())
        world.start()
        await self._trouble()
        await self._calm()
        await self._probe()
        await self._look()
        await self._end()

    async def _trouble(self) -> None:
        """Let a part of all that can happen happen, all at once."""
        rng, loop = self.rng, self.world.loop
        end = loop.time() + rng.uniform(60, 80)
        kinds = rng.sample(self.trouble.acts, rng.randrange(1, 8))
        works = [
            (self.actors.clients, 1.5),
            (self.actors.administrators, rng.choice((2.0, 8.0))),
            (kinds, rng.choice((3.0, 10.0))),
        ]
        doing = [asyncio.create_task(self._often(acts, every)) for acts, every in works]
        while loop.time() < end:
            await asyncio.sleep(rng.uniform(0.5, 3))
            self._glance()
        for task in [*doing, *self._acting]:
            task.cancel()
        await asyncio.gather(*doing, *self._acting, return_exceptions=True)
        self.trouble.end()
        self.world.note("calm")

    async def _often(self, acts: Sequence[Act], every: float) -> None:
        while True:
            await asyncio.sleep(self.rng.expovariate(1 / every))
            task = asyncio.create_task(self._act(self.rng.choice(acts)))
            self._acting.add(task)
            task.add_done_callback(self._acting.discard)

    async def _act(self, act: Act) -> None:
        try:
            await act()
        except Gone:
            pass
        except Exception as error:  # noqa: BLE001 - a mistake in the simulation itself
            self.world.broken(f"{act.__name__} fails: {error!r}")

    def _glance(self) -> None:
        """Look at what must hold at any time."""
        world = self.world
        if world.problems:
            raise Broken(world.problems[0])
        invariants.nothing_unexpected_was_logged(world)
        one = world.current
        if one is None or one.owner.stopped or one.over or not one.up:
            return
        if not self.trouble.held_up(one):
            invariants.status_is_true(world, one, self.trouble.idle_since)
            invariants.no_process_waits_too_long(one, world, self.ledger)

    async def _calm(self) -> None:
        """Wait until all back-offs have run out."""
        world = self.world
        await world.until(lambda: world.works is not None, 60, "the guard is not started again")
        one = world.works
        assert one is not None
        children = one.guard.children
        await world.until(
            lambda: all(child.serves for child in children), 40,
            f"a process does not serve in calm: {[(c.name, c.state.value) for c in children]}",
        )  # fmt: skip
        await world.until(
            lambda: one.parts.policies.waits_s is None, 3700,
            "a policy waits though its time is over",
        )  # fmt: skip
        await asyncio.sleep(5)  # a look at the rules, and a flush
        if self.trouble.emptied:
            # Bans in the last seconds of their time hide it, see `Record.count`.
            await world.until(
                lambda: one.over or self._bans_hold(), 330, "bans that were taken do not come back"
            )
        await self._until_whole(one)
        await world.until(
            lambda: one.parts.record.store is not None and not one.parts.record.problem, 15,
            f"the store is not used again: {one.parts.record.problem}",
        )  # fmt: skip
        await asyncio.sleep(3)
        for planted, fault in self.trouble.planted:
            fired = fault.times == 0 and id(planted) not in world.excused
            invariants.holds(
                planted.over or not fired, "a part of the guard died, and the guard went on"
            )
        if world.current is not one:
            await self._calm()

    def _bans_hold(self) -> bool:
        try:
            with self.world.kernel.sets() as sets:
                held = [(str(one.source), str(one.kind)) for one in sets.list()]
            if len(held) > len(set(held)):
                # Known limit: who is in two sets counts twice, and hides another who is gone.
                self.ledger.doubts.update(self.ledger.bans.keys() - set(held))
            invariants.every_told_ban_is_in_force(self.world, self.ledger)
        except (Broken, KernelError):  # some sets may not be there yet
            return False
        return True

    async def _until_whole(self, one: Incarnation) -> None:
        """Rules are put back, at the latest after the longest back-off: see upkeep.py."""
        end = self.world.loop.time() + 320
        while not one.over:
            with contextlib.suppress(Gone):
                status = await one.ask(command="status")
                if not status["missing"] and not status["panic"]:
                    return
            if self.world.loop.time() > end:
                raise Broken(f"rules are not put back: {one.guard.missing[:1]}")
            await asyncio.sleep(2)

    async def _probe(self) -> None:
        """Try whether the guard does its work."""
        world, traffic = self.world, self.traffic
        await self.tour.begin()
        spared = traffic.handshake(self.actors.honest_source(), honest=True)
        fast, forged, hoarder = (self.actors.attacker() for _ in range(3))
        flows = [traffic.connect(hoarder) for _ in range(12)]
        for _ in range(40):
            traffic.syn(fast, proven=True)
            traffic.syn(forged, proven=False)
            await asyncio.sleep(0.01)
        await asyncio.sleep(4)
        traffic.verdicts()
        holds = invariants.holds
        holds(spared.passed, "an honest client does not pass in calm")
        holds(traffic.is_blocked(fast), "a source that is too fast is not banned")
        holds((text(fast), "ban") in self.ledger.bans, "a ban was not told")
        holds((text(forged), "shun") in self.ledger.bans, "a forged flood is not shunned")
        left = [world.kernel.connections.get(flow.original) for flow in flows]
        live = [one for one in left if one is not None and one.state == TcpState.ESTABLISHED]
        holds(len(live) == 8, "a source holds more connections than it may, or fewer", len(live))
        for station in self.rng.sample(self.tour.stations, 2):
            world.note(f"tour: {station.__name__}")
            await station()
        one = world.works
        assert one is not None
        await asyncio.sleep(1)
        await self._probe_answers(one)

    async def _probe_answers(self, one: Incarnation) -> None:
        """What is told agrees with what is there."""
        world = self.world
        status = await world.ask(command="status")
        there = invariants.blocked(world)
        listed = await world.ask(command="ban-list")
        invariants.holds(
            {(row["source"], row["kind"]) for row in listed} == there.keys(),
            "the list of bans is not what the sets hold",
        )
        kinds = [row["kind"] for row in listed]
        invariants.holds(
            status["blocked"] == {kind: kinds.count(kind) for kind in ("ban", "shun")},
            "status counts other bans than there are",
            f"{status['blocked']}, {len(kinds)}",
        )
        how = health(one.guard, world.loop.time())
        invariants.holds(
            how.condition is not Condition.NOT_FILTERING, "the guard does not filter in calm", how
        )
        expected = how.condition is Condition.FILTERING
        invariants.holds(status["filtering"] is expected, "status and health differ", how)
        line, told = str(how), one.notices.line
        # It is told once a second: what ended a moment ago may be in it yet.
        lately = health(one.guard, world.loop.time() - 1.5)
        invariants.holds(
            told.startswith((how.condition.value, lately.condition.value)),
            "the service manager is told another condition",
            f"{told}, {line}",
        )

    async def _look(self) -> None:
        """Look at every invariant."""
        world, ledger = self.world, self.ledger
        one = world.works
        assert one is not None
        invariants.nobody_is_missing(one, world)
        invariants.all_follow_the_policy(world, one, ledger)
        await invariants.the_history_tells_it(one)
        invariants.every_told_ban_is_in_force(world, ledger)
        invariants.every_ban_was_told(world, ledger)
        invariants.store_and_sets_agree(world, one, ledger)
        invariants.rules_are_those_of_the_policy(world, one)
        if not self.trouble.refused:  # else it stays until the next change of policy
            invariants.no_set_is_left_over(world, one)
        invariants.every_packet_has_one_verdict(world, self.traffic)
        self._glance()

    async def _end(self) -> None:
        """Stop the guard for good, while policies are applied perhaps; nothing may be left."""
        world = self.world
        one = world.works
        assert one is not None
        world.wanted = world.cleans = False
        late = [asyncio.ensure_future(self.actors.apply()) for _ in range(self.rng.randrange(5))]
        await asyncio.sleep(self.rng.uniform(0, 0.05))
        one.context.run(one.supervisor.stop)
        await world.until(lambda: one.over, 20, "the guard does not stop")
        invariants.holds(not one.error, "the guard does not stop in order", one.error)
        await asyncio.sleep(1)
        await asyncio.gather(*late)
        invariants.nothing_is_left(world)
        kept = self.ledger.on_disk()
        for key, promise in self.ledger.due(world.loop.time()).items():
            lost = key not in kept and not promise.fragile
            invariants.holds(not lost, "a ban is lost with the end of the guard", key)
        self._glance()


def run(seed: int) -> Outcome:
    """Run one seed."""
    with quiet() as loggers:
        one = Run(seed)
        for logger in loggers:
            logger.addHandler(one.world)
        problem = ""
        try:
            one.world.loop.run_until_complete(one.main())
        except (Broken, Refused, Gone) as error:
            problem = str(error) or repr(error)
        except Exception as error:  # noqa: BLE001 - it belongs to its seed
            problem = repr(error)
            one.world.log += traceback.format_exc().splitlines()
        finally:
            for logger in loggers:
                logger.removeHandler(one.world)
            seconds, log = one.world.loop.time() - BEGINNING, list(one.world.log)
            problem = next(iter(one.world.problems), problem)
            one.world.close()
        del one
        gc.collect()
    return Outcome(seed, problem, seconds, log)
