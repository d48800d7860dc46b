"""A running guard for tests, and clients with as many addresses as a test wants.

The guard runs as a user runs it: ``python -m rstguard run`` inside the gateway's namespace.  The
client's host owns all of 10.128.0.0/9 and fd73::/32, so that every test can be a source of its own.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from rstguard.control.protocol import ask
from rstguard.ipc.requests import ControlError
from tests.netns import SERVER4, SERVER6, Lab, wait_until

_FREE = {False: (socket.IPPROTO_IP, 15), True: (socket.IPPROTO_IPV6, 78)}
"""IP_FREEBIND and IPV6_FREEBIND: how to bind to an address that no interface has."""
ROUTER4, ROUTER6 = "10.71.1.3", "fd71:1::3"
"""The client's addresses that are the gateway's next hops."""
CLOSED = 7
"""TCP_CLOSE, as the first byte of TCP_INFO."""
SILENCE = 0.4
"""Seconds in which an answer over a veth pair comes, if one comes."""

BOTH_FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
_numbers = itertools.count(1)


def give_sources(lab: Lab) -> None:
    """Make the client's host the owner of 10.128.0.0/9 and fd73::/32."""
    lab.set("client", {"net/ipv6/ip_nonlocal_bind": "1"})
    # The way to them leads over addresses of their own: a next hop is protected by the guard.
    lab.run("client", "ip", "address", "add", f"{ROUTER4}/24", "dev", "eth0")
    router6 = (f"{ROUTER6}/64", "dev", "eth0", "preferred_lft", "0")
    lab.run("client", "ip", "-6", "address", "add", *router6)
    for version, network, via in (("-4", "10.128.0.0/9", ROUTER4), ("-6", "fd73::/32", ROUTER6)):
        lab.run("client", "ip", version, "route", "add", "local", network, "dev", "lo")
        lab.run("gateway", "ip", version, "route", "add", network, "via", via)


def source(v6: bool) -> str:
    """Return an address that no test has used yet, alone in its /24 or /48."""
    return host(next(_numbers), 1, v6)


def neighbours(v6: bool, count: int) -> list[str]:
    """Return fresh addresses that share a /24, or /64 networks that share a /48."""
    number = next(_numbers)
    return [host(number, last, v6) for last in range(1, count + 1)]


def host(number: int, last: int, v6: bool) -> str:
    """Return one address of the client's networks."""
    if v6:
        return f"fd73:0:{number:x}:{last:x}::1"
    return f"10.{128 + number // 250}.{number % 250}.{last}"


def network_of(address: str) -> str:
    """Return the source that the guard counts an address as, as it prints it."""
    return f"{address.removesuffix('1')}/64" if ":" in address else address


def server_address(v6: bool) -> str:
    """Return the address of the server."""
    return SERVER6 if v6 else SERVER4


class Guard:
    """A guard in a namespace; a context manager that leaves no process behind.

    It has two workers, whatever the machine, unless a test wants to have all in one hand.
    """

    def __init__(
        self, lab: Lab, policy: str, directory: Path, *options: str, workers: int = 2
    ) -> None:
        self.lab = lab
        self.runtime = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.file = directory / "policy.yaml"
        self.file.write_text(policy)
        self.log = directory / "guard.log"
        self._options = ("--workers", str(workers), *options)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guard:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it filters."""
        self.launch()
        wait_until(lambda: not self.running or self.at_work(), 30)
        assert self.running, self.log.read_text()

    def launch(self) -> None:
        """Start it and do not wait."""
        state = ("--state-dir", str(self.runtime / "state"))
        words = ("run", "--policy", str(self.file), *state, *self._options)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(*words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def command(self, *words: str) -> list[str]:
        """Return what runs a command of `rstguard` inside the namespace."""
        inside = ["ip", "netns", "exec", self.lab.names["gateway"]]
        directory = ["--runtime-dir", str(self.runtime)]
        return [*inside, sys.executable, "-m", "rstguard", *words, *directory]

    def wait(self, seconds: float = 20) -> int:
        """Wait until the supervisor has ended and return its exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> int:
        """End it in order and return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self.wait()

    def kill9(self) -> None:
        """Kill the supervisor; its children are to notice by themselves."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Leave no process behind, whatever state it is in."""
        if self._process is None:
            return
        children = self.children()
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)
        wait_until(lambda: not any(map(alive, children)))

    def children(self) -> list[int]:
        """Return the process ids of worker and sweeper."""
        if not self.running:
            return []
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in listed.split()]

    def ask(self, command: str, **request: Any) -> Any:
        """Send a request to the control socket and return its data."""
        return ask(self.runtime, {"command": command, **request})

    def at_work(self) -> bool:
        """Whether it filters, be it degraded."""
        try:
            return bool(self.ask("status")["state"] != "not filtering")
        except ControlError:
            return False

    def filtering(self) -> bool:
        """Tell whether it runs and filters."""
        try:
            return bool(self.ask("status")["filtering"])
        except ControlError:
            return False

    def status(self) -> Any:
        """Return what `status --json` prints."""
        return self.ask("status")

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `rstguard` inside the namespace."""
        command = self.command(*words)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def json(self, *words: str) -> Any:
        """Run a command with ``--json`` and return the data it printed."""
        done = self.cli(*words, "--json")
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    def apply(self, policy: str) -> None:
        """Give it another policy, as `policy apply` does."""
        self.ask("policy-apply", name="policy.yaml", text=policy)

    def events(self, kind: str, rule: str) -> int:
        """Return how often something has happened by a rule."""
        return int(self.status()["counts"].get(kind, {}).get(rule, 0))

    def block_of(self, address: str) -> Any:
        """Return the ban or shun of a source, or None."""
        rows = [row for row in self.ask("ban-list") if row["source"] == network_of(address)]
        return rows[0] if rows else None

    def kill(self, **conditions: str | int) -> Any:
        """End connections and return the outcome."""
        return self.ask("kill", **conditions)


class Link:
    """Both ends of one connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server

    @property
    def port(self) -> int:
        """The client's port."""
        return int(self.client.getsockname()[1])

    @property
    def dead(self) -> bool:
        """Whether both ends have died."""
        return is_dead(self.client) and is_dead(self.server)

    def talk(self) -> None:
        """Show that it works both ways.

        Raises:
            OSError: it does not.
        """
        for one, other in ((self.client, self.server), (self.server, self.client)):
            other.settimeout(5)
            one.sendall(b"hello")
            assert other.recv(5) == b"hello"

    def wait_reset(self, seconds: float = 10) -> None:
        """Wait until both ends have died, and see that each died of a RST."""
        wait_until(lambda: self.dead, seconds)
        assert {fate(self.client), fate(self.server)} <= {"ECONNRESET", "EPIPE"}

    def close(self) -> None:
        """Close both ends."""
        self.client.close()
        self.server.close()


