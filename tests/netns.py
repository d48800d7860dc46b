"""A small real network for tests: client - gateway - server, each a network namespace.

    client 10.71.1.2, fd71:1::2  --  gateway .1 | .1  --  server 10.71.2.2, fd71:2::2

The test runs in one process: `inside` moves the calling thread into a namespace for a while, and
a socket stays in the namespace it was made in.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

CLONE_NEWNET = 0x40000000
CLIENT4, CLIENT6 = "10.71.1.2", "fd71:1::2"
OUTSIDE4, OUTSIDE6 = "10.71.1.1", "fd71:1::1"
INSIDE4, INSIDE6 = "10.71.2.1", "fd71:2::1"
SERVER4, SERVER6 = "10.71.2.2", "fd71:2::2"

_BOTH = ("default", "all")
_GATEWAY = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/netfilter/nf_conntrack_acct": "1",
    "net/netfilter/nf_conntrack_timestamp": "1",
    "net/netfilter/nf_conntrack_tcp_loose": "0",
}
_numbers = itertools.count()


class Lab:
    """The network; a context manager that removes it, whatever happens meanwhile.

    `prefix` begins the names of its namespaces.  The gateway forwards, keeps connection accounting
    and time stamps, and tracks connections from the start.
    """

    def __init__(self, prefix: str = "rgt") -> None:
        stem = f"{prefix}-{os.getpid()}-{next(_numbers)}"
        self.names = {place: f"{stem}-{place}" for place in ("client", "gateway", "server")}

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _build(self) -> None:
        for name in self.names.values():
            _run("ip", "netns", "add", name)
        for place in self.names:  # addresses are to work at once, not a second later
            self.set(place, {f"net/ipv6/conf/{which}/accept_dad": "0" for which in _BOTH})
        self._link("client", "gateway", "out", 1)
        self._link("server", "gateway", "in", 2)
        for place in self.names:
            self.run(place, "ip", "link", "set", "lo", "up")
        self.set("gateway", _GATEWAY)
        for tool in ("iptables", "ip6tables"):
            self.run("gateway", tool, "-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW")

    def _link(self, place: str, gateway: str, port: str, net: int) -> None:
        """Join a host to the gateway: its eth0, the gateway's `port`."""
        _run(
            *("ip", "link", "add", "eth0", "netns", self.names[place], "type", "veth"),
            *("peer", "name", port, "netns", self.names[gateway]),
        )
        for where, device, last in ((place, "eth0", 2), (gateway, port, 1)):
            self.run(where, "ip", "addr", "add", f"10.71.{net}.{last}/24", "dev", device)
            address = f"fd71:{net}::{last}/64"
            self.run(where, "ip", "addr", "add", address, "dev", device, "nodad")
            self.run(where, "ip", "link", "set", device, "up")
        self.run(place, "ip", "route", "add", "default", "via", f"10.71.{net}.1")
        self.run(place, "ip", "-6", "route", "add", "default", "via", f"fd71:{net}::1")

    def remove(self) -> None:
        """Remove the namespaces; those that are not there are no error."""
        for name in self.names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    @contextlib.contextmanager
    def inside(self, place: str) -> Iterator[None]:
        """Move the calling thread into a namespace, and back to where it was."""
        with Path("/proc/thread-self/ns/net").open() as before:
            with Path("/run/netns", self.names[place]).open() as there:
                _setns(there.fileno())
            try:
                yield
            finally:
                _setns(before.fileno())

    def run(self, place: str, *command: str, stdin: str | None = None) -> str:
        """Run a command in a namespace to its end and return what it printed."""
        return _run("ip", "netns", "exec", self.names[place], *command, stdin=stdin)

    def set(self, place: str, settings: dict[str, str]) -> None:
        """Write sysctls of a namespace."""
        with self.inside(place):
            for key, value in settings.items():
                Path("/proc/sys", key).write_text(value)

    def listen(self, place: str, port: int, v6: bool = False, backlog: int = 4096) -> socket.socket:
        """Return a listening TCP socket on all addresses of a namespace."""
        family = socket.AF_INET6 if v6 else socket.AF_INET
        with self.inside(place):
            return socket.create_server(("", port), family=family, backlog=backlog)

    def connect(self, place: str, address: str, port: int) -> socket.socket:
        """Return a connected TCP socket in a namespace."""
        with self.inside(place):
            return socket.create_connection((address, port), timeout=10)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {seconds} s: {condition}")
        time.sleep(0.002)


def _setns(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
