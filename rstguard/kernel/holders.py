"""Who holds a large share of the connections that there are now, guard or not.

Only what the tracker calls established counts; whether a server has answered on it nobody can tell
where nothing counts bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from rstguard.engine.address import Prefix, prefix_of
from rstguard.engine.flow import LIVE
from rstguard.engine.large import LEAST
from rstguard.engine.shares import DEFAULT_SHARES
from rstguard.kernel import NotThere
from rstguard.kernel.seam import Kernel

_WIDTHS: Final = 32, 64
"""One source, where a policy says nothing else."""
_MOST_ROUTES: Final = 100_000
"""Different sources whose route is asked for, at about 10 µs each; those that hold most."""
_TRACKED: Final = "net.netfilter.nf_conntrack_count"


class Holder(NamedTuple):
    """A source that holds `connections`, which are `percent` of all that come by an interface.

    `interface` is "" for what a running guard has found, of all proven connections.
    """

    source: Prefix
    percent: int
    connections: int
    interface: str = ""


def holders(kernel: Kernel) -> tuple[Holder, ...]:
    """Return them, who holds most first; nothing is loaded if nothing is tracked yet.

    Raises:
        KernelError: the connection table, or routes, could not be read.
    """
    try:
        if kernel.read_sysctl(_TRACKED) == "0":
            return ()
    except NotThere:
        return ()
    counts: Counter[Prefix] = Counter()
    one_of: dict[Prefix, int] = {}
    with kernel.table() as table:
        for flow in table.dump(assured=True):
            if flow.state in LIVE and flow.seen_reply:
                address = flow.original.source
                source = prefix_of(address, *_WIDTHS)
                counts[source] += 1
                one_of[source] = address
    if max(counts.values(), default=0) < LEAST:
        return ()
    sources = [source for source, _ in counts.most_common(_MOST_ROUTES)]
    ways = dict(zip(sources, kernel.ways([one_of[one] for one in sources]), strict=True))
    by: Counter[str] = Counter()
    for source, way in ways.items():
        by[way] += counts[source]
    return tuple(
        Holder(source, counts[source] * 100 // by[way], counts[source], way)
        for source, way in ways.items()
        if way and counts[source] >= LEAST
        if counts[source] * 100 >= by[way] * DEFAULT_SHARES.least
    )
