"""One scenario from beginning to end: the attack without the guard, then the same with it."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from rstguard.ipc.requests import ControlError
from rstguard.kernel.command import own_program
from rstguard.lab import LabError
from rstguard.lab.attacks import Attack
from rstguard.lab.bench.peers import write_rules
from rstguard.lab.client import Request
from rstguard.lab.guard import GuardProcess, leftovers
from rstguard.lab.innocents import Innocent
from rstguard.lab.network import Network, stop
from rstguard.lab.observer import Observation
from rstguard.lab.report import (
    GUARDED,
    WITHOUT,
    WRITTEN,
    Guard,
    Half,
    Innocents,
    Result,
    legitimate,
    reached,
    sum_up,
)
from rstguard.lab.scenarios import LEARNED, Scenario
from rstguard.lab.server import CAPACITY, start_server
from rstguard.lab.topology import Lab
from rstguard.lab.usage import cpu_seconds
from rstguard.lab.waiting import wait_until

Progress = Callable[[str, float], None]
"""Called with what goes on and how much of this half is done (0 to 1)."""

_READY_SECONDS = 20.0
_SETTLE_SECONDS = 30.0
_STEP = 0.1


def run_scenario(
    scenario: Scenario, seconds: float, progress: Progress, beside: bool = False
) -> Result:
    """Run both halves; what keeps one from running becomes the result's `error`.

    `beside` them the attack meets hand-written rules.
    """
    without = written = None
    try:
        without = run_half(scenario, seconds, progress, WITHOUT)
        if beside:
            written = run_half(scenario, seconds, progress, WRITTEN)
        guarded = run_half(scenario, seconds, progress, GUARDED)
    except LabError as error:
        return Result(scenario, without, error=str(error), written=written)
    return Result(scenario, without, guarded, written=written)


def run_half(scenario: Scenario, seconds: float, progress: Progress, met: str) -> Half:
    """Run one half in a lab of its own; `met` is `WITHOUT`, `WRITTEN` or `GUARDED`.

    Raises:
        LabError: something in the lab did not start, did not answer, or attacked nothing.
    """
    attack = scenario.plan(seconds)
    name = f"{scenario.name} {met}"
    progress(f"{name}: building the network", 0)
    with Lab() as lab:
        for rule in attack.rules:
            lab.run("gateway", "iptables", "-w", *rule)
        start_server(lab, connections=scenario.connections or CAPACITY, listens=attack.listens)
        observer = start_program(lab, "server", "observer")
        client = start_program(lab, "client", "client", *attack.clients)
        guard = None
        if met == WRITTEN:
            write_rules(lab)
        elif met == GUARDED:
            guard = GuardProcess(lab, scenario.policy, lab.directory / "runtime")
            guard.start(whole=True)
            _settle(guard, attack.asked)
        for command in attack.prepare:
            lab.run("attacker", *command)
        others = _Others(lab, attack)
        used = cpu_seconds(guard.pid) if guard else 0.0
        begin = time.monotonic()
        attackers = [
            lab.start("attacker", *command, log=f"attack-{number}.log")
            for number, command in enumerate(attack.commands)
        ]
        while (past := time.monotonic() - begin) < seconds:
            progress(f"{name}: under attack", past / seconds)
            time.sleep(min(_STEP, seconds - past))
        end = time.monotonic()
        used = cpu_seconds(guard.pid) - used if guard else 0.0
        progress(f"{name}: collecting", 1)
        failed = [process.poll() not in (None, 0) for process in attackers]
        for process in attackers:
            stop(process, patience=2)
        forged, innocents = others.collect()
        learned = None
        if scenario.measure == LEARNED:
            learned = len((lab.directory / "attack-0.log").read_text(encoding="utf-8").splitlines())
        did = _account(guard, 100 * used / (end - begin)) if guard else None
        seen = Observation.from_json(collect(lab, observer, "observer"))
        requests = [Request(*row) for row in json.loads(collect(lab, client, "client"))]
        honest = legitimate(requests, begin, end)
        arrived = reached(seen, scenario, begin, end, honest, innocents, learned)
        # SYNPROXY, among the hand-written rules, may let nothing of an attack through.
        if met != WRITTEN and not arrived.packets and not forged:
            why = lab.log_tail(f"attack-{failed.index(True)}.log") if any(failed) else "no reason"
            raise LabError(f"The attack of {scenario.name} sent nothing to the server: {why}")
        return Half(round(end - begin, 1), honest, arrived, did, innocents)


def _settle(guard: GuardProcess, services: int) -> None:
    """Wait until it knows what so many services offer, as one does that has run for a while."""
    with suppress(TimeoutError):
        wait_until(lambda: len(guard.status()["shun"]["services"]) >= services, _SETTLE_SECONDS)


class _Others:
    """The onlooker and the innocents of an attack that has them; he sees how they connect."""

    def __init__(self, lab: Lab, attack: Attack) -> None:
        self._lab = lab
        self._onlooker = self._innocents = None
        if attack.onlooker:
            self._onlooker = start_program(lab, "wire", "onlooker", *attack.onlooker)
        if attack.idle + attack.busy:
            how_many = ("--idle", str(attack.idle), "--busy", str(attack.busy))
            self._innocents = start_program(lab, "client", "innocents", *how_many)

    def collect(self) -> tuple[int, Innocents | None]:
        """Return how many segments the onlooker forged, and then how the innocents fared."""
        forged, fared = 0, None
        if self._onlooker:
            forged = int(collect(self._lab, self._onlooker, "onlooker"))
        if self._innocents:
            rows = json.loads(collect(self._lab, self._innocents, "innocents"))
            fared = sum_up([Innocent(*row) for row in rows])
        return forged, fared


def _account(guard: GuardProcess, cpu_percent: float) -> Guard:
    """Ask a guard what it did, stop it, and look for what it left in the kernel."""
    if not guard.running:
        raise LabError(f"The guard ended during the attack: {guard.network.log_tail(guard.log)}")
    try:
        counts, bans = guard.status().get("counts", {}), guard.ask("ban-list")
    except ControlError as error:
        raise LabError(f"The guard does not answer: {error}") from error
    guard.end()
    return Guard(round(cpu_percent, 1), counts, bans, leftovers(guard.network))


def start_program(lab: Network, role: str, program: str, *options: str) -> subprocess.Popen[str]:
    """Start one of the lab's own programs and wait for its line ``ready``.

    Raises:
        LabError: it did not get ready.
    """
    command = own_program(f"rstguard.lab.{program}", *options)
    running = lab.start(role, *command, piped=True, log=f"{program}.log")
    assert running.stdout is not None
    readable = select.select([running.stdout], [], [], _READY_SECONDS)[0]
    if not readable or running.stdout.readline() != "ready\n":
        why = lab.log_tail(f"{program}.log") or lab.log_tail("nginx.log") or "no answer in time"
        raise LabError(f"The lab's {program} could not begin: {why}")
    return running


def collect(lab: Network, running: subprocess.Popen[str], program: str) -> str:
    """Close a program's standard input, upon which it ends with a line of JSON; return that.

    Raises:
        LabError: it failed, or did not end.
    """
    try:
        text, _ = running.communicate(timeout=_READY_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise LabError(f"The lab's {program} did not end.") from error
    if running.returncode != 0:
        raise LabError(f"The lab's {program} failed: {lab.log_tail(f'{program}.log')}")
    return text
