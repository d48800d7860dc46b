"""Run the sweeper: started by the supervisor, never by hand."""

from __future__ import annotations

from collections.abc import Sequence

from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.ending import last_words
from rstguard.ipc.entry import run_child
from rstguard.ipc.messages import Start
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.inject import Injector
from rstguard.kernel.routes import ways
from rstguard.kernel.sets import Sets
from rstguard.sweeper.sweeper import Sweeper


class _Linux:
    """The kernel of the namespace that this process runs in."""

    def sets(self) -> Sets:
        return Sets()

    def table(self) -> Conntrack:
        return Conntrack()

    def injector(self) -> Injector:
        return Injector()

    def ways(self, addresses: Sequence[int]) -> list[str]:
        return ways(addresses)


def _serve(channel: ChildEnd, start: Start) -> None:
    with last_words(channel):
        Sweeper(channel, start, _Linux()).run()


if __name__ == "__main__":
    run_child("sweeper", _serve)
