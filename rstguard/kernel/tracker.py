"""What the administrator has the connection tracker do, and whether its table has room."""

from __future__ import annotations

from typing import Final, NamedTuple

from rstguard.kernel.seam import Kernel, Lost

_MOST = "net.netfilter.nf_conntrack_max"
_LIBERAL = "net.netfilter.nf_conntrack_tcp_be_liberal"


class Tracker(NamedTuple):
    """What the rules depend on."""

    most: int = 262_144
    """Connections that it remembers, of both families."""
    liberal: bool = False
    """Whether it takes segments of any number, so that a first ACK proves nothing."""


FULL_PERCENT: Final = 95
"""From that fill on the table counts as full: a flood takes the rest within a second."""
_CROWDED_PERCENT: Final = 80
"""Above that what the kernel dropped is put down to it; below, two first packets of one connection
count as dropped, too."""


class Room:
    """Whether the table has room for connections, by looks some seconds apart.  Pure."""

    def __init__(self) -> None:
        self._last: Lost | None = None

    def look(self, count: int, most: int, lost: Lost) -> str:
        """Return what is wrong, and what to do, or "".

        `count` and `most` are entries that there are and may be, `lost` what did not get in so far.
        """
        before, self._last = self._last, lost
        news = Lost(*(a - b for a, b in zip(lost, before or lost, strict=True)))
        percent = 100 * count // most if most else 0
        more = (
            f"`sysctl -w net.netfilter.nf_conntrack_max={2 * most}`, or `rstguard install`, which "
            "sizes it by memory"
        )
        if percent >= FULL_PERCENT:
            return (
                f"the connection table is full: {count} of {most} entries ({percent} %), so new "
                f"connections are dropped, whoever's they are: {more}"
            )
        dropped = news.drop + news.insert_failed if percent >= _CROWDED_PERCENT else 0
        if news.early_drop > 0 or dropped > 0:
            return (
                f"the connection table was full: {max(news.early_drop, 0) + dropped} connections "
                f"were dropped or given up for others: {more}"
            )
        if news.chain_too_long > 0:
            return (
                f"{news.chain_too_long} connections were dropped, as the connection table has too "
                f"few buckets: `sysctl -w net.netfilter.nf_conntrack_buckets={most}`"
            )
        return ""


USUAL: Final = Tracker()
"""As Linux has it where there is much memory."""


def look(kernel: Kernel) -> Tracker:
    """Return how the tracker is set.

    Raises:
        KernelError: it could not be asked.
    """
    return Tracker(int(kernel.read_sysctl(_MOST)), kernel.read_sysctl(_LIBERAL) != "0")
