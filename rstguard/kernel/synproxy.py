"""What the kernel tells of the cookies it gives out: counts, and the services over budget."""

from __future__ import annotations

from pathlib import Path

from rstguard.engine.address import parse_address
from rstguard.engine.service import Service
from rstguard.kernel.command import Commands
from rstguard.kernel.elements import ipset
from rstguard.kernel.seam import CookieCounts
from rstguard.kernel.syn_budget import ENGAGED_SECONDS, engaged_set

_COUNTS = Path("/proc/thread-self/net/stat/synproxy")


def counts() -> CookieCounts:
    """Return the kernel's counts; zeros while SYNPROXY was never used.

    One line for each core, in hexadecimal: entries, syn_received, cookie_invalid, cookie_valid, …
    (synproxy_cpu_seq_show in net/netfilter/nf_synproxy_core.c).
    """
    try:
        lines = _COUNTS.read_text().splitlines()[1:]
    except FileNotFoundError:
        return CookieCounts(0, 0, 0)
    rows = [[int(word, 16) for word in line.split()] for line in lines]
    return CookieCounts(sum(r[1] for r in rows), sum(r[3] for r in rows), sum(r[2] for r in rows))


def seconds_since_over(kernel: Commands) -> dict[Service, int]:
    """Return the services that were lately over budget, and how many seconds ago they last were.

    Raises:
        NotThere: the policy in force has no budget.
        KernelError: the sets may not be read.
    """
    found: dict[Service, int] = {}
    for family in (4, 6):
        for line in ipset(kernel, "save", engaged_set(family)).splitlines():
            words = line.split()
            if words[0] == "add" and words[3:4] == ["timeout"]:
                address, _, port = words[2].partition(",tcp:")
                service = Service(parse_address(address), int(port))
                found[service] = max(0, ENGAGED_SECONDS - int(words[4]))
    return found
