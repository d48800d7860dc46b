"""The table of scenarios: an attack, the policy against it, and what "contained" means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rstguard.lab import LabError, attacks
from rstguard.lab.server import bearable
from rstguard.lab.topology import HOSTED, SERVER, SERVER6

PACKETS = "packets"
SYNS = "SYNs"
HELD = "connections held"
LOST = "innocents' connections lost"
LEARNED = "open ports that the attacker learned of"
FAILED = "percent of legitimate requests failed"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One attack and its measure.

    The attack counts as contained when what the server sees of `measure` stays at or below `limit`
    for the rest of the attack: attack packets or SYNs within any one second, or connections that
    the server holds for the attacker; or when at its end no more innocents than `limit` have lost
    their connections, no more open ports were found, or no more percent of the legitimate requests
    have failed.  `success` is how many percent of these must succeed with the guard.

    `seconds` is how long each half lasts unless asked for otherwise, `least_seconds` how long it
    must last for the guard to have had its turn.  `sample` names the sample policy that the guard
    runs with, as it is but for interface and addresses; without one it runs with a policy of the
    scenario's own.  `connections` are the worker_connections of a server of which the sample states
    the `capacity`; by None it says nothing of it, and the server is the usual one.
    """

    name: str
    summary: str
    plan: attacks.Plan
    measure: str
    limit: int
    seconds: int
    least_seconds: int
    sample: str = ""
    connections: int | None = None
    success: float = 99.0

    @property
    def policy(self) -> str:
        """The text of the policy file that the guard runs with."""
        if not self.sample:
            file = resources.files("rstguard.lab") / "policies" / f"{self.name}.yaml"
            return file.read_text(encoding="utf-8")
        return _adapted(_sample(self.sample), self.connections)


def _sample(name: str) -> str:
    """Return the text of a sample policy, which is elsewhere where nothing was installed."""
    package = resources.files("rstguard")
    installed = package / "policies" / f"{name}.yaml"
    if installed.is_file():
        return installed.read_text(encoding="utf-8")
    return Path(str(package)).with_name("policies").joinpath(f"{name}.yaml").read_text("utf-8")


def _adapted(policy: str, connections: int | None) -> str:
    """Return a sample with the lab's interface and addresses, and what its server can hold."""
    changes = {
        r"^  interfaces: \[.*?\]": "  interfaces: [eth0]",
        r"^  destinations: \[.*?\]": f'  destinations: [{SERVER}, {HOSTED}, "{SERVER6}"]',
    }
    if connections is not None:
        capacity = bearable(connections)
        changes[r"^# (pressure: \{capacity: ).*"] = rf"\g<1>{{80: {capacity}}}}}"
    for before, after in changes.items():
        policy, changed = re.subn(before, after, policy, flags=re.MULTILINE)
        if changed != 1:
            raise LabError(f"A sample policy has {changed} lines like '{before}', not one.")
    return policy


