"""One supervisor process of a world, from its start to its end, and how it is asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rstguard.daemon import build
from rstguard.ipc.requests import Answer, ControlError
from rstguard.kernel import KernelError
from rstguard.policy.load import parse
from rstguard.supervisor.options import Options
from rstguard.supervisor.spawn import Kind, Spawned
from tests.simulation.loop import OWNER, Owner

if TYPE_CHECKING:
    from tests.simulation.world import World

QUEUE: Final = 5640


class Broken(Exception):
    """An invariant does not hold; the text is its sentence, and what was found."""


class Gone(Exception):
    """The supervisor that was asked is dead."""


class Refused(Exception):
    """A request was refused; the text says why."""


class Provoked(RuntimeError):
    """An exception that nobody expects, put there on purpose."""


class Notices:
    """What systemd is told."""

    period = 1.0

    def __init__(self) -> None:
        self.line = ""
        self.signs = 0
        self.is_ready = False

    def ready(self) -> None:
        self.is_ready = True

    def reloading(self) -> None:
        self.is_ready = False

    def stopping(self) -> None:
        self.is_ready = False

    def alive(self) -> None:
        self.signs += 1

    def status(self, sentence: str) -> None:
        self.line = sentence


class Incarnation:
    """One supervisor process, from its start to its end."""

    def __init__(self, world: World, number: int) -> None:
        self.owner = Owner(f"supervisor {number}")
        self.world = world
        self.began = world.loop.time()
        self.serves = self.stopping = False
        self.up = False
        """Whether it has been brought up."""
        self.error = ""
        self.over = False
        self.notices = Notices()
        self.spawned: list[Spawned] = []
        self.pending: set[asyncio.Future[Any]] = set()
        self.kernel = world.kernel.view(self.owner, lambda: world.kill_supervisor(self))
        self.task: asyncio.Task[None] | None = None
        self.context = copy_context()
        self.context.run(OWNER.set, self.owner)

    def launch(self) -> None:
        """Start it.

        Raises:
            OSError, PolicyError: it cannot be started now.
        """
        self.context.run(self._launch)

    def _launch(self) -> None:
        world = self.world
        text = world.file.read_text()
        kinds: list[Kind] = ["worker"] * world.workers
        options = Options(
            kernel=self.kernel,
            policy=parse(text, str(world.file)),
            file=str(world.file),
            directory=world.run_directory,
            state=world.state_directory,
            queue=QUEUE,
            spawned=tuple(map(self._spawn, [*kinds, "sweeper"])),
            keep_bans=world.keep_bans,
            spawn=self._spawn,
            claim=self._claim,
            wall=world.wall,
        )
        self.supervisor, self.commands, service = build(options)
        notifier: Any = self.notices
        service.notifier = notifier
        self.parts = self.supervisor._parts
        self.guard = self.parts.guard
        collector: Any = _Collector(world)
        self.guard.events.sinks.append(collector)
        self.task = world.loop.create_task(self._run())

    def _spawn(self, kind: Kind) -> Spawned:
        one = self.world.processes.spawn(kind)
        self.spawned.append(one)
        return one

    @contextlib.contextmanager
    def _claim(self, *_: Path) -> Iterator[None]:
        """Stand for `rstguard.supervisor.claims`: the world never starts two at once."""
        yield

    async def _run(self) -> None:
        try:
            await self.supervisor.run(self.commands.answer, self._serve)
        except KernelError as error:
            self.error = str(error)
        self.over = True
        self.world.ended(self)

    async def _serve(self, _directory: Path, _answer: Answer) -> Any:
        self.serves = self.up = True
        return self

    def close(self) -> None:
        """Listen no more."""
        self.serves = False

    async def ask(self, **request: Any) -> Any:
        """Send a request as the command line does.

        Raises:
            Refused: the guard says no.
            Gone: there is no guard to say anything.
        """
        loop = self.world.loop
        if self.owner.dead or not self.serves:
            raise Gone
        answer: asyncio.Future[Any] = loop.create_future()
        self.pending.add(answer)
        self.context.run(loop.create_task, self._carry(request, answer))
        try:
            return await answer
        finally:
            self.pending.discard(answer)

    async def _carry(self, request: dict[str, Any], answer: asyncio.Future[Any]) -> None:
        try:
            said = await self.commands.answer({"account": "root", **request})
        except ControlError as error:
            if not answer.done():
                answer.set_exception(Refused(str(error)))
        except Provoked:
            self.world.excuse(self)
            if not answer.done():
                answer.set_exception(Gone())
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            self.world.broken(f"a request {request['command']} fails with {error!r}")
        else:
            if not answer.done():
                answer.set_result(said)

    def give_up(self) -> None:
        """Let all who wait for an answer know that none comes."""
        for one in self.pending:
            if not one.done():
                one.set_exception(Gone())


class _Collector:
    """Hands each event to the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def write(self, record: dict[str, Any], text: str) -> None:
        self._world.told(record, text)

    def close(self) -> None:
        pass
