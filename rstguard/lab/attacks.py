"""The attackers: real tools where there are any, each told to end by itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from ipaddress import ip_network
from typing import NamedTuple

from rstguard.kernel.command import own_program
from rstguard.lab import LabError
from rstguard.lab.forging import FORGED
from rstguard.lab.strike import HOSTS
from rstguard.lab.topology import ATTACKER, ATTACKERS, HOSTED, SERVER

FIRST_SCANNED, OPEN = 8_000, 10
"""Where scans begin, and how many of the ports they try are open."""

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
    `clients` are the options of the legitimate `rstguard.lab.client`.  The server `listens` there
    beside ports 22 and 80, in the words of its configuration.
    """

    commands: tuple[tuple[str, ...], ...] = ()
    prepare: tuple[tuple[str, ...], ...] = ()
    onlooker: tuple[str, ...] = ()
    rules: tuple[tuple[str, ...], ...] = ()
    idle: int = 0
    busy: int = 0
    clients: tuple[str, ...] = ()
    listens: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """How many services the legitimate clients ask, that of IPv6 among them."""
        return 1 + (len(self.listens) if "--hosted" in self.clients else 1)

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


def half_open(seconds: float) -> Attack:
    """SYNs from ever new forged sources, no more than a busy site has, that nobody completes."""
    return Attack((_forged_syns(seconds, 500),), clients=("--new",))


def forged_flood(seconds: float) -> Attack:
    """The same, as many as two senders can."""
    return Attack((_forged_syns(seconds, 25_000),) * 2, clients=("--new",))


def carpet(seconds: float) -> Attack:
    """As many, spread over all addresses of a network: each is a service with a backlog of 256."""
    everywhere = f"{HOSTED.rpartition('.')[0]}.x"
    listens = tuple(f"{address}:443 backlog=256" for address in ip_network(HOSTED).hosts())
    return Attack(
        (_forged_syns(seconds, 50_000, 443, "--rand-dest", target=everywhere),) * 2,
        clients=("--new", "--hosted"),
        listens=listens,
    )


def bad_flags(seconds: float) -> Attack:
    """Null, xmas and SYN+FIN segments, as scanners and stack fingerprinting send them."""
    return Attack(
        (
            _hping(seconds, 500, "-p", "80"),
            _hping(seconds, 500, "-F", "-P", "-U", "-p", "80"),
            _hping(seconds, 500, "-S", "-F", "-p", "80"),
        )
    )


def strays(seconds: float) -> Attack:
    """Segments of no connection, of four kinds, from one source and from ever new forged ones."""
    kinds = (("-A",), ("-F", "-A"), ("-R",), ("-S", "-A"))
    commands = (
        _hping(seconds, 10_000, *kind, *sources, "-p", "80")
        for kind in kinds
        for sources in ((), _FORGED)
    )
    return Attack(tuple(commands))


def connection_flood(seconds: float) -> Attack:
    """A new connection for each request, more at once than the server can hold."""
    length = f"-d{math.ceil(seconds)}s"
    return Attack((("wrk", "-t1", "-c600", length, "-H", "Connection: close", _url("/")),))


def keepalive_flood(seconds: float) -> Attack:
    """Requests one after the other on ten connections that stay open."""
    return Attack((("wrk", "-t1", "-c10", f"-d{math.ceil(seconds)}s", _url("/")),))


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


def scan_fast(seconds: float) -> Attack:
    """All of 1,000 ports in three seconds and a half, each connected to once."""
    return _scan(seconds, 1_000, 300)


def scan_slow(seconds: float) -> Attack:
    """As many ports as twelve seconds have room for, ten a second."""
    return _scan(seconds, 120, 10)


def scan_services(seconds: float) -> Attack:
    """The ports that are usually open, at a web server, one for mail and one of an application.

    Of all three ports 22 and 80 are open as well.
    """
    web, mail, application = HOSTS
    listens = (f"{web}:443", f"{mail}:25", f"{mail}:143", f"{application}:8080")
    return Attack((_strike("services", seconds, "--rate", "10"),), listens=listens)


def idle_hoard(seconds: float) -> Attack:
    """Many connections with half a request each, and then silence."""
    return Attack((_strike("hoard", seconds, "--rate", "150", "--count", "800"),))


def botnet(seconds: float) -> Attack:
    """Half a request of each of 4,000 sources, one connection and one network each."""
    spread = ("--sources", "4000", "--apart", "256")
    return Attack((_crowd(seconds, 500, ATTACKERS, *spread),), clients=("--slow",))


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


_FORGED = ("--rand-source", "-o", f"{FORGED:x}")


def _forged_syns(
    seconds: float, rate: int, port: int = 80, *options: str, target: str = SERVER
) -> tuple[str, ...]:
    return _hping(seconds, rate, "-S", *_FORGED, "-p", str(port), *options, target=target)


def _hping(seconds: float, rate: int, *options: str, target: str = SERVER) -> tuple[str, ...]:
    amount = ("-i", f"u{1_000_000 // rate}", "-c", str(math.ceil(rate * seconds)))
    return ("hping3", "-q", "-I", "eth0", "-a", ATTACKER, *amount, *options, target)


def _slow_requests(seconds: float, mode: str, url: str) -> Attack:
    amount = ("-c", "900", "-r", "100", "-i", "2", "-x", "8", "-l", str(math.ceil(seconds)))
    return Attack((("slowhttptest", mode, *amount, "-u", url),))


def _crowd(seconds: float, rate: int, network: str, *options: str) -> tuple[str, ...]:
    whose = ("--network", network, "--rate", str(rate), "--seconds", f"{seconds:g}")
    return tuple(own_program("rstguard.lab.crowd", SERVER, "80", *whose, *options))


def _scan(seconds: float, count: int, rate: int) -> Attack:
    """A scan of so many ports, of which ten are open, at even distances."""
    ports = range(FIRST_SCANNED, FIRST_SCANNED + count, count // OPEN)
    scan = _strike("scan", seconds, "--rate", str(rate), "--count", str(count))
    return Attack((scan,), listens=tuple(f"[::]:{port} ipv6only=off" for port in ports))


def _strike(kind: str, seconds: float, *options: str) -> tuple[str, ...]:
    return (*own_program("rstguard.lab.strike", kind, "--seconds", f"{seconds:g}"), *options)