class Service:
    """A listening TCP port and the connections a test makes to it."""

    def __init__(self, lab: Lab, port: int, place: str = "server", v6: bool = False) -> None:
        self.lab, self.port, self.v6 = lab, port, v6
        self.address = server_address(v6)
        self.masked = False
        """Whether NAT hides the client's address from the server."""
        self._listener = lab.listen(place, port, v6)
        self._listener.settimeout(5)
        self._links: list[Link] = []

    def connect(self, address: str = "", port: int = 0, timeout: float = 5) -> Link:
        """Return a new connection from a source, both ends of it."""
        client = connect(self.lab, address, self.address, port or self.port, timeout)
        try:
            own = client.getsockname()[:2]
            server, peer = self._listener.accept()
            while not self.masked and peer[:2] != own:
                server.close()  # of a client that a test left to itself
                server, peer = self._listener.accept()
        except BaseException:
            client.close()
            raise
        self._links.append(Link(client, server))
        return self._links[-1]

    def accept(self) -> socket.socket:
        """Return the server's end of the oldest connection that waits; it is the caller's."""
        return self._listener.accept()[0]

    def close(self) -> None:
        """Close the port and all its connections."""
        for link in self._links:
            link.close()
        self._listener.close()


def connect(lab: Lab, address: str, target: str, port: int, timeout: float = 5) -> socket.socket:
    """Return a socket of the client's host, connected from one of its addresses.

    Raises:
        OSError: refused, reset, unreachable, or TimeoutError.
    """
    v6 = ":" in target
    with lab.inside("client"):
        one = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET)
    try:
        if address:
            bind(one, address)
        one.settimeout(timeout)
        one.connect((target, port))
    except BaseException:
        one.close()
        raise
    return one


def bind(one: socket.socket, address: str) -> None:
    """Bind a socket to one of the client's many addresses."""
    level, option = _FREE[":" in address]
    one.setsockopt(level, option, 1)
    one.bind((address, 0))


def segments(
    lab: Lab, address: str, target: str, port: int, flags: str, count: int, first_port: int = 20000
) -> None:
    """Send TCP segments that no host stands behind; `flags` as scapy writes them, "S" a SYN."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    v6 = ":" in target
    with lab.inside("client"):
        family = socket.AF_INET6 if v6 else socket.AF_INET
        raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for number in range(count):
            ip = (IPv6 if v6 else IP)(src=address, dst=target)
            segment = TCP(sport=first_port + number, dport=port, flags=flags, seq=number, ack=1)
            raw.sendto(bytes(ip / segment), (target, 0))


def answer(lab: Lab, address: str, target: str, port: int, timeout: float = SILENCE) -> str:
    """Try to connect and return what came of it: "connected", "silence", or the error's name."""
    try:
        connect(lab, address, target, port, timeout).close()
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "connected"


def refused(lab: Lab, address: str, target: str, port: int) -> bool:
    """Tell whether a connection is refused by a RST, however busy this machine is."""
    return answer(lab, address, target, port, 5) == "ECONNREFUSED"


def alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def is_dead(one: socket.socket) -> bool:
    """Tell whether a socket's connection is over."""
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == CLOSED


def retransmissions(one: socket.socket) -> int:
    """Return how many segments a socket had to send again (tcpi_total_retrans)."""
    information = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(information[100:104], sys.byteorder)


def fate(one: socket.socket) -> str:
    """Return the name of the error a socket died of; asking takes it away."""
    return errno.errorcode.get(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "none")


def server_sockets(lab: Lab, address: str) -> list[str]:
    """Return the server's sockets whose peer is an address, in any state, as `ss` lists them."""
    with lab.inside("server"):
        listed = subprocess.run(
            ["ss", "-tanH", "dst", f"[{address}]"], capture_output=True, text=True, check=True
        ).stdout
    return listed.splitlines()


@contextlib.contextmanager
def services(*made: Service) -> Iterator[None]:
    """Close services when done."""
    try:
        yield
    finally:
        for service in made:
            service.close()


def leftovers(lab: Lab) -> list[str]:
    """Return what of the guard is in the gateway's kernel: rules, chains and sets."""
    found = []
    for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "list", "-n"]):
        lines = lab.run("gateway", *command).splitlines()
        found += [line for line in lines if "rstguard" in line or "NFQUEUE" in line]
    return found
