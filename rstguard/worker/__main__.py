"""Run one worker: started by the supervisor, never by hand."""

from __future__ import annotations

from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.ending import last_words
from rstguard.ipc.entry import run_child
from rstguard.ipc.messages import Start
from rstguard.kernel.inject import Injector
from rstguard.kernel.nfqueue import Queue, QueueState, states
from rstguard.kernel.sets import Sets
from rstguard.worker.worker import Worker


class _Linux:
    """The kernel of the namespace that this process runs in."""

    def sets(self) -> Sets:
        return Sets()

    def injector(self) -> Injector:
        return Injector()

    def queue(self, number: int, fail_open: bool) -> Queue:
        return Queue(number, fail_open)

    def queues(self) -> dict[int, QueueState]:
        return states()


def _serve(channel: ChildEnd, start: Start) -> None:
    with last_words(channel):
        Worker(channel, start, _Linux()).run()


if __name__ == "__main__":
    run_child("worker", _serve)
