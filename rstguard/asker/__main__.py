"""Run the asker: started by the supervisor, never by hand."""

from __future__ import annotations

from rstguard.asker.asker import Asker
from rstguard.ipc.channel import ChildEnd
from rstguard.ipc.entry import give_up_privileges, run_child, take_priority
from rstguard.ipc.messages import Start
from rstguard.kernel.linux import Linux

_PRIORITY = -10
"""Each honest RST waits for this."""


def _begin(channel: ChildEnd, start: Start) -> Asker:
    asker = Asker(channel, start, Linux())
    take_priority(_PRIORITY)
    give_up_privileges(tell=False)  # the sweeper, of which there is one, tells
    return asker


if __name__ == "__main__":
    run_child("asker", _begin)
