"""Run one worker: started by the supervisor, never by hand."""

from __future__ import annotations

from rstguard.ipc.channel import Channel
from rstguard.ipc.entry import run_child
from rstguard.ipc.messages import Start
from rstguard.worker.worker import Worker


def _serve(channel: Channel, start: Start) -> None:
    Worker(channel, start).run()


if __name__ == "__main__":
    run_child("worker", _serve)
