"""What TCP stacks other than Linux's do with what the guard asks: RSTs held, connections killed.

The stack's echo server is on a device behind the gateway, its clients are Linux sockets.  Packages
for three of them (Debian 12): ``liblwip-dev``, ``golang-go golang-gvisor-gvisor-dev``,
``libslirp-dev``.  smoltcp comes from crates.io.  Build and run, as root:

    cd tests/bench/stacks
    cc -I/usr/include/lwip lwip.c -o /tmp/lwip -llwip -lpthread
    cc -I/usr/include/slirp slirp.c -o /tmp/slirp -lslirp
    GO111MODULE=off GOPATH=/usr/share/gocode go build -o /tmp/gvisor gvisor.go
    python -m tests.bench.stacks tap /tmp/lwip DEVICE ADDRESS MASK HOST PORT
    python -m tests.bench.stacks tun /tmp/gvisor DEVICE ADDRESS PORT
    python -m tests.bench.stacks tun /tmp/smoltcp DEVICE ADDRESS HOST PORT
    python -m tests.bench.stacks tap python3 tests/bench/stacks/echo.py PORT /tmp/slirp DEVICE
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from rstguard.lab.forging import numbers
from rstguard.lab.waiting import wait_until
from tests.support.forged import HOLDING, Since, abort, send_into
from tests.support.guard import Guard
from tests.support.network import SERVER4, ThreeHosts
from tests.support.sources import give_sources, source
from tests.support.traffic import connect, is_dead

_WORDS = {
    "DEVICE": "stack0",
    "HOST": "10.72.0.1",
    "ADDRESS": "10.72.0.2",
    "MASK": "255.255.255.0",
    "PORT": "7777",
}
_COUNT = 10
_OUTCOMES = ("forged_resets", "honest_resets", "unconfirmed_resets")
_REPORTED = 1.0
"""Seconds after which all counts have arrived."""


class _Stack:
    """A stack behind a guard, and its clients."""

    def __init__(self, lab: ThreeHosts, guard: Guard) -> None:
        self.lab, self.guard = lab, guard
        self._observer = self.clients(1)[0]

    def clients(self, count: int = _COUNT) -> list[socket.socket]:
        """Return connections that have said something and are idle."""
        port = int(_WORDS["PORT"])
        made = [connect(self.lab, source(False), _WORDS["ADDRESS"], port) for _ in range(count)]
        for one in made:
            assert _ask(one, b"hello") == b"hello"
        return made

    def open(self) -> int:
        """Return how many connections the stack holds."""
        return int(_ask(self._observer, b"?"))

    @contextmanager
    def told(self, what: str) -> Iterator[list[str]]:
        """Print what happens, and what was counted meanwhile."""
        since = Since(self.guard)
        said: list[str] = []
        yield said
        time.sleep(_REPORTED)
        said += [f"{name}: {since.counts(name)}" for name in _OUTCOMES]
        print(f"{what}: {', '.join(said)}", flush=True)

    def forge(self, one: socket.socket, name: str, odd: bool = False) -> None:
        """Send an exact RST in the name of one end; `odd`: a segment that draws an ACK first."""
        if odd:
            send_into(self.lab, "client", *[_segment(one, "client", "A", -5000)] * 2)
            time.sleep(0.02)
        send_into(self.lab, name, _segment(one, name, "R", 0))


def _ask(one: socket.socket, text: bytes) -> bytes:
    one.settimeout(5)
    one.sendall(text)
    return one.recv(100)


def _echoes(one: socket.socket) -> bool:
    with suppress(OSError):
        return _ask(one, b"hello") == b"hello"
    return False


def _segment(one: socket.socket, name: str, flags: str, ahead: int) -> bytes:
    from scapy.layers.inet import IP, TCP

    ends = [(*one.getsockname(), numbers(one)[0]), (*one.getpeername(), numbers(one)[1])]
    (here, port, sends), (there, to, expects) = ends if name == "client" else ends[::-1]
    number = (sends + ahead) & 0xFFFFFFFF
    segment = TCP(sport=port, dport=to, flags=flags, seq=number, ack=expects)
    return bytes(IP(src=here, dst=there) / segment)


def _delay(begin: Callable[[], object], done: Callable[[], bool]) -> float:
    began = time.monotonic()
    begin()
    wait_until(done)
    return 1000 * (time.monotonic() - began)


def _forged(stack: _Stack) -> None:
    for name in ("server", "client"):
        for odd in (False, True):
            first = ", an odd segment before each" if odd else ""
            with stack.told(f"forged in the {name}'s name{first}") as said:
                links = stack.clients()
                for one in links:
                    stack.forge(one, name, odd)
                time.sleep(2)
                said.append(f"{sum(map(_echoes, links))} of {_COUNT} go on")
            for one in links:
                abort(one)


def _honest(stack: _Stack) -> None:
    def by_stack(one: socket.socket) -> float:
        return _delay(lambda: one.sendall(b"!"), lambda: is_dead(one))

    def by_client(one: socket.socket) -> float:
        left = stack.open() - 1
        return _delay(lambda: abort(one), lambda: stack.open() <= left)

    for name, end in (("stack", by_stack), ("client", by_client)):
        with stack.told(f"honest, of the {name}") as said:
            delays = [end(one) for one in stack.clients()]
            said.append(f"after {median(delays):.1f} ms, at most {max(delays):.1f}")


def _kill(stack: _Stack) -> None:
    links, before = stack.clients(), stack.open()
    done = [stack.guard.kill(source_port=one.getsockname()[1]) for one in links]
    time.sleep(_REPORTED)
    print(
        f"kill: confirmed {sum(one['confirmed'] for one in done)}, clients' ends dead"
        f" {sum(map(is_dead, links))}, stack's ends gone {before - stack.open()}"
    )


def main(kind: str, *program: str) -> None:
    """Build the network, start the stack and a guard, and try all."""
    device, host = _WORDS["DEVICE"], _WORDS["HOST"]
    with ThreeHosts("stk") as lab, tempfile.TemporaryDirectory() as scratch:
        give_sources(lab)
        lab.ip("server", f"tuntap add {device} mode {kind}", f"address add {host}/24 dev {device}")
        lab.ip("server", f"link set {device} up")
        lab.set("server", {"net/ipv4/ip_forward": "1"})
        if kind == "tap":  # libslirp looks for its clients in its own network
            lab.set("server", {f"net/ipv4/conf/{device}/proxy_arp": "1"})
            lab.set("server", {f"net/ipv4/neigh/{device}/proxy_delay": "0"})
        lab.ip("gateway", f"route add 10.72.0.0/24 via {SERVER4}")
        lab.start("server", *(_WORDS.get(word, word) for word in program), log="stack")
        wait_until(lambda: "ready" in lab.log_tail("stack"))
        with Guard(lab, HOLDING, Path(scratch) / "guard") as guard:
            stack = _Stack(lab, guard)
            _forged(stack)
            _honest(stack)
            _kill(stack)


if __name__ == "__main__":
    main(*sys.argv[1:])