SCENARIOS = (
    Scenario(
        name="syn-flood",
        summary="hping3: thousands of SYNs a second, one source that never answers",
        plan=attacks.syn_flood,
        measure=SYNS,
        limit=50,
        seconds=8,
        least_seconds=3,
    ),
    Scenario(
        name="half-open",
        summary="hping3: 500 SYNs a second, each from another forged source",
        plan=attacks.half_open,
        measure=FAILED,
        limit=1,
        seconds=12,
        least_seconds=8,
    ),
    Scenario(
        name="forged-flood",
        summary="hping3: tens of thousands of SYNs a second, each from another forged source",
        plan=attacks.forged_flood,
        measure=FAILED,
        limit=1,
        seconds=12,
        least_seconds=8,
    ),
    Scenario(
        name="carpet",
        summary="hping3: such a flood spread over the 254 addresses of a network, a service each",
        plan=attacks.carpet,
        measure=FAILED,
        limit=1,
        seconds=12,
        least_seconds=10,
        sample="web-edge",
    ),
    Scenario(
        name="conn-flood",
        summary="wrk: 600 clients at once, a new connection for each request",
        plan=attacks.connection_flood,
        measure=SYNS,
        limit=50,
        seconds=8,
        least_seconds=3,
    ),
    Scenario(
        name="keepalive-flood",
        summary="wrk: thousands of requests a second on 10 connections that stay open",
        plan=attacks.keepalive_flood,
        measure=PACKETS,
        limit=100,
        seconds=12,
        least_seconds=8,
    ),
    Scenario(
        name="slowloris",
        summary="slowhttptest: 900 requests whose headers never end",
        plan=attacks.slowloris,
        measure=HELD,
        limit=100,
        seconds=12,
        least_seconds=8,
    ),
    Scenario(
        name="slow-body",
        summary="slowhttptest: 900 uploads whose bodies never end",
        plan=attacks.slow_body,
        measure=HELD,
        limit=100,
        seconds=12,
        least_seconds=8,
    ),
    Scenario(
        name="port-scan",
        summary="nmap: a half-open scan of all ports",
        plan=attacks.port_scan,
        measure=SYNS,
        limit=10,
        seconds=8,
        least_seconds=3,
    ),
    Scenario(
        name="scan-fast",
        summary="a scan of 1,000 ports, of which 10 are open, at 300 a second",
        plan=attacks.scan_fast,
        measure=LEARNED,
        limit=1,
        seconds=8,
        least_seconds=4,
        sample="strict-gateway",
    ),
    Scenario(
        name="scan-slow",
        summary="a scan of 120 ports, of which 10 are open, at 10 a second",
        plan=attacks.scan_slow,
        measure=LEARNED,
        limit=1,
        seconds=12,
        least_seconds=12,
        sample="strict-gateway",
    ),
    Scenario(
        name="scan-services",
        summary="a scan of 20 usual ports of 3 addresses, of which 10 are open, at 10 a second",
        plan=attacks.scan_services,
        measure=LEARNED,
        limit=4,
        seconds=8,
        least_seconds=7,
        sample="strict-gateway",
    ),
    Scenario(
        name="idle-hoard",
        summary="800 connections opened, half a request sent on each, then silence",
        plan=attacks.idle_hoard,
        measure=HELD,
        limit=100,
        seconds=12,
        least_seconds=9,
    ),
    Scenario(
        name="botnet",
        summary="4,000 sources, each of another /24: half a request each, 500 new ones a second",
        plan=attacks.botnet,
        measure=FAILED,
        limit=3,
        seconds=12,
        least_seconds=8,
        sample="web-edge",
        connections=768,
        success=97.0,
    ),
    Scenario(
        name="ssh-brute",
        summary="a password guesser: 20 short connections a second to port 22",
        plan=attacks.ssh_brute,
        measure=SYNS,
        limit=2,
        seconds=8,
        least_seconds=4,
    ),
    Scenario(
        name="bad-flags",
        summary="hping3: null, xmas and SYN+FIN segments, over a thousand a second",
        plan=attacks.bad_flags,
        measure=PACKETS,
        limit=10,
        seconds=8,
        least_seconds=3,
    ),
    Scenario(
        name="strays",
        summary="hping3: ACKs, FINs, RSTs, SYN-ACKs of no connection, one source and random ones",
        plan=attacks.strays,
        measure=PACKETS,
        limit=300,
        seconds=8,
        least_seconds=3,
    ),
    Scenario(
        name="evasion",
        summary="600 half requests, each hidden by RSTs or a FIN that the server refuses",
        plan=attacks.evasion,
        measure=HELD,
        limit=100,
        seconds=12,
        least_seconds=9,
    ),
    Scenario(
        name="forged-proof",
        summary="66,077 ACKs tried out in each victim's name, then SYNs in their names",
        plan=attacks.forged_proof,
        measure=FAILED,
        limit=1,
        seconds=12,
        least_seconds=12,
    ),
    Scenario(
        name="poisoned-window",
        summary="RSTs inside innocents' windows, and a firewall that drops INVALID segments",
        plan=attacks.poisoned_window,
        measure=LOST,
        limit=0,
        seconds=5,
        least_seconds=4,
    ),
    Scenario(
        name="cap",
        summary="one rule made to ban more IPv6 networks than it may, then wrk over IPv4",
        plan=attacks.cap,
        measure=SYNS,
        limit=50,
        seconds=6,
        least_seconds=3,
    ),
    Scenario(
        name="forged-resets",
        summary="RSTs with exact numbers, in either end's name, on innocents' connections",
        plan=attacks.forged_resets,
        measure=LOST,
        limit=0,
        seconds=6,
        least_seconds=4,
    ),
)

DEMO = ("syn-flood", "slowloris", "ssh-brute", "forged-resets")
"""The scenarios of ``lab demo``: under two minutes in all."""


def find(name: str) -> Scenario:
    """Return a scenario by its name.

    Raises:
        LabError: there is none of that name; the text lists those there are.
    """
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    raise LabError(f"There is no scenario '{name}'; there are {names}.")
