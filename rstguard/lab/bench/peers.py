"""The guards that are compared; their configurations are the files in ``peers/``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rstguard.lab import LabError
from rstguard.lab.bench.floods import Flood
from rstguard.lab.guard import GuardProcess
from rstguard.lab.network import stop
from rstguard.lab.topology import Lab
from rstguard.lab.usage import cpu_seconds
from rstguard.lab.waiting import wait_until

GATEWAY = "gateway.sh"
"""Hand-written rules for several services, which scenarios can meet."""

_READY_SECONDS = 40.0
_FAIL2BAN = Path("/etc/fail2ban")


@dataclass(frozen=True, slots=True)
class Peer:
    """A guard to compare: `start` puts it to work in a lab and returns its process, if any.

    `program` and `package` say what must be installed, `files` what it is configured by, and
    `applies` for which floods it is meant; `why_not` tells why for no others.
    """

    name: str
    files: tuple[str, ...]
    start: Callable[[Lab, Flood], subprocess.Popen[str] | GuardProcess | None]
    program: str = ""
    package: str = ""
    applies: Callable[[Flood], bool] = lambda _flood: True
    why_not: str = ""

    @property
    def missing(self) -> str:
        """Say what to install, or "" if it is there."""
        if not self.program or shutil.which(self.program):
            return ""
        return f"{self.program} is not installed: apt-get install {self.package}"


def configuration(name: str) -> str:
    """Return the text of a peer's configuration file."""
    file = resources.files("rstguard.lab.bench") / "peers" / name
    return file.read_text(encoding="utf-8")


def _write(lab: Lab, name: str, under: str = "") -> Path:
    path = lab.directory / under / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = configuration(name).replace("DIRECTORY", str(lab.directory))
    path.write_text(text, encoding="utf-8")
    return path


def _await(lab: Lab, process: subprocess.Popen[str], log: str, ready: Callable[[], bool]) -> None:
    try:
        wait_until(lambda: process.poll() is not None or ready(), _READY_SECONDS)
    except TimeoutError as error:
        raise LabError(f"A peer did not start: {lab.log_tail(log, lines=5)}") from error
    if process.poll() is not None:
        raise LabError(f"A peer did not start: {lab.log_tail(log, lines=5)}")


def _none(_lab: Lab, _flood: Flood) -> None:
    return None


def _rstguard(lab: Lab, flood: Flood) -> GuardProcess:
    policy = configuration("rstguard.yaml")
    if flood.budget:
        policy = policy.replace("rate: 300/s", f"rate: {flood.budget}/s")
    else:
        policy = "\n".join(line for line in policy.splitlines() if "syn_budget" not in line)
    guard = GuardProcess(lab, policy, lab.directory / "runtime")
    guard.start(whole=True)
    return guard


def _iptables(lab: Lab, _flood: Flood) -> None:
    lab.run("gateway", "sh", str(_write(lab, "iptables.sh")))


def write_rules(lab: Lab) -> None:
    """Put the hand-written rules for several services into the gateway of a lab."""
    lab.run("gateway", "sh", str(_write(lab, GATEWAY)))


def _synproxy(lab: Lab, _flood: Flood) -> None:
    lab.run("gateway", "sh", str(_write(lab, "synproxy.sh")))


def _suricata(lab: Lab, _flood: Flood) -> subprocess.Popen[str]:
    for name in ("suricata.rules", "threshold.config"):
        _write(lab, name)
    config = _write(lab, "suricata.yaml")
    command = ["suricata", "-c", str(config), "-q", "0", "-q", "1", "--runmode", "workers"]
    process = lab.start("gateway", *command, log="suricata.log")
    log = lab.directory / "suricata.log"
    _await(lab, process, "suricata.log", lambda: "started" in log.read_text(errors="replace"))
    lab.run("gateway", "sh", str(_write(lab, "suricata.sh")))
    return process


def _fail2ban(lab: Lab, _flood: Flood) -> subprocess.Popen[str]:
    home = "fail2ban"
    for name in ("fail2ban.conf", "jail.local"):
        _write(lab, name, home)
    _write(lab, "flood.conf", f"{home}/filter.d")
    (lab.directory / "access.log").touch()
    for path in (*_FAIL2BAN.glob("*.conf"), _FAIL2BAN / "action.d"):
        if path.name != "fail2ban.conf":
            (lab.directory / home / path.name).symlink_to(path)
    at = ["-c", str(lab.directory / home), "-s", str(lab.directory / "fail2ban.sock")]
    command = ["fail2ban-server", *at, "-p", str(lab.directory / "fail2ban.pid"), "-f", "start"]
    process = lab.start("gateway", *command, log="fail2ban-said.log")
    asked = ["fail2ban-client", *at, "get", "flood", "actions"]

    def ready() -> bool:
        # A jail without an action starts all the same, and bans nobody.
        told = subprocess.run(asked, capture_output=True, text=True, check=False)
        return told.returncode == 0 and "iptables-ipset" in told.stdout

    _await(lab, process, "fail2ban-said.log", ready)
    return process


PEERS = (
    Peer("none", (), _none),
    Peer("rstguard", ("rstguard.yaml",), _rstguard),
    Peer("iptables", ("iptables.sh",), _iptables, "ipset", "ipset"),
    Peer(
        "synproxy",
        ("synproxy.sh",),
        _synproxy,
        applies=lambda flood: bool(flood.sources),
        why_not="it answers for the server, and stops nobody who completes the handshake",
    ),
    Peer(
        "suricata",
        ("suricata.yaml", "suricata.rules", "threshold.config", "suricata.sh"),
        _suricata,
        "suricata",
        "suricata (Debian 12: from bookworm-backports)",
    ),
    Peer(
        "fail2ban",
        ("jail.local", "flood.conf", "fail2ban.conf"),
        _fail2ban,
        "fail2ban-server",
        "fail2ban",
        applies=lambda flood: not flood.sources,
        why_not="it reads the server's log, and a SYN leaves no line there",
    ),
)


def find(name: str) -> Peer:
    """Return a peer by its name.

    Raises:
        LabError: there is none of that name; the text lists those there are.
    """
    for peer in PEERS:
        if peer.name == name:
            return peer
    raise LabError(f"There is no peer '{name}'; there are {', '.join(p.name for p in PEERS)}.")


def used_seconds(running: subprocess.Popen[str] | GuardProcess | None) -> float:
    """Return the processor time that a peer's processes have used; the kernel's is not in it."""
    return cpu_seconds(running.pid) if running else 0.0


def end(running: subprocess.Popen[str] | GuardProcess | None) -> None:
    """Stop a peer's processes."""
    if isinstance(running, GuardProcess):
        running.end()
    elif running:
        stop(running)
