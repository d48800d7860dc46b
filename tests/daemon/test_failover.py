"""A second gateway takes over: connections that began at the first go on through it."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from rstguard.lab.network import Host, Network
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.stream import Stream
from tests.support.traffic import Link

pytestmark = pytest.mark.netns

CLIENT, SERVER, PORT = "198.51.100.9", "203.0.113.9", 80
HARM: Final = ("ban", "shun", "reset", "drop")
SECONDS: Final = 4
"""How long is counted what arrives after a take-over."""
STRICT = f"""\
version: 1
name: pair
on_failure: closed
protect: {{interfaces: [out], ports: [{PORT}]}}
rules:
  - {{name: strays, measure: out_of_state, over: 50/s, then: drop}}
  - {{name: rate, measure: syn_rate, over: 100/s, then: ban, for: 1m}}
"""
_FORWARDS = {"net/ipv4/ip_forward": "1"}
_numbers = itertools.count()


class Pair(Network):
    """client - gateway or backup - server; which of them is for the routes of both ends to say."""

    def __init__(self) -> None:
        hosts = {
            "client": Host({"eth0": ("10.1.1.2/24",), "eth1": ("10.1.2.2/24",)}),
            "gateway": Host({"out": ("10.1.1.1/24",), "in": ("10.2.1.1/24",)}, settings=_FORWARDS),
            "backup": Host({"out": ("10.1.2.1/24",), "in": ("10.2.2.1/24",)}, settings=_FORWARDS),
            "server": Host({"eth0": ("10.2.1.2/24",), "eth1": ("10.2.2.2/24",)}),
        }
        links = [
            ((end, device), (gateway, port))
            for end, port in (("client", "out"), ("server", "in"))
            for device, gateway in (("eth0", "gateway"), ("eth1", "backup"))
        ]
        super().__init__(f"rgp-{os.getpid()}-{next(_numbers)}", hosts, links)

    def build(self) -> None:
        """Give both ends an address that belongs to no link."""
        super().build()
        self.ip("client", f"address add {CLIENT}/32 dev lo")
        self.ip("server", f"address add {SERVER}/32 dev lo")
        for number, gateway in enumerate(("gateway", "backup"), 1):
            self.ip(gateway, f"route add {CLIENT} via 10.1.{number}.2")
            self.ip(gateway, f"route add {SERVER} via 10.2.{number}.2")
            drop = ("-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
            self.run(gateway, "iptables", "-w", "-A", "FORWARD", *drop)
        self.take(1)

    def take(self, number: int) -> None:
        """Have all go through the first or the second gateway."""
        self.ip("client", f"route replace {SERVER} via 10.1.{number}.1 src {CLIENT}")
        self.ip("server", f"route replace {CLIENT} via 10.2.{number}.1 src {SERVER}")

    @property
    def other(self) -> Any:
        """The same network, in which the second gateway is the one that a guard runs on."""
        turned = copy.copy(self)
        turned.names = {**self.names, "gateway": self.names["backup"]}
        return turned


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture
def listener(pair: Pair) -> Iterator[socket.socket]:
    with pair.inside("server"):
        listener = socket.create_server((SERVER, PORT))
    with listener:
        yield listener


def connect(pair: Pair, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new connection."""
    with pair.inside("client"):
        client = socket.create_connection((SERVER, PORT), timeout=10, source_address=(CLIENT, 0))
    return client, listener.accept()[0]


def arrives(pair: Pair, listener: socket.socket) -> int:
    """Return how many numbers of an upload arrive after the second gateway has taken over."""
    client, server = connect(pair, listener)
    with client, server, Stream(Link(client, server)) as stream:
        wait_until(lambda: stream.received > 10_000)
        pair.take(2)
        before = stream.received
        time.sleep(SECONDS)
        found = stream.received - before
    assert stream.problems == []
    assert stream.received == stream.sent
    return found


def test_an_upload_goes_on_through_the_second_gateway(
    pair: Pair, listener: socket.socket, tmp_path: Path
) -> None:
    control = arrives(pair, listener)
    pair.take(2)
    with (
        Guard(pair, STRICT, tmp_path / "first") as first,  # type: ignore[arg-type]
        Guard(pair.other, STRICT, tmp_path / "second") as second,
    ):
        for end in connect(pair, listener):  # it has tracked some, and so knows the service
            end.close()
        pair.take(1)
        assert arrives(pair, listener) >= 0.9 * control
        wait_until(lambda: second.status()["forgotten"]["adopted"] == 1)
        for guard in (first, second):
            assert not any(guard.status()["counts"].get(what) for what in HARM)
