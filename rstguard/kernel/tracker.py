"""What the administrator has the connection tracker do: read, and never changed."""

from __future__ import annotations

from typing import Final, NamedTuple

from rstguard.kernel.seam import Kernel

_MOST = "net.netfilter.nf_conntrack_max"
_LIBERAL = "net.netfilter.nf_conntrack_tcp_be_liberal"


class Tracker(NamedTuple):
    """What the rules depend on."""

    most: int = 262_144
    """Connections that it remembers, of both families."""
    liberal: bool = False
    """Whether it takes segments of any number, so that a first ACK proves nothing."""


USUAL: Final = Tracker()
"""As Linux has it where there is much memory."""


def look(kernel: Kernel) -> Tracker:
    """Return how the tracker is set.

    Raises:
        KernelError: it could not be asked.
    """
    return Tracker(int(kernel.read_sysctl(_MOST)), kernel.read_sysctl(_LIBERAL) != "0")
