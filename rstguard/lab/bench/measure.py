"""One run: a lab, a peer in its gateway, a flood, and honest clients meanwhile."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rstguard.lab import LabError
from rstguard.lab.attacks import connection_flood
from rstguard.lab.bench.floods import Flood, trafgen_packet
from rstguard.lab.bench.peers import Peer, end, used_seconds
from rstguard.lab.client import Request
from rstguard.lab.report import Legitimate, legitimate
from rstguard.lab.run import collect, start_program
from rstguard.lab.server import start_server
from rstguard.lab.topology import ATTACKER, CLIENTS, NEW_CLIENTS, Lab, stop

CALM_SECONDS = 2.0
"""Honest traffic alone, before the flood: what a guard learns, it learns here."""
_SAMPLE_SECONDS = 0.2
_CONTAINED = 100.0
"""SYNs a second at the server up to which a flood counts as contained."""


@dataclass(frozen=True, slots=True)
class Run:
    """What was seen of one flood against one peer.

    `sent` and `arrived` count SYNs of the flood: out of the attacker, in at the server.
    `seconds_to_contain` is None if the flood was not contained.  `cpu_percent` is of one core,
    processes of the peer only: what the kernel does for it is not in it.
    """

    flood: str
    peer: str
    round: int
    known: Legitimate
    new: Legitimate
    sent: int
    arrived: int
    seconds_to_contain: float | None
    cpu_percent: float

    @property
    def arrived_percent(self) -> float:
        """Of the SYNs sent, how many reached the server."""
        return 100 * self.arrived / max(self.sent, 1)

    @property
    def success_percent(self) -> float:
        """Of all honest requests, how many succeeded."""
        asked = self.known.requests + self.new.requests
        return 100 * (self.known.succeeded + self.new.succeeded) / max(asked, 1)


def measure(flood: Flood, peer: Peer, number: int, seconds: float) -> Run:
    """Run a flood against a peer in a lab of its own.

    Raises:
        LabError: something did not start, or the flood sent nothing.
    """
    with Lab() as lab:
        _prepare(lab, flood)
        start_server(lab, "access.log" if peer.name == "fail2ban" else "off")
        client = start_program(lab, "client", "client", "--new")
        running = peer.start(lab, flood)
        time.sleep(CALM_SECONDS)
        begin, used = time.monotonic(), used_seconds(running)
        sent_before = _sent(lab)
        attacker = _attack(lab, flood, seconds)
        samples = [(begin, _arrived(lab))]
        while time.monotonic() < begin + seconds:
            time.sleep(_SAMPLE_SECONDS)
            samples.append((time.monotonic(), _arrived(lab)))
        over = time.monotonic()
        cpu = 100 * (used_seconds(running) - used) / (over - begin)
        sent = _sent(lab) - sent_before
        stop(attacker, patience=0.1)  # trafgen does not hear SIGTERM while it sends
        requests = [Request(*row) for row in json.loads(collect(lab, client, "client"))]
        end(running)
    if flood.sources and sent < 1000:
        raise LabError(f"The flood {flood.name} sent nothing: is trafgen (netsniff-ng) installed?")
    strangers = NEW_CLIENTS.partition(".")[0] + "."
    new = [request for request in requests if request.source.startswith(strangers)]
    known = [request for request in requests if not request.source.startswith(strangers)]
    return Run(
        flood.name,
        peer.name,
        number,
        legitimate(known, begin, over),
        legitimate(new, begin, over),
        sent,
        samples[-1][1] - samples[0][1],
        contained(samples),
        round(cpu, 1),
    )


def contained(samples: Sequence[tuple[float, int]]) -> float | None:
    """Return the seconds until no later interval saw more than 100 SYNs a second at the server.

    `samples` are (seconds, SYNs so far); None if the last interval saw more.
    """
    last_bad = 0
    for index in range(1, len(samples)):
        (before, had), (now, has) = samples[index - 1], samples[index]
        if has - had > _CONTAINED * (now - before):
            last_bad = index
    if last_bad == len(samples) - 1:
        return None
    return round(samples[last_bad][0] - samples[0][0], 2)


def _prepare(lab: Lab, flood: Flood) -> None:
    """Give the new clients a home, forged sources a way that ends nowhere, the flood a counter."""
    lab.run("client", ["ip", "route", "add", "local", NEW_CLIENTS, "dev", "lo"])
    lab.run("gateway", ["ip", "route", "add", NEW_CLIENTS, "via", CLIENTS[0]])
    lab.run("gateway", ["ip", "route", "add", "default", "via", ATTACKER])
    if flood.server_cookies:
        lab.run("server", ["sysctl", "-qw", "net.ipv4.tcp_syncookies=1"])
    raw = ["iptables", "-w", "-t", "raw", "-A", "PREROUTING"]
    for honest in (f"{CLIENTS[0]}/24", NEW_CLIENTS):
        lab.run("server", [*raw, "-s", honest, "-j", "RETURN"])
    lab.run("server", [*raw, "-p", "tcp", "--syn"])


def _arrived(lab: Lab) -> int:
    rules = lab.run("server", ["iptables", "-w", "-t", "raw", "-nvxL", "PREROUTING"])
    return int(rules.splitlines()[-1].split()[0])


def _sent(lab: Lab) -> int:
    text = lab.run("attacker", ["cat", "/sys/class/net/eth0/statistics/tx_packets"])
    return int(text)


def _attack(lab: Lab, flood: Flood, seconds: float) -> subprocess.Popen[str]:
    if not flood.sources:
        return lab.start("attacker", list(connection_flood(seconds).commands[0]), log="attack.log")
    shown = json.loads(lab.run("gateway", ["ip", "-j", "link", "show", "eth0"]))
    path = lab.directory / "syn.trafgen"
    path.write_text(trafgen_packet(flood, shown[0]["address"]), encoding="utf-8")
    command = ["trafgen", "-i", str(path), "-o", "eth0", "-P", "1", "-C"]
    if flood.rate:
        # Evenly: its option for a rate sends each second's packets in one burst.
        command += ["-t", f"{1_000_000 // flood.rate}us"]
    return lab.start("attacker", command, log="attack.log")
