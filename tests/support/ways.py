"""Every way that a connection may take through a gateway, with a slow wire in front of it.

    client -- home (a router) -- wire (40 ms) -- gateway -- server

The gateway lets in what begins or goes on with a connection, and nothing else.  An attacker sends
RSTs from both of its sides.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from rstguard.engine.address import parse_address
from rstguard.engine.flow import TcpState
from rstguard.engine.segment import emit
from rstguard.engine.wire import ACK, RST, Packet
from rstguard.kernel.conntrack import Conntrack
from rstguard.lab.forging import Numbers, numbers
from rstguard.lab.network import Host, Network
from rstguard.lab.waiting import wait_until
from tests.support.beside import beside
from tests.support.network import GATEWAY, OUTSIDE4, OUTSIDE6, SERVER, SERVER4, SERVER6
from tests.support.traffic import Link, bind, is_dead

DELAY_MS = 40
HOME4, HOME6 = "10.71.1.2", "fd71:1::2"
NAT4, NAT6 = "10.71.1.9", "fd71:1::9"
_HOSTS = {
    "client": Host(
        {"eth0": ("10.72.1.2/24", "fd72:1::2/64")},
        ("10.72.1.1", "fd72:1::1"),
        {"net/ipv6/ip_nonlocal_bind": "1"},
    ),
    "home": Host(
        {
            "lan": ("10.72.1.1/24", "fd72:1::1/64"),
            "wan": (f"{HOME4}/24", f"{NAT4}/24", f"{HOME6}/64", f"{NAT6}/64"),
        },
        (OUTSIDE4, OUTSIDE6),
        {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"},
    ),
    "wire": Host(settings={"net/ipv6/conf/all/disable_ipv6": "1"}),
    "gateway": GATEWAY,
    "server": SERVER,
}
_LINKS = (
    (("client", "eth0"), ("home", "lan")),
    (("home", "wan"), ("wire", "near")),
    (("wire", "far"), ("gateway", "out")),
    (("server", "eth0"), ("gateway", "in")),
)
_VISITORS = {False: ("10.72.8.0/24", "fd72:8::/64"), True: ("10.72.9.0/24", "fd72:9::/64")}
"""By whether the home's NAT hides them."""
_INVALID = ("-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
_PATIENCE = 10.0


class Way(NamedTuple):
    """One way through it all: what happens to addresses, and who drops what does not fit."""

    name: str
    port: int
    at_home: bool = False
    translated: bool = False
    masked: bool = False
    strict: bool = False

    @property
    def port_inside(self) -> int:
        """The port that the server listens on."""
        return self.port + 10 * self.translated


WAYS = (
    Way("as it is", 8701),
    Way("home NAT", 8702, at_home=True),
    Way("DNAT", 8703, translated=True),
    Way("masquerade", 8704, masked=True),
    Way("DNAT, masquerade", 8705, translated=True, masked=True),
    Way("hosts drop INVALID", 8706, strict=True),
    Way("home NAT and server drop INVALID", 8707, at_home=True, strict=True),
)


class SlowNetwork(Network):
    """The network; `delay` is what its wire takes one way, in milliseconds."""

    def __init__(self, delay: int = DELAY_MS, prefix: str = "rgw") -> None:
        super().__init__(f"{prefix}-{os.getpid()}", _HOSTS, _LINKS)
        self._delay = delay
        self._last = itertools.cycle(range(1, 250))
        self._listeners: dict[tuple[int, int], socket.socket] = {}

    def build(self) -> None:
        """Make the hosts and links, all translations, and start the wire."""
        super().build()
        self.ip("wire", "link set near up", "link set far up")
        wire = (".venv/bin/python", "-m", "tests.support.delay", str(self._delay), "near", "far")
        self.start("wire", *wire, log="wire")
        for v6 in (False, True):
            for at_home in (False, True):
                network, home = _VISITORS[at_home][v6], (HOME4, HOME6)[v6]
                self.ip("client", f"route add local {network} dev lo")
                self.ip("home", f"route add {network} via {('10.72.1.2', 'fd72:1::2')[v6]}")
                self.ip("gateway", f"route add {network} via {home}")
            self._translate(v6)
        for way in WAYS:
            if way.strict:
                self._be_strict(way)
        wait_until(lambda: "ready" in self.log_tail("wire"))

    def listener(self, port: int, family: int) -> socket.socket:
        """Return the server's socket that listens on a port, the same each time.

        TCP_REPAIR keeps a port from being bound again until its last connection is forgotten.
        """
        if (port, family) not in self._listeners:
            with self.inside("server"):
                made = socket.create_server(("", port), family=family, backlog=4096)
            made.settimeout(_PATIENCE)
            self._listeners[port, family] = made
        return self._listeners[port, family]

    def remove(self) -> None:
        """Close what listens, and remove all."""
        for listener in self._listeners.values():
            listener.close()
        super().remove()

    def tables(self, place: str, v6: bool, *words: str) -> None:
        """Run iptables, or ip6tables, in a host."""
        self.run(place, "ip6tables" if v6 else "iptables", "-w", *words)

    def _translate(self, v6: bool) -> None:
        nat = ("-t", "nat", "-A")
        home, hidden = (NAT4, NAT6)[v6], _VISITORS[True][v6]
        words = (*nat, "POSTROUTING", "-s", hidden, "-o", "wan", "-j", "SNAT", "--to-source", home)
        self.tables("home", v6, *words)
        for way in WAYS:
            tcp = ("-p", "tcp", "--dport")
            if way.translated:
                to = f"[{SERVER6}]:{way.port_inside}" if v6 else f"{SERVER4}:{way.port_inside}"
                dnat = (*tcp, str(way.port), "-j", "DNAT", "--to-destination", to)
                self.tables("gateway", v6, *nat, "PREROUTING", *dnat)
            if way.masked:
                mask = (*tcp, str(way.port_inside), "-o", "in", "-j", "MASQUERADE")
                self.tables("gateway", v6, *nat, "POSTROUTING", *mask)
        self.tables("gateway", v6, "-P", "FORWARD", "DROP")
        state = ("-A", "FORWARD", "-m", "conntrack", "--ctstate")
        self.tables("gateway", v6, *state, "ESTABLISHED,RELATED", "-j", "ACCEPT")
        self.tables("gateway", v6, *state, "NEW", "-p", "tcp", "--syn", "-j", "ACCEPT")
        self.tables("gateway", v6, "-A", "FORWARD", "!", "-p", "tcp", "-j", "ACCEPT")

    def _be_strict(self, way: Way) -> None:
        """Have firewalls of both ends drop what fits no connection."""
        for v6 in (False, True):
            into = ("-p", "tcp", "--dport", str(way.port_inside), *_INVALID)
            self.tables("server", v6, "-A", "INPUT", *into)
            back = ("-p", "tcp", "--sport", str(way.port), *_INVALID)
            place, chain = ("home", "FORWARD") if way.at_home else ("client", "INPUT")
            self.tables(place, v6, "-A", chain, *back)

    def visitor(self, way: Way, v6: bool) -> str:
        """Return an address of a client that takes this way."""
        return (
            _VISITORS[way.at_home][v6].replace("0/24", "").replace("/64", "")
            + f"{next(self._last)}"
        )

    def send(self, place: str, *packets: bytes) -> None:
        """Send IP packets to the gateway from the home's side or the server's, past all rules."""
        device, port = ("wan", "out") if place == "home" else ("eth0", "in")
        (link,) = json.loads(self.run("gateway", "ip", "-j", "link", "show", port))
        mac = bytes.fromhex(link["address"].replace(":", ""))
        with self.inside(place):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with wire:
            wire.bind((device, 0))
            for packet in packets:
                kind = b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\x00"
                wire.send(mac + bytes(6) + kind + packet)


@dataclass
class Trial:
    """Connections that took one way, and what became of them."""

    network: SlowNetwork
    way: Way
    v6: bool
    links: list[Link] = field(default_factory=list)
    dead: int = 0

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.way.name}, {'IPv6' if self.v6 else 'IPv4'}"

    def connect(self, count: int) -> None:
        """Make connections, all at once, and use each."""
        way, network = self.way, self.network
        family = socket.AF_INET6 if self.v6 else socket.AF_INET
        outside, inside = (OUTSIDE6, SERVER6) if self.v6 else (OUTSIDE4, SERVER4)
        listener, clients = network.listener(way.port_inside, family), []
        for _ in range(count):
            with network.inside("client"):
                clients.append(socket.socket(family))
            bind(clients[-1], network.visitor(way, self.v6))
            clients[-1].setblocking(False)
            target = outside if way.translated else inside
            with suppress(BlockingIOError):
                clients[-1].connect((target, way.port))
        servers = [listener.accept()[0] for _ in range(count)]
        for number, client in enumerate(clients):
            client.setblocking(True)
            client.settimeout(_PATIENCE)
            client.sendall(number.to_bytes(2, "big"))
        for server in servers:
            server.settimeout(_PATIENCE)
            self.links.append(Link(clients[int.from_bytes(server.recv(2), "big")], server))
        assert not self.stuck()

    def stuck(self) -> int:
        """Use all connections both ways, and return how many do not carry data."""
        bad = set()
        for end, other in (("client", "server"), ("server", "client")):
            for number, link in enumerate(self.links):
                try:
                    getattr(link, end).sendall(b"hello")
                except OSError:
                    bad.add(number)
            end_at = time.monotonic() + _PATIENCE
            for number, link in enumerate(self.links):
                one: socket.socket = getattr(link, other)
                one.settimeout(max(0.01, end_at - time.monotonic()))
                try:
                    if one.recv(5, socket.MSG_WAITALL) != b"hello":
                        bad.add(number)
                except OSError:
                    bad.add(number)
        return len(bad)

    def forge(self, busy: int, again: int = 3) -> None:
        """Send exact RSTs in both ends' names, while the last `busy` connections carry data.

        Those get `again` times as many: one may come too late to be exact.
        """
        quiet = len(self.links) - busy
        with _busy(self.links[quiet:]):
            for turn in range(again):
                for link in self.links[quiet if turn else 0 :]:
                    with suppress(OSError):  # it has died of the one before
                        self.network.send("home", self._of_client(link))
                        self.network.send("server", self._of_server(link))
            time.sleep(2)  # longer than any RST waits
        self.dead = sum(is_dead(link.client) or is_dead(link.server) for link in self.links)

    def _of_client(self, link: Link) -> bytes:
        source = (NAT6 if self.v6 else NAT4) if self.way.at_home else link.source
        port = link.server.getpeername()[1] if self.way.at_home else link.port
        return _reset((source, port), link.client.getpeername()[:2], numbers(link.client))

    def _of_server(self, link: Link) -> bytes:
        ends = link.server.getsockname()[:2], link.server.getpeername()[:2]
        return _reset(*ends, numbers(link.server))

    def lost(self) -> int:
        """Return how many connections the gateway does not have as established."""
        port = self.way.port_inside
        with self.network.inside("gateway"), Conntrack() as table:
            v6 = self.v6
            states = [
                flow.state
                for flow in table.dump()
                if flow.reply.source_port == port and (flow.reply.source >= 1 << 64) == v6
            ]
        return len(self.links) - states.count(TcpState.ESTABLISHED)

    def close(self) -> None:
        """Close all ends."""
        for link in self.links:
            link.close()


def _reset(source: tuple[str, int], target: tuple[str, int], of: Numbers) -> bytes:
    ends = parse_address(source[0]), parse_address(target[0]), source[1], target[1]
    return emit(Packet(*ends, of.sends, of.expects, RST | ACK, 0, 0))


@contextmanager
def _busy(links: list[Link]) -> Iterator[None]:
    """Have connections carry something back and forth, until all that was sent has come."""
    for link in links:
        link.client.settimeout(0.2)
        link.server.settimeout(0.2)

    def carry() -> None:
        for one, other in (("client", "server"), ("server", "client")):
            _across(links, one, other)

    with beside(carry):
        yield


def _across(links: list[Link], one: str, other: str) -> None:
    for link in links:
        with suppress(OSError):
            getattr(link, one).sendall(b"busy!")
    for link in links:
        with suppress(OSError):
            getattr(link, other).recv(5, socket.MSG_WAITALL)
