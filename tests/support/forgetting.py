"""Traffic through a gateway whose tracker forgets: what goes on, and what does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from rstguard.engine.wire import ACK
from rstguard.lab.bench.floods import trafgen_syn
from rstguard.lab.waiting import wait_until
from tests.support.network import CLIENT4, SERVER4, ThreeHosts
from tests.support.sources import ROUTER4
from tests.support.stream import Stream
from tests.support.traffic import Link, Service

_MORE = 64 * 40
"""Numbers that a stream must go on by to be called alive."""


def flush(lab: ThreeHosts) -> None:
    """Let another program empty the connection table."""
    with contextlib.suppress(Exception):  # it complains where there is nothing to remove
        lab.run("gateway", "conntrack", "-F")


def flap(lab: ThreeHosts) -> None:
    """Take the uplink down and up again: masqueraded connections are forgotten with it."""
    lab.ip("gateway", "link set out down")
    lab.ip("gateway", "link set out up", f"route replace 10.128.0.0/9 via {ROUTER4}")


FORGETTING: dict[str, Callable[[ThreeHosts], None]] = {"flap": flap, "flush": flush}


class Outward(Service):
    """A service outside, to which the server's host connects through the gateway."""

    def __init__(self, lab: ThreeHosts, port: int) -> None:
        super().__init__(lab, port, "client")
        self.masked = True

    def reach(self) -> Link:
        """Return a connection to it."""
        inner = self.lab.connect("server", CLIENT4, self.port)
        outer = self.accept()
        self._links.append(Link(inner, outer))
        return self._links[-1]


@contextlib.contextmanager
def masquerading(lab: ThreeHosts, port: int, device: str = "out") -> Iterator[None]:
    """Have what goes to a port out of one of the gateway's devices bear the gateway's address."""
    rule = ("-o", device, "-p", "tcp", "--dport", str(port), "-j", "MASQUERADE")
    lab.run("gateway", "iptables", "-w", "-t", "nat", "-A", "POSTROUTING", *rule)
    try:
        yield
    finally:
        lab.run("gateway", "iptables", "-w", "-t", "nat", "-D", "POSTROUTING", *rule)


@contextlib.contextmanager
def invalid_dropped(lab: ThreeHosts) -> Iterator[None]:
    """Have the gateway drop what fits no connection."""
    rule = ("FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    lab.run("gateway", "iptables", "-w", "-I", *rule)
    try:
        yield
    finally:
        lab.run("gateway", "iptables", "-w", "-D", *rule)


def turned(link: Link) -> Link:
    """Return a connection seen from its server: a stream over it is a download."""
    return Link(link.server, link.client)


@contextlib.contextmanager
def streams(links: dict[str, Link]) -> Iterator[dict[str, Stream]]:
    """Have numbers sent over each connection while the context lasts."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Stream(link)) for name, link in links.items()}


def kept(running: dict[str, Stream], seconds: float = 30) -> dict[str, list[str]]:
    """Return what has gone wrong with each stream that does not go on."""
    marks = {name: one.received + _MORE for name, one in running.items()}
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: all(running[name].received >= mark for name, mark in marks.items()),
                   seconds)  # fmt: skip
    slow = {name for name, mark in marks.items() if running[name].received < mark}
    return {n: one.problems for n, one in running.items() if n in slow or one.problems}


@contextlib.contextmanager
def strays(
    lab: ThreeHosts, directory: Path, port: int, source: str, flags: tuple[int, ...] = (ACK,)
) -> Iterator[None]:
    """Flood a port with segments of no connection from one core, and from ever new ports.

    `source` are the bytes of the address in trafgen's language; `flags` are sent in turn.
    """
    shown = json.loads(lab.run("gateway", "ip", "-j", "link", "show", "out"))
    text = trafgen_syn(source, SERVER4, port, shown[0]["address"])
    file = directory / "strays.trafgen"
    several = (text.replace("const16(0x5002)", f"const16(0x50{each:02x})") for each in flags)
    file.write_text("".join(several))
    quiet = subprocess.DEVNULL
    with lab.inside("client"):
        sender = subprocess.Popen(
            ["trafgen", "-i", str(file), "-o", "eth0", "-P", "1", "-t", "1us"],
            stdout=quiet, stderr=quiet, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(sender.pid, signal.SIGKILL)  # it sends in a process of its own
        sender.wait()
