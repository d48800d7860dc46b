"""Honest traffic beside a neighbour, with the guard and, at the same time and elsewhere, without.

Two equal networks are made.  In both the neighbour does what it does; one of them is guarded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rstguard.lab import LabError
from rstguard.lab.network import Host
from rstguard.lab.waiting import wait_until
from tests.neighbours.mixed import Tally, Target, run
from tests.support.beside import beside
from tests.support.guard import Guard
from tests.support.network import SERVER4, SERVER6, ThreeHosts
from tests.support.sources import give_sources, source

PROTECTED, PLAIN = 8201, 8301
"""Two services, of which the first is protected."""
POLICY = """\
version: 1
name: neighbours
blocking: drop
forged_resets: hold
protect: {interfaces: [INTERFACE], ports: ["8200-8299"]}
syn_budget: {rate: 20000/s, ports: ["8200-8299"]}
sweep_every: 500ms
rules:
  - {name: syns, measure: syn_rate, over: 100/s, burst: 200, then: ban, for: 10m}
  - {name: rate, measure: connection_rate, over: 100/s, burst: 200, then: ban, for: 10m}
  - {name: opens, measure: half_open, over: 40, then: ban, for: 10m}
  - {name: subnet, measure: syn_rate, per: {ipv4: 24, ipv6: 48}, over: 1000/s, then: drop}
  - {name: strays, measure: out_of_state, over: 20/s, burst: 20, then: ban, for: 10m}
  - {name: flags, measure: bad_flags, over: 5/s, then: drop}
  - {name: resets, measure: reset_rate, over: 20/s, then: ban, for: 10m}
  - {name: scan, measure: distinct_ports, over: 15, within: 10s, then: ban, for: 1h}
  - {name: hoard, measure: connections, over: 100, then: reset}
  - {name: short, measure: short_connections, shorter_than: 1s, over: 300/m, then: ban, for: 10m}
  - {name: slow, measure: slow, after: 10s, under: 1 B/s, then: reset}
  - {name: stalled, measure: stalled, window: 100, over: 10s, then: reset}
  - {name: idle, measure: idle, over: 15m, then: reset}
