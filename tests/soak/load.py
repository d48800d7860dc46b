"""Everything at once that a gateway may meet: honest clients, attackers, and an administrator."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import host, neighbours, source
from tests.support.traffic import Link, Service, answer, connect, retransmissions, segments

HONEST, OUTSIDE, CROWD, IDLE = 8001, 8002, 8003, 8004
POLICY = f"""
version: 1
name: soak
sweep_every: 1s
shun_for: 2s
protect: {{interfaces: [out]}}
syn_budget: {{rate: 500/s, ports: [{HONEST}]}}
rules:
  - {{name: rate, measure: syn_rate, over: 100/s, burst: 200, then: ban, for: 5s}}
  - {{name: crowd, measure: connection_rate, ports: [{CROWD}], over: 1/m, burst: 3,
     then: ban, for: 3s}}
  - {{name: half-open, measure: half_open, ports: [{OUTSIDE}], over: 50, then: ban, for: 5s}}
  - {{name: ports, measure: distinct_ports, over: 15, within: 10s, then: ban, for: 5s}}
  - {{name: flags, measure: bad_flags, over: 5/s, then: drop}}
  - {{name: stray, measure: out_of_state, over: 50/s, then: drop}}
  - {{name: short, measure: short_connections, ports: [{CROWD}], shorter_than: 1s, over: 100/m,
     then: ban, for: 5s}}
  - {{name: idle, measure: idle, ports: [{IDLE}], over: 2s, then: reset}}
"""
OTHER_POLICY = POLICY.replace("over: 15, within", "over: 20, within").replace("500/s", "600/s")


class Honest:
    """Clients that connect, talk and leave, a few of which stay, and what became of them.

    `spare` names the seconds (monotonic) around which a failure has a cause of its own.
    """

    def __init__(self, lab: ThreeHosts, services: list[Service], stay: int) -> None:
        self.good, self.failures = 0, list[tuple[float, str]]()
        self.repeated = 0
        self.broken: list[str] = []
        self._lab = lab
        self._services = services
        self._over = threading.Event()
        self._stay = [service.connect(source(service.v6)) for service in services * stay]
        self._threads = [threading.Thread(target=self._visit, args=(one,)) for one in services]
        self._threads.append(threading.Thread(target=self._talk))

    def _visit(self, service: Service) -> None:
        addresses = itertools.cycle(neighbours(service.v6, 2))  # one for each worker
        while not self._over.wait(0.02):
            address, began = next(addresses), time.monotonic()
            try:
                link = service.connect(address)
                try:
                    link.talk()
                    self.repeated += retransmissions(link.client)
                finally:
                    link.close()
            except (OSError, AssertionError) as error:
                self.failures.append((began, repr(error)))
            else:
                self.good += 1

    def _talk(self) -> None:
        while not self._over.wait(0.2):
            for link in self._stay:
                try:
                    link.talk()
                except (OSError, AssertionError) as error:
                    self.broken.append(repr(error))

    def __enter__(self) -> Honest:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(20)


class Trouble:
    """What attackers and the administrator do, one thing after the other, drawn by chance."""

    def __init__(self, guard: Guard, target: str, idle: Service, victim: int, seed: int) -> None:
        self.guard, self.lab, self.target, self.idle = guard, guard.lab, target, idle
        self.victim = victim
        """Index of the worker that is killed now and then."""
        self.killed: list[float] = []
        self.done: dict[str, int] = {}
        self._chance = random.Random(seed)
        self._applied = 0
        self._links: list[Link] = []

    def next(self) -> None:
        """Do one of these things."""
        things: tuple[Callable[[], None], ...] = (
            self.forged_in_budget, self.forged_outside, self.one_source, self.offender, self.scan,
            self.hoard, self.bad_flags, self.resets, self.policy, self.bans, self.kills,
        )  # fmt: skip
        thing = self._chance.choice(things)
        thing()
        self.done[thing.__name__] = self.done.get(thing.__name__, 0) + 1

    def _address(self) -> str:
        return host(20_000 + self._chance.randrange(10_000), self._chance.choice((1, 2)), False)

    def _hping(self, *words: str) -> None:
        with self.lab.inside("client"):
            command = ["hping3", "-q", *words, self.target]
            subprocess.run(command, capture_output=True, check=False, timeout=30)

    def forged_in_budget(self) -> None:
        self._hping("--rand-source", "-S", "-i", "u60", "-c", "40000", "-p", str(HONEST))

    def forged_outside(self) -> None:
        self._hping("--rand-source", "-S", "-i", "u60", "-c", "20000", "-p", str(OUTSIDE))

    def one_source(self) -> None:
        self._hping("-a", self._address(), "-S", "-i", "u100", "-c", "10000", "-p", str(OUTSIDE))

    def bad_flags(self) -> None:
        self._hping(
            "-a", self._address(), "-S", "-F", "-i", "u200", "-c", "3000", "-p", str(HONEST)
        )

    def resets(self) -> None:
        self._hping("-a", self._address(), "-R", "-i", "u200", "-c", "3000", "-p", str(HONEST))

    def scan(self) -> None:
        address = self._address()
        for port in range(9000, 9030):
            segments(self.lab, address, self.target, port, "S", 1)

    def offender(self) -> None:
        address = self._address()
        for _ in range(6):
            answer(self.lab, address, self.target, CROWD)

    def hoard(self) -> None:
        """Connections that fall silent: the sweep resets them."""
        for link in self._links:
            link.close()
        self._links = []
        for _ in range(5):
            with contextlib.suppress(OSError):
                self._links.append(self.idle.connect(self._address()))

    def policy(self) -> None:
        self._applied += 1
        self.guard.apply(OTHER_POLICY if self._applied % 2 else POLICY)

    def bans(self) -> None:
        address = self._address()
        assert self.guard.cli("ban", "add", address, "--for", "60s").returncode == 0
        assert self.guard.cli("ban", "remove", address).returncode == 0

    def kills(self) -> None:
        one = None
        with contextlib.suppress(OSError):
            one = connect(self.lab, self._address(), self.target, IDLE)
            self.guard.kill(source=one.getsockname()[0])
        if one:
            one.close()

    def kill_worker(self) -> None:
        """One worker dies; the other never does."""
        pid = self.guard.status()["workers"][self.victim]["pid"]
        if pid:
            self.killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)
