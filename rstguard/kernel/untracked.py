"""Reads how many segments were hit by rules of which `status` tells.

Those of `rstguard.kernel.ingress`, before the tracker, of `rstguard.kernel.forgotten` and of
`rstguard.kernel.limiting`.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final

from rstguard.kernel import limiting
from rstguard.kernel.counters import hits
from rstguard.kernel.names import PREFIX
from rstguard.kernel.seam import Kernel

LOW_TTL: Final = "low_ttl"
SPOOFED: Final = "spoofed"
SPOOFED_PASSED: Final = "spoofed_passed"
STRAYS: Final = "strays"
ADOPTED: Final = "adopted"
"""What is counted: dropped for its few hops; spoofed and dropped; spoofed and only counted; of no
connection, and dropped by a valve; and connections that were adopted."""
LIMITED: Final = tuple(measure.value for measure in limiting.KINDS.values())
"""What is counted besides: segments beyond the rules of these measures, dropped by the kernel."""

_RULES: Final = {
    (f"{PREFIX}-low-ttl", "DROP"): LOW_TTL,
    (f"{PREFIX}-spoofed", "DROP"): SPOOFED,
    (f"{PREFIX}-spoofed", "RETURN"): SPOOFED_PASSED,
    (f"{PREFIX}-valve", "DROP"): STRAYS,
    **{(f"{PREFIX}-valve-{kind}", "DROP"): STRAYS for kind in limiting.KINDS},
    **{
        (f"{PREFIX}-{chain}-{kind}", "DROP"): measure.value
        for kind, measure in limiting.KINDS.items()
        for chain in ("over", "block")
    },
    (f"{PREFIX}-adopted", "CONNMARK"): ADOPTED,
}
COMMANDS: Final = tuple(
    [tool, "-c", "-t", table]
    for tool in ("iptables-save", "ip6tables-save")
    for table in ("raw", "mangle")
)
"""What prints the rules before the tracker and right behind it, with their counters."""


class Hits:
    """Adds up what the kernel counts anew whenever the rules are replaced.

    So a look right before such a change and one right after it are needed
    (`rstguard.kernel.footprint`).
    """

    def __init__(self) -> None:
        self._whole = threading.Lock()  # who looks in between would count twice
        self._untold: Counter[str] = Counter()
        self._seen: Counter[tuple[int, str]] = Counter()
        self.total: Counter[str] = Counter()
        """By `LOW_TTL`, `SPOOFED`, `SPOOFED_PASSED`, `STRAYS`, `ADOPTED` and `LIMITED`."""
        self.printed: list[str] = []
        """What `COMMANDS` printed at the last look."""
        self.replaced = 0
        """How often the rules were replaced: then all that they count begins at 0."""

    def news(self, kernel: Kernel) -> Counter[str]:
        """Return what has come since this was last asked, in packets.

        Raises:
            KernelError: the kernel could not be asked.
        """
        self.look(kernel)
        with self._whole:
            news, self._untold = self._untold, Counter()
            return news

    def look(self, kernel: Kernel) -> None:
        """Count what has come.

        Raises:
            KernelError: the kernel could not be asked.
        """
        with self._whole:
            self._untold += (came := self._look(kernel))
            self.total += came

    def _look(self, kernel: Kernel) -> Counter[str]:
        news: Counter[str] = Counter()
        self.printed = kernel.run_each(COMMANDS)
        for number, printed in enumerate(self.printed):
            for what, packets in _counted(printed).items():
                last = self._seen[number, what]
                news[what] += packets - last if packets >= last else packets
                self._seen[number, what] = packets
        return news


def _counted(printed: str) -> Counter[str]:
    """Sum up the rules that count: they have no match."""
    found: Counter[str] = Counter()
    for packets, _, chain, rule in hits(printed):
        words = rule.split()
        if words[0] == "-j" and (what := _RULES.get((chain, words[1]))):
            found[what] += packets
    return found
