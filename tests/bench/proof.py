"""Handshakes tried out in others' names, by the million: who is proven, banned or reset by them."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rstguard.engine.address import parse_address
from rstguard.kernel.conntrack import Conntrack
from rstguard.kernel.marks import Marks
from rstguard.lab.forging import GUESSES, Forger
from rstguard.lab.guard import GuardProcess
from tests.bench.figures import Figure, at_most, seen
from tests.bench.gateway import ROOT, SERVER, Site
from tests.support.traffic import Link

TRIALS, PACKETS = 20, 1_000_000
SAMPLES = sorted((ROOT / "policies").glob("*.yaml"))
_ABUSE = 2_000
"""SYNs in the victim's name, behind the handshakes of a trial."""
_VISITS = 3
_REPORTED = 1.0
"""Seconds within which what was decided is told."""


def proof(trials: int = TRIALS, packets: int = PACKETS) -> Iterator[Figure]:
    """Forged handshakes, then SYNs, in silent hosts' and visitors' names, under every sample."""
    for path, budget in itertools.product(SAMPLES, (False, True)):
        name = f"proof: {path.stem}, {'a' if budget else 'no'} SYN budget"
        port = 22 if path.stem == "ssh-bastion" else 443
        with Site() as site, _guarded(site, path, port, budget) as guard:
            for silent in (True, False):
                run = _Run(site, guard, port, silent, packets)
                for number in range(trials):
                    run.trial(f"198.51.100.{1 + 16 * (1 + number % 14) + 2 * silent}")
                who = "silent victims" if silent else "visitors"
                yield from run.figures(f"{name}: {who}", trials)


@contextmanager
def _guarded(site: Site, path: Path, port: int, budget: bool) -> Iterator[GuardProcess]:
    """Run a sample, but for interface and addresses."""
    text = path.read_text()
    for key, value in (("interfaces", "out"), ("destinations", SERVER)):
        text = re.sub(rf"{key}: \[[^]]*\]", f"{key}: [{value}]", text)
    if budget:
        text = text.replace(
            "\nrules:", f"\nsyn_budget: {{rate: 1000/s, ports: [{port}]}}\nrules:", 1
        )
    guard = site.guard(text)
    try:
        yield guard
    finally:
        guard.stop()


@dataclass
class _Run:
    """The trials against one policy; `silent`: nobody is at the victims' addresses."""

    site: Site
    guard: GuardProcess
    port: int
    silent: bool
    packets: int
    sent: int = 0
    proven: int = 0
    banned: int = 0
    broken: int = 0
    visits: int = 0
    deceived: int = 0

    def trial(self, victim: str) -> None:
        """Forge in one victim's name, and look what came of it."""
        site, drop = self.site, ("-d", victim, "-j", "DROP")
        if self.silent:
            site.run("client", "iptables", "-w", "-t", "raw", "-A", "PREROUTING", *drop)
        with site.listen("server", self.port) as listener:
            links = []
            for _ in range(0 if self.silent else _VISITS):
                client = site.client_socket(victim)
                client.connect((SERVER, self.port))
                links.append(Link(client, listener.accept()[0]))
            self._visit(links)
            before = self._bans()
            self._forge(victim)
            time.sleep(_REPORTED)
            self.banned += self._bans() - before
            told = self.guard.ask("explain", source=victim)
            self.proven += bool(told["proven"]) and self.silent
            self.deceived += self._believed(victim)
            self._visit(links)
            for link in links:
                link.close()
        if self.silent:
            site.run("client", "iptables", "-w", "-t", "raw", "-D", "PREROUTING", *drop)

    def _forge(self, victim: str) -> None:
        tries = max(1, (self.packets - _ABUSE) // (GUESSES + 1))
        with self.site.inside("client"):
            blind = Forger(victim, SERVER, self.port)
        with blind:
            for number in range(tries):
                blind.handshake(1000 + number)
            blind.syns(range(20_000, 20_000 + _ABUSE))
        self.sent += tries * (GUESSES + 1) + _ABUSE

    def _believed(self, victim: str) -> int:
        """Return how many connections of a source have a complete handshake for the tracker."""
        address = parse_address(victim)
        with self.site.inside("gateway"), Conntrack() as table:
            flows = table.dump(*Marks().established)
            return sum(flow.original.source == address for flow in flows)

    def _visit(self, links: list[Link]) -> None:
        """Use a visitor's connections: in the beginning, and behind the forgery."""
        for link in links:
            self.visits += 1
            try:
                link.talk()
            except (OSError, AssertionError):
                self.broken += 1

    def _bans(self) -> int:
        return sum(self.guard.status()["counts"].get("ban", {}).values())

    def figures(self, name: str, trials: int) -> Iterator[Figure]:
        """Return what was found in all trials."""
        note = f"{trials} trials of {self.sent // trials:,} forged packets each"
        yield at_most(0, f"{name}: banned", [float(self.banned)], "", note)
        if self.silent:
            yield at_most(0, f"{name}: proven", [float(self.proven)], "", note)
            believed = f"{name}: handshakes that the tracker took for complete"
            yield seen(believed, [float(self.deceived)], "", note)
        else:
            of = f"of {self.visits}"
            reset = f"{name}: connections reset, looked at before and after"
            yield at_most(0, reset, [float(self.broken)], of, note)
