"""Connections and packets of tests: services, links, forged segments, and what came of them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

from rstguard.lab.waiting import wait_until
from tests.support.network import ThreeHosts
from tests.support.sources import server_address

FREE_BIND = {False: (socket.IPPROTO_IP, 15), True: (socket.IPPROTO_IPV6, 78)}
"""IPFREE_BINDBIND and IPV6FREE_BINDBIND: how to bind to an address that no interface has."""
CLOSED = 7
"""TCP_CLOSE, as the first byte of TCP_INFO."""
SILENCE = 0.4
"""Seconds in which an answer over a veth pair comes, if one comes."""


class Link:
    """Both ends of one connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        own = client.getsockname()
        self.source, self.port = str(own[0]), int(own[1])
        """The client's address and port."""

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

    def __init__(self, lab: ThreeHosts, port: int, place: str = "server", v6: bool = False) -> None:
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

    def refuse(self, address: str, seconds: float = 5) -> None:
        """See that a source is refused as it completes its handshake: its server hears nothing."""
        try:
            client = connect(self.lab, address, self.address, self.port)
        except ConnectionResetError:
            return
        with client:
            wait_until(lambda: is_dead(client), seconds)
            assert fate(client) == "ECONNRESET"

    def accept(self) -> socket.socket:
        """Return the server's end of the oldest connection that waits; it is the caller's."""
        return self._listener.accept()[0]

    def waiting(self) -> int:
        """Take in all connections that wait; return how many there were."""
        self._listener.settimeout(0)
        try:
            for count in itertools.count():
                try:
                    self._listener.accept()[0].close()
                except BlockingIOError:
                    return count
        finally:
            self._listener.settimeout(5)
        raise AssertionError

    def close(self) -> None:
        """Close the port and all its connections."""
        for link in self._links:
            link.close()
        self._listener.close()


Open = Callable[..., Service]
"""Opens a port until the test is over: what the fixture `serve` gives."""


def connect(
    lab: ThreeHosts, address: str, target: str, port: int, timeout: float = 5
) -> socket.socket:
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
    level, option = FREE_BIND[":" in address]
    one.setsockopt(level, option, 1)
    one.bind((address, 0))


def segments(
    lab: ThreeHosts,
    address: str,
    target: str,
    port: int,
    flags: str,
    count: int,
    first_port: int = 20000,
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


def answer(lab: ThreeHosts, address: str, target: str, port: int, timeout: float = SILENCE) -> str:
    """Try to connect and return what came of it: "connected", "silence", or the error's name."""
    try:
        connect(lab, address, target, port, timeout).close()
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "connected"


def refused(lab: ThreeHosts, address: str, target: str, port: int) -> bool:
    """Tell whether a connection is refused by a RST, however busy this machine is."""
    return answer(lab, address, target, port, 5) == "ECONNREFUSED"


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


def server_sockets(lab: ThreeHosts, address: str) -> list[str]:
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
