"""A small network in namespaces of its own: attacker and clients, gateway, server.

Attacker and clients share one segment (a bridge in a fifth namespace) with the gateway's ``eth0``,
the interface where untrusted traffic comes in; the server is behind the gateway's ``eth1``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from rstguard.lab import LabError
from rstguard.lab.namespace import NAMED
from rstguard.lab.network import Host, Network, remove_namespace

ATTACKER = "192.0.2.66"
SERVER = "203.0.113.10"
SERVER6 = "2001:db8:5::10"
HOSTED = "198.18.10.0/24"
"""A network all of whose addresses are the server's as well, as a load balancer has them."""
CLIENTS = ("198.51.100.11", "198.51.100.27", "198.51.100.43", "198.51.100.59")
"""Each in a /28 of its own, which some policy may take for one party."""
NEW_CLIENTS = "100.64.0.0/16"
"""Where clients come from that nobody has seen before; they live in the clients' namespace."""
CLIENTS6 = ("2001:db8:c1::11", "2001:db8:c2::11")
INNOCENTS = "100.65.0.0/24"
"""Who holds connections that an attack is aimed at; they live in the clients' namespace, too."""
SILENT = "100.66.0.0/24"
"""Hosts that answer nothing."""
_BEHIND_CLIENTS = (NEW_CLIENTS, INNOCENTS, SILENT)
ATTACKERS = "172.16.0.0/12"
"""Where attackers of many addresses come from; all these are the attacker's host's."""
ATTACKERS6 = "2001:db8:ba00::/40"
"""All 256 networks of 48 bits are the attacker's."""
CLIENTS_ROUTER, ATTACKERS_ROUTER = "198.51.100.9", "192.0.2.67"
"""Addresses that are the gateway's next hops: a guard may spare those, and no other of a lab."""
_ATTACKERS_ROUTER6 = "2001:db8:b0::67"

_HOSTS = {
    "wire": Host(bridge=True),
    "attacker": Host(
        {"eth0": (f"{ATTACKER}/24", f"{ATTACKERS_ROUTER}/24", f"{_ATTACKERS_ROUTER6}/64")},
        ("192.0.2.1", "2001:db8:b0::1"),
        {"net/ipv6/ip_nonlocal_bind": "1"},
    ),
    "client": Host(
        {
            "eth0": (
                *(f"{address}/24" for address in (*CLIENTS, CLIENTS_ROUTER)),
                *(f"{address}/64" for address in CLIENTS6),
            )
        },
        ("198.51.100.1", "2001:db8:c1::1"),
    ),
    "gateway": Host(
        {
            "eth0": (
                *("192.0.2.1/24", "198.51.100.1/24"),
                *("2001:db8:c1::1/64", "2001:db8:c2::1/64", "2001:db8:b0::1/64"),
            ),
            "eth1": ("203.0.113.1/24", "2001:db8:5::1/64"),
        },
        settings={"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"},
    ),
    "server": Host(
        {"eth0": (f"{SERVER}/24", f"{SERVER6}/64")},
        ("203.0.113.1", "2001:db8:5::1"),
        # A server that leans on its gateway: without cookies a full backlog refuses everybody,
        # and without remembered metrics each client is as unknown to it as a new visitor.
        {
            "net/ipv4/tcp_syncookies": "0",
            "net/ipv4/tcp_max_syn_backlog": "512",
            "net/ipv4/tcp_no_metrics_save": "1",
        },
    ),
}
_LINKS = (
    *(((role, "eth0"), ("wire", role)) for role in ("attacker", "client", "gateway")),
    (("gateway", "eth1"), ("server", "eth0")),
)
_BRIDGED = tuple(f"net/bridge/bridge-nf-call-{tool}" for tool in ("iptables", "ip6tables"))
_NAME = re.compile(r"rgl-(\d+)-\w+")


class Lab(Network):
    """The lab's hosts: wire, attacker, client, gateway and server.

    Entering it removes what labs left behind that were killed before they could clean up.

    Raises:
        LabError: not root, or the kernel or ``ip`` refused something.
    """

    def __init__(self) -> None:
        super().__init__(f"rgl-{os.getpid()}", _HOSTS, _LINKS)

    def __enter__(self) -> Self:
        require_root()
        remove_stale()
        return super().__enter__()

    def build(self) -> None:
        """Make the hosts, links and ways; what crosses the wire meets no rules there."""
        super().build()
        self.ip("client", *(f"route add local {own} dev lo" for own in (INNOCENTS, NEW_CLIENTS)))
        self.ip("server", f"route add local {HOSTED} dev lo")
        self.ip("attacker", *(f"route add local {own} dev lo" for own in (ATTACKERS, ATTACKERS6)))
        self.ip(
            "gateway",
            *(f"route add {network} via {CLIENTS_ROUTER}" for network in _BEHIND_CLIENTS),
            f"route add {HOSTED} via {SERVER}",
            f"route add {ATTACKERS6} via {_ATTACKERS_ROUTER6}",
            # Its host answers as `ATTACKERS`, and takes and answers nothing of all the others.
            f"route add default via {ATTACKERS_ROUTER}",
        )
        with self.inside("wire"):
            # Settings of a module that is not there are settings that nobody needs.
            there = [name for name in _BRIDGED if Path("/proc/sys", name).exists()]
        self.set("wire", dict.fromkeys(there, "0"))


def require_root() -> None:
    """Refuse to go on without the right to make namespaces.

    Raises:
        LabError: the effective user is not root.
    """
    if os.geteuid() != 0:
        raise LabError("The lab makes network namespaces, which only root may: use sudo.")


def remove_stale() -> None:
    """Remove what labs left behind that were killed before they could clean up."""
    for path in [*NAMED.glob("rgl-*"), *Path(tempfile.gettempdir()).glob("rgl-*")]:
        match = _NAME.fullmatch(path.name)
        if not match or Path(f"/proc/{match.group(1)}").exists():
            continue
        if path.parent == NAMED:
            remove_namespace(path.name)
        elif path.lstat().st_uid == os.geteuid():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit while inside, so that labs clean up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
