"""What `status` tells of handshakes that are still open, service by service."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from rstguard.engine.ruleset import RuleSet
from rstguard.engine.service import Service
from rstguard.kernel import NotThere, half_open
from rstguard.kernel.seam import ElementSets, Kernel
from rstguard.kernel.services import Known, Services


class Open(NamedTuple):
    """Handshakes of a service that its clients have not completed, as the kernel counts them.

    `open` of them count for `half_open`, up to `most`; `beside` are of sources proven lately, which
    pass until there are as many again.  If `shared`, they are those of all services without lists
    of their own.
    """

    open: int
    beside: int
    most: int
    shared: bool


def read(kernel: Kernel, ruleset: RuleSet, known: Known) -> dict[Service, Open]:
    """Return the counts of the services that are counted; `known` are those with rules in place.

    The header of a list tells how many of its elements have time left (mtype_ext_size in
    ip_set_hash_gen.h), so none that is over is counted, and no element is read.

    Raises:
        KernelError: the kernel could not be asked.
    """
    lists = {}
    for family in (4, 6):
        lists.update(half_open.names(Services(ruleset, family, known)))
    if not lists:
        return {}
    users = Counter(lists.values())
    with kernel.sets() as sets:
        held = {names: _entries(sets, names) for names in users}
    return {
        service: Open(*counts, names[2], shared=users[names] > 1)
        for service, names in lists.items()
        if (counts := held[names]) is not None
    }


def _entries(sets: ElementSets, names: tuple[str, str, int]) -> tuple[int, int] | None:
    """Return how much the lists hold, None while they are not there, as the rules change."""
    try:
        return sets.entries(names[0]), sets.entries(names[1])
    except NotThere:
        return None
