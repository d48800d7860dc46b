"""The attackers: real tools where there are any, each told to end by itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import NamedTuple

from rstguard.kernel.command import own_program
from rstguard.lab import LabError
from rstguard.lab.topology import ATTACKER, SERVER

PACKAGES = {
    "hping3": "hping3",
    "slowhttptest": "slowhttptest",
    "nmap": "nmap",
    "wrk": "wrk",
    "iptables": "iptables",
}
"""Debian package of each tool."""


class Attack(NamedTuple):
    """Commands to run beside each other in the attacker's namespace, and what to run before.

    `onlooker` are the options of a `rstguard.lab.onlooker` on the wire, `rules` iptables rules that
    the gateway has of its own, `idle` and `busy` how many innocents hold a connection each.
    """

    commands: tuple[tuple[str, ...], ...] = ()
    prepare: tuple[tuple[str, ...], ...] = ()
    onlooker: tuple[str, ...] = ()
    rules: tuple[tuple[str, ...], ...] = ()
    idle: int = 0
    busy: int = 0

    def require_tools(self) -> None:
        """Check that all tools are installed.

        Raises:
            LabError: one is missing; the text names its Debian package.
        """
        for tool in (command[0] for command in (*self.prepare, *self.commands)):
            if shutil.which(tool) is None:
                raise LabError(f"{tool} is missing: apt-get install {PACKAGES.get(tool, tool)}.")


Plan = Callable[[float], Attack]
"""Makes the attack that lasts the given seconds."""


def syn_flood(seconds: float) -> Attack:
    """SYNs from one source that never answers, so each fills a place in the server's backlog."""
    silence = ("iptables", "-w", "-A", "INPUT", "-p", "tcp", "-s", SERVER, "-j", "DROP")
    return Attack((_hping(seconds, 10_000, "-S", "-p", "80"),), prepare=(silence,))


def bad_flags(seconds: float) -> Attack:
    """Null, xmas and SYN+FIN segments, as scanners and stack fingerprinting send them."""
    return Attack(
        (
            _hping(seconds, 500, "-p", "80"),
            _hping(seconds, 500, "-F", "-P", "-U", "-p", "80"),
            _hping(seconds, 500, "-S", "-F", "-p", "80"),
        )
    )


def connection_flood(seconds: float) -> Attack:
    """A new connection for each request, more at once than the server can hold."""
    length = f"-d{math.ceil(seconds)}s"
    return Attack((("wrk", "-t1", "-c600", length, "-H", "Connection: close", _url("/")),))


def slowloris(seconds: float) -> Attack:
    """Requests whose headers never end."""
    return _slow_requests(seconds, "-H", _url("/"))


def slow_body(seconds: float) -> Attack:
    """Uploads whose bodies never end."""
    return _slow_requests(seconds, "-B", _url("/upload"))


def port_scan(seconds: float) -> Attack:
    """A half-open scan of all ports."""
    scan = ("nmap", "-n", "-Pn", "-sS", "-T4", "--disable-arp-ping", "--max-retries", "0")
    pace = ("--min-rate", "500", "--max-rate", "1000", "--host-timeout", f"{math.ceil(seconds)}s")
    return Attack(((*scan, *pace, "-p", "1-65535", SERVER),))


def idle_hoard(seconds: float) -> Attack:
    """Many connections with half a request each, and then silence."""
    return Attack((_strike("hoard", seconds, "--rate", "150", "--count", "800"),))


def evasion(seconds: float) -> Attack:
    """The same, each connection hidden from the gateway's tracker as soon as it is there."""
    return Attack((_strike("hide", seconds, "--rate", "150", "--count", "600"),))


def ssh_brute(seconds: float) -> Attack:
    """A password guesser: connect, read the banner, guess, be thrown out, again."""
    return Attack((_strike("brute", seconds, "--rate", "20"),))


def forged_proof(seconds: float) -> Attack:
    """ACKs tried out in others' names until the tracker believes in a handshake, then abuse."""
    forging = own_program("rstguard.lab.forging", "--victims", "2", "--seconds", f"{seconds:g}")
    return Attack((tuple(forging),), idle=10)


def cap(seconds: float) -> Attack:
    """First one rule is made to ban one network after the other, then a flood from elsewhere.

    Each of 40 networks connects five times: 24 are of one /48, the others of a /48 each.
    """
    spread = _strike("spread", 10, "--rate", "100", "--count", "200")
    return connection_flood(seconds)._replace(prepare=(spread,))


def poisoned_window(_seconds: float) -> Attack:
    """RSTs inside the windows of innocents, behind a firewall that drops INVALID segments."""
    strict = ("-A", "FORWARD", "--match", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    return Attack(onlooker=("poison",), rules=(strict,), busy=20)


def forged_resets(_seconds: float) -> Attack:
    """RSTs with exact numbers, in the name of either end."""
    return Attack(onlooker=("reset",), idle=20, busy=20)


def _url(path: str) -> str:
    return f"http://{SERVER}{path}"


def _hping(seconds: float, rate: int, *options: str) -> tuple[str, ...]:
    amount = ("-i", f"u{1_000_000 // rate}", "-c", str(math.ceil(rate * seconds)))
    return ("hping3", "-q", "-I", "eth0", "-a", ATTACKER, *amount, *options, SERVER)


def _slow_requests(seconds: float, mode: str, url: str) -> Attack:
    amount = ("-c", "900", "-r", "100", "-i", "2", "-x", "8", "-l", str(math.ceil(seconds)))
    return Attack((("slowhttptest", mode, *amount, "-u", url),))


def _strike(kind: str, seconds: float, *options: str) -> tuple[str, ...]:
    return (*own_program("rstguard.lab.strike", kind, "--seconds", f"{seconds:g}"), *options)
