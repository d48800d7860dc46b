"""Run one worker: started by the supervisor, never by hand."""

from __future__ import annotations

from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.entry import give_up_privileges, run_child, take_priority
from rstguard.ipc.messages import Start
from rstguard.kernel.linux import Linux
from rstguard.worker.worker import Worker

_PRIORITY = -10
"""Each honest client's handshake waits for this."""


def _begin(channel: ChildEnd, start: Start) -> Worker:
    worker = Worker(channel, start, Linux())
    take_priority(_PRIORITY)
    give_up_privileges(tell=False)  # the sweeper, of which there is one, tells
    return worker


if __name__ == "__main__":
    run_child("worker", _begin)
