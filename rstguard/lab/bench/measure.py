"""One run: a lab, a peer in its gateway, a flood, and honest clients meanwhile."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass

from rstguard.lab import LabError
from rstguard.lab.attacks import connection_flood
from rstguard.lab.bench.counting import Arrivals, contained
from rstguard.lab.bench.floods import Flood, trafgen_packet
from rstguard.lab.bench.peers import Peer, end, used_seconds
from rstguard.lab.client import Request
from rstguard.lab.network import stop
from rstguard.lab.report import Legitimate, legitimate
from rstguard.lab.run import collect, start_program
from rstguard.lab.server import start_server
from rstguard.lab.topology import NEW_CLIENTS, SERVER, Lab

CALM_SECONDS = 2.0
"""Honest traffic alone, before the flood: what a guard learns, it learns here."""
_SENT = ("iptables", "-w", "-t", "raw")


@dataclass(frozen=True, slots=True)
class Run:
    """What was seen of one flood against one peer.

    `sent` and `arrived` count SYNs of the flood in its `seconds`: out of the attacker, in at the
    server.
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
    seconds: float
    seconds_to_contain: float | None
    cpu_percent: float

    @property
    def sent_a_second(self) -> float:
        """SYNs of the flood a second: guards and flood share the machine, so it differs."""
        return self.sent / self.seconds

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
        start_server(lab, "off" if flood.sources else "access.log")
        counting = start_program(lab, "server", "bench.counting")
        client = start_program(lab, "client", "client", "--new")
        running = peer.start(lab, flood)
        time.sleep(CALM_SECONDS)
        begin, used, sent_before = time.monotonic(), used_seconds(running), _sent(lab, flood)
        attacker = _attack(lab, flood, seconds)
        time.sleep(seconds)
        over = time.monotonic()
        cpu = 100 * (used_seconds(running) - used) / (over - begin)
        sent = _sent(lab, flood) - sent_before
        stop(attacker, patience=0.1)  # trafgen does not hear SIGTERM while it sends
        rows = json.loads(collect(lab, counting, "bench.counting"))
        requests = [Request(*row) for row in json.loads(collect(lab, client, "client"))]
        end(running)
    arrivals = [at for at in (Arrivals(*row) for row in rows) if begin <= at.time < over]
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
        sum(at.syns for at in arrivals),
        round(over - begin, 3),
        contained(arrivals),
        round(cpu, 1),
    )


def _prepare(lab: Lab, flood: Flood) -> None:
    """Give the server cookies of its own, wrk a counter."""
    if flood.server_cookies:
        lab.set("server", {"net/ipv4/tcp_syncookies": "1"})
    if not flood.sources:
        lab.run("attacker", *_SENT, "-A", "OUTPUT", "-d", SERVER, "-p", "tcp", "--syn")


def _sent(lab: Lab, flood: Flood) -> int:
    if flood.sources:
        # trafgen sends nothing but SYNs, and past all rules.
        return int(lab.run("attacker", "cat", "/sys/class/net/eth0/statistics/tx_packets"))
    rules = lab.run("attacker", *_SENT, "-nvxL", "OUTPUT")
    return int(rules.splitlines()[-1].split()[0])


def _attack(lab: Lab, flood: Flood, seconds: float) -> subprocess.Popen[str]:
    if not flood.sources:
        return lab.start("attacker", *connection_flood(seconds).commands[0], log="attack.log")
    shown = json.loads(lab.run("gateway", "ip", "-j", "link", "show", "eth0"))
    path = lab.directory / "syn.trafgen"
    path.write_text(trafgen_packet(flood, shown[0]["address"]), encoding="utf-8")
    command = ["trafgen", "-i", str(path), "-o", "eth0", "-P", "1", "-C"]
    if flood.rate:
        # Evenly: its option for a rate sends each second's packets in one burst.
        command += ["-t", f"{1_000_000 // flood.rate}us"]
    return lab.start("attacker", *command, log="attack.log")
