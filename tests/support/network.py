"""A small real network for tests: client - gateway - server, each a network namespace.

    client 10.71.1.2, fd71:1::2  --  gateway .1 | .1  --  server 10.71.2.2, fd71:2::2

The test runs in one process: `inside` moves the calling thread into a namespace for a while, and
a socket stays in the namespace it was made in.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Mapping

from rstguard.lab.network import Host, Network

CLIENT4, CLIENT6 = "10.71.1.2", "fd71:1::2"
OUTSIDE4, OUTSIDE6 = "10.71.1.1", "fd71:1::1"
INSIDE4, INSIDE6 = "10.71.2.1", "fd71:2::1"
SERVER4, SERVER6 = "10.71.2.2", "fd71:2::2"

GATEWAY = Host(
    {
        "out": (f"{OUTSIDE4}/24", f"{OUTSIDE6}/64"),
        "in": (f"{INSIDE4}/24", f"{INSIDE6}/64"),
    },
    settings={
        "net/ipv4/ip_forward": "1",
        "net/ipv6/conf/all/forwarding": "1",
        "net/netfilter/nf_conntrack_acct": "1",
        "net/netfilter/nf_conntrack_timestamp": "1",
    },
)
SERVER = Host({"eth0": (f"{SERVER4}/24", f"{SERVER6}/64")}, (INSIDE4, INSIDE6))
_HOSTS = {
    "client": Host({"eth0": (f"{CLIENT4}/24", f"{CLIENT6}/64")}, (OUTSIDE4, OUTSIDE6)),
    "gateway": GATEWAY,
    "server": SERVER,
}
_LINKS = ((("client", "eth0"), ("gateway", "out")), (("server", "eth0"), ("gateway", "in")))
_numbers = itertools.count()


class ThreeHosts(Network):
    """The network; a context manager that removes it, whatever happens meanwhile.

    `prefix` begins the names of its namespaces.  The gateway forwards, keeps connection accounting
    and time stamps, and tracks connections from the start.  `more` are hosts without any link yet.
    """

    def __init__(self, prefix: str = "rgt", more: Mapping[str, Host] | None = None) -> None:
        hosts = {**_HOSTS, **(more or {})}
        super().__init__(f"{prefix}-{os.getpid()}-{next(_numbers)}", hosts, _LINKS)

    def build(self) -> None:
        """Make the hosts and links, and have connections tracked."""
        super().build()
        for tool in ("iptables", "ip6tables"):
            self.run("gateway", tool, "-w", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "NEW")

    def listen(self, place: str, port: int, v6: bool = False, backlog: int = 4096) -> socket.socket:
        """Return a listening TCP socket on all addresses of a namespace."""
        family = socket.AF_INET6 if v6 else socket.AF_INET
        with self.inside(place):
            return socket.create_server(("", port), family=family, backlog=backlog)

    def connect(self, place: str, address: str, port: int) -> socket.socket:
        """Return a connected TCP socket in a namespace."""
        with self.inside(place):
            return socket.create_connection((address, port), timeout=10)
