"""The composition root: builds the parts of a guard and names who needs whom."""

from __future__ import annotations

from rstguard.control.commands import Requests
from rstguard.control.protocol import serve
from rstguard.supervisor.options import Options
from rstguard.supervisor.supervisor import Supervisor


async def guard(options: Options) -> None:
    """Guard a network namespace until SIGTERM or SIGINT, then undo everything.

    Raises:
        KernelError: the guard could not be brought up, or not be taken down whole.
    """
    supervisor = Supervisor(options)
    await supervisor.run(Requests(supervisor).answer, serve)
