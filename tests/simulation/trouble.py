"""What goes wrong in the simulated world, for a while, until `end`."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

from rstguard.kernel import InUse, KernelError
from tests.simulation.actors import Act
from tests.simulation.ledger import Ledger
from tests.simulation.other_programs import OtherPrograms
from tests.simulation.processes import Process
from tests.simulation.traffic import Traffic
from tests.simulation.world import QUEUE, Incarnation, Provoked, World
from tests.support.fake_kernel.faults import Fault


class Trouble(OtherPrograms):
    """Each of `acts` lets one thing go wrong, once."""

    def __init__(self, world: World, traffic: Traffic, ledger: Ledger) -> None:
        super().__init__(world, ledger)
        self._traffic = traffic
        self.idle_since: dict[int, float] = {}
        """Since when processes have not been at work."""
        self.held_until = 0.0
        self._taken: set[int] = set()
        self._away = False
        self.planted: list[tuple[Incarnation, Fault]] = []
        self.ended = self.refused = False
        self.acts: Sequence[Act] = (
            self.kill_child, self.kill_child, self.kill_often, self.kill_in_turn, self.hang_child,
            self.fail_child, self.mistake, self.no_processes, self.take_queue, self.late_answers,
            self.kernel_refuses, self.flush, self.delete_jump, self.insert_rule, self.empty_set,
            self.destroy_sets, self.disk_full, self.no_directory, self.clock, self.kill_guard,
            self.kill_guard_in_work, self.hang_guard, self.restart, self.plant,
        )  # fmt: skip

    def _child(self) -> Process | None:
        alive = self._world.processes.alive
        return self.rng.choice(alive) if alive else None

    def _idle(self, one: Process) -> None:
        self.idle_since.setdefault(one.pid, self._world.loop.time())

    # Processes

    async def kill_child(self) -> None:
        """One is killed, perhaps before it is ready."""
        if one := self._child():
            self._world.note(f"kill {one.owner.name}")
            self._idle(one)
            one.die()

    async def kill_often(self) -> None:
        """They are killed again and again, successors at once."""
        for _ in range(self.rng.randrange(3, 10)):
            await self.kill_child()
            await asyncio.sleep(self.rng.choice((0.0, 0.05, 0.3)))

    async def kill_in_turn(self) -> None:
        """One is killed in the middle of a turn."""
        one = self._child()
        if one is None or one.serving is None:
            return
        one.dies_in_turns = self.rng.randrange(6)
        died, process = one.kernel.killed, one

        def killed() -> None:
            self._world.note(f"{process.owner.name} is killed in the middle of a turn")
            self._idle(process)
            died()

        one.kernel.killed = killed

    async def hang_child(self) -> None:
        """One is stopped for a while."""
        if one := self._child():
            self._world.note(f"stop {one.owner.name}")
            self._idle(one)
            one.stop()
            await asyncio.sleep(self.rng.choice((0.5, 3, 12, 70)))
            self.idle_since.pop(one.pid, None)
            one.go_on()

    async def fail_child(self) -> None:
        """What one asks of the kernel is refused."""
        if one := self._child():
            operation = self.rng.choice(("queue.receive", "sets.add", "table.dump", "queue"))
            self._fault(operation, KernelError("refused by the simulation"), 2, one.owner.name)
            await asyncio.sleep(0)

    async def mistake(self) -> None:
        """One meets what nobody expected."""
        if one := self._child():
            operation = self.rng.choice(("queue.receive", "table.dump"))
            self._fault(operation, Provoked("a mistake"), 1, one.owner.name)
            await asyncio.sleep(0)

    async def no_processes(self) -> None:
        """Nothing can be started for a while."""
        self._world.processes.refuses = self.rng.choice((errno.EAGAIN, errno.EMFILE))
        await self.kill_child()
        await asyncio.sleep(self.rng.uniform(0.1, 8))
        self._world.processes.refuses = None

    async def take_queue(self) -> None:
        """Another program takes a queue as soon as its reader is dead."""
        number = QUEUE + self.rng.randrange(self._world.workers)
        if reader := self._world.processes.reading(number):
            self._idle(reader)
            reader.die()
        try:
            self._world.kernel.packets.take_queue(number, "another program")
        except InUse:
            return
        self._taken.add(number)
        await asyncio.sleep(self.rng.uniform(0.5, 8))
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        if number in self._taken:
            self._taken.discard(number)
            self._traffic.lose(self._world.kernel.packets.queues[number].waiting)
            self._world.kernel.packets.free_queue(number)

    # The kernel and other programs

    def _fault(
        self, operation: str, error: Exception, times: int | None, process: str | None = None,
        after: bool = False, naming: str = "",
    ) -> Fault:  # fmt: skip
        wrong: KernelError = error  # type: ignore[assignment]
        return self._world.kernel.faults.fail(
            operation, wrong, times, process=process, after=after, naming=naming
        )

    async def late_answers(self) -> None:
        """Whatever is done beside the loop takes long for a while."""
        executor = self._world.loop._default_executor  # type: ignore[attr-defined]
        executor.slow = self.rng.choice((0.1, 0.5))
        await asyncio.sleep(self.rng.uniform(1, 10))
        executor.slow = 0.0

    async def kernel_refuses(self) -> None:
        """The kernel refuses something, once or for a while, before it is done or after."""
        operation, naming = self.rng.choice(
            (
                ("run", ""), ("run", "iptables-restore"), ("run", "ip6tables-restore"),
                ("run", "ipset restore"), ("run", "iptables-save"), ("run", "destroy"),
                ("sets.*", ""), ("sets.remove", ""), ("sets.add", ""), ("write_sysctl", ""),
                ("protected", ""), ("table.*", ""), ("cookie_counts", ""), ("queues", ""),
                ("interfaces", ""),
            )
        )  # fmt: skip
        times = self.rng.choice((1, 2, 5, None))
        after = self.rng.random() < 0.3
        if after and operation.startswith("sets"):
            times = 1  # an answer may be lost, but not always that of the same question
        self.refused = True
        self._world.note(f"refused from now on: {operation} {naming} {times}")
        error = KernelError("the kernel refused: the simulation wants it")
        fault = self._fault(operation, error, times, None, after, naming)
        await asyncio.sleep(self.rng.uniform(0.5, 8))
        fault.times = 0

    # Disk and clock

    async def disk_full(self) -> None:
        """Nothing can be written for a while."""
        one = self._world.current
        store = one.parts.record.store if one is not None and one.up else None
        if store is None:
            return
        self._world.note("the disk is full")
        pragma = self.rng.choice(("max_page_count = 1", "query_only = ON"))
        store._database.execute(f"PRAGMA {pragma}")
        try:
            await asyncio.sleep(self.rng.uniform(0.5, 15))
        finally:
            if one is not None and not one.over:
                store._database.execute("PRAGMA max_page_count = 1000000")
                store._database.execute("PRAGMA query_only = OFF")

    async def no_directory(self) -> None:
        """The state directory cannot be used for a while: a file is in its place."""
        directory, aside = self._world.state_directory, self._world.root / "aside"
        if self._away or not directory.is_dir():
            return
        self._away = True
        directory.rename(aside)
        directory.write_text("")
        try:
            await asyncio.sleep(self.rng.uniform(0.5, 15))
        finally:
            directory.unlink()
            aside.rename(directory)
            self._away = False

    async def clock(self) -> None:
        """Somebody sets the clock; while no guard runs nobody could know by how much."""
        if self._world.works is None:
            return
        self._ledger.clock_until = self._world.loop.time() + 1.5
        self._world.offset += self.rng.choice((-7200.0, -3600.0, -10.0, 10.0, 3600.0, 86400.0))
        self._world.note(f"the clock is set: {self._world.offset:+.0f} s in all")
        await asyncio.sleep(2.5)

    # The supervisor

    async def kill_guard(self) -> None:
        if one := self._world.current:
            self._world.kill_supervisor(one)

    async def kill_guard_in_work(self) -> None:
        """It is killed in the middle of something that it does in the kernel."""
        if one := self._world.current:
            one.kernel.dies_in = self.rng.randrange(12)

    async def hang_guard(self) -> None:
        """The supervisor is stopped for a while, or starved."""
        one = self._world.current
        if one is None or one.owner.stopped:
            return
        self._world.note(f"stop {one.owner.name}")
        one.owner.stopped = True
        began = self._world.loop.time()
        try:
            await asyncio.sleep(self.rng.choice((0.5, 3, 8, 20)))
        finally:
            now = self._world.loop.time()
            self._world.late, self._world.late_until = now - began, now + 1
            self._world.latest = max(self._world.latest, now - began)
            self.held_until = now + 10
            self._world.loop.resume(one.owner)

    async def restart(self) -> None:
        """The service manager stops the guard in order, and starts it again."""
        if one := self._world.works:
            one.stopping = True
            one.context.run(one.supervisor.stop)

    async def plant(self) -> None:
        """A part of the guard fails on something that nobody expects."""
        one = self._world.works
        if one is None:
            return
        fault = self._fault("protected", Provoked("a part fails"), 1, one.owner.name)
        self.planted.append((one, fault))

    def held_up(self, one: Incarnation) -> bool:
        """Tell whether the guard cannot start processes in time for what is done to it."""
        return bool(self._world.processes.refuses) or self._world.loop.time() < self.held_until

    def end(self) -> None:
        """All trouble is over."""
        self.ended = True
        self._between = None
        world = self._world
        world.kernel.faults.clear()
        world.processes.refuses = None
        executor = world.loop._default_executor  # type: ignore[attr-defined]
        executor.slow = 0.0
        for number in list(self._taken):
            self._give_back(number)
        for one in world.processes.all:
            one.dies_in_turns = None
            one.kernel.dies_in = None
            if one.owner.stopped:
                one.go_on()
            if one.alive:
                self.idle_since.pop(one.pid, None)
        if (one_guard := world.current) is not None:
            one_guard.kernel.dies_in = None
        world.panic_file.unlink(missing_ok=True)
