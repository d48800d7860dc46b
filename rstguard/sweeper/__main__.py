"""Run the sweeper: started by the supervisor, never by hand."""

from __future__ import annotations

from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.entry import give_up_privileges, run_child, take_priority
from rstguard.ipc.messages import Start
from rstguard.kernel.linux import Linux
from rstguard.sweeper.sweeper import Sweeper


def _begin(channel: ChildEnd, start: Start) -> Sweeper:
    sweeper = Sweeper(channel, start, Linux())
    take_priority(0)  # the supervisor's, which it began with, is not for long work
    give_up_privileges(tell=True)
    return sweeper


if __name__ == "__main__":
    run_child("sweeper", _begin)