"""
_ENDS = ("client", "server")
_HARM = ("ban", "shun", "reset", "drop")


class Place(ThreeHosts):
    """The network of one run, and what a neighbour changes about its services."""

    def __init__(self) -> None:
        super().__init__("rgn", {"other": Host()})
        self.interface = "out"
        """Where clients come in, as the policy names it."""
        self.targets = [
            Target(f"{name} {family}", address, port, "server", port, (source(v6), source(v6)))
            for name, port in (("protected", PROTECTED), ("plain", PLAIN))
            for v6, family, address in ((False, "IPv4", SERVER4), (True, "IPv6", SERVER6))
        ]
        """The services and how clients reach them."""
        self.also: Callable[[Place], int] | None = None
        """More traffic, after the rest; it returns how many connections were whole."""

    def build(self) -> None:
        """Make all, and have RSTs counted at both ends."""
        super().build()
        give_sources(self)
        for place in _ENDS:
            for chain in ("PREROUTING", "OUTPUT"):
                self.both(place, f"-t raw -A {chain} -p tcp --tcp-flags RST RST")

    def reach(self, address4: str, address6: str, *, own: bool = False) -> None:
        """Have clients use other addresses of the services, the server's `own` or not."""
        self.targets = [
            target._replace(address=address, own=address if own else "")
            for target in self.targets
            for address in [address6 if ":" in target.address else address4]
        ]

    def sh(self, place: str, *commands: str) -> None:
        """Run commands in a host, one after another."""
        for command in commands:
            self.run(place, *command.split())

    def both(self, place: str, *rules: str) -> None:
        """Run iptables and ip6tables in a host."""
        for rule in rules:
            self.sh(place, f"iptables -w {rule}", f"ip6tables -w {rule}")

    def try_sh(self, place: str, *commands: str) -> None:
        """Run commands that may fail, as those that remove what is not there."""
        for command in commands:
            with contextlib.suppress(LabError):
                self.sh(place, command)

    def wait_for(self, log: str, text: str) -> None:
        """Wait until a program has written something to its log."""
        wait_until(lambda: text in self.log_tail(log, lines=100))

    def wait_file(self, name: str) -> None:
        """Wait until a program has made a file in the network's directory."""
        wait_until((self.directory / name).exists)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something is true, and cannot be asked for any more without an error."""

        def now() -> bool:
            with contextlib.suppress(LabError):
                return true()
            return False

        wait_until(now, 30)

    def made_resets(self) -> int:
        """Return how many RSTs have come to an end that the other had not sent."""
        sent, came = self._resets("OUTPUT"), self._resets("PREROUTING")
        ends = (("client", "server"), ("server", "client"))
        return sum(max(0, came[place] - sent[other]) for place, other in ends)

    def _resets(self, chain: str) -> dict[str, int]:
        counts = dict.fromkeys(_ENDS, 0)
        for place in _ENDS:
            for tool in ("iptables", "ip6tables"):
                for line in self.run(place, f"{tool}-save", "-c", "-t", "raw").splitlines():
                    if f" -A {chain} -p tcp -m tcp --tcp-flags RST RST" in line:
                        counts[place] += int(line[1:].partition(":")[0])
        return counts


def nothing(place: Place) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Neighbour:
    """What a neighbour does, in the network with the guard and in that without.

    `before` the guard starts, `after` it has, and `meanwhile`, again and again beside the traffic.
    """

    before: Callable[[Place], object] = nothing
    after: Callable[[Place], object] = nothing
    meanwhile: Callable[[Place], object] | None = None
    restored: bool = False
    """Whether it takes rules of the guard away, or goes before them, so that they are put back."""
    needs: tuple[str, ...] = ()
    """Programs without which it cannot be tried."""


@dataclass
class Run:
    """What came of the traffic of one network."""

    tally: Tally = field(default_factory=Tally)
    resets: int = 0
    """RSTs that neither end has sent."""


@dataclass
class Told:
    """What the guard has said and done meanwhile."""

    problems: set[str] = field(default_factory=set)
    harmed: dict[str, dict[str, int]] = field(default_factory=dict)


def _traffic(place: Place, neighbour: Neighbour) -> Run:
    with contextlib.ExitStack() as stack:
        if neighbour.meanwhile:
            stack.enter_context(beside(partial(neighbour.meanwhile, place), 0.4))
        tally = run(place, place.targets)
        if place.also:
            tally.add("also", place.also(place))
    return Run(tally, place.made_resets())


@contextlib.contextmanager
def _listening(guard: Guard, told: Told) -> Iterator[None]:
    lock = threading.Lock()

    def look() -> None:
        # The table's size is one for all namespaces of a machine: whoever sets it is heard of here.
        problems = {one for one in guard.status()["problems"] if "nf_conntrack_max" not in one}
        with lock:
            told.problems |= problems

    with beside(look, 0.3):
        yield
    look()
    wait_until(guard.filtering, 60)
    counts = guard.status()["counts"]
    told.harmed = {kind: counts[kind] for kind in _HARM if kind in counts}


def compare(neighbour: Neighbour, directory: Path) -> tuple[Run, Run, Told]:
    """Return what came of the control, of the guarded run, and what the guard said."""
    told = Told()
    with Place() as free, Place() as guarded, ThreadPoolExecutor(2) as pool:
        places = (free, guarded)
        for place in places:
            neighbour.before(place)
        policy = POLICY.replace("INTERFACE", guarded.interface)
        with Guard(guarded, policy, directory / "guard", workers=1) as guard:
            for place in places:
                neighbour.after(place)
            with _listening(guard, told):
                runs = [pool.submit(_traffic, place, neighbour) for place in places]
                control, tried = (one.result() for one in runs)
    return control, tried, told
