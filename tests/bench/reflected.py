"""What one forged packet draws to the address that it was sent in the name of."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from rstguard.engine.wire import RST
from rstguard.lab.guard import GuardProcess
from tests.bench.figures import Figure, at_most, seen
from tests.bench.gateway import PORT, SERVER, Site, policy_of
from tests.support.forged import segment_of, send_into
from tests.support.traffic import Link

_VICTIM = "198.51.100.200"
_COUNT = 300
_QUIET_SECONDS = 2.0
_LOOKED_AFTER_SECONDS = 6.0
"""The server, which dies of a RST that goes on, is looked after as well."""
_RULES = (
    "name: bad-flags, measure: bad_flags, over: 5/s, then: drop",
    "name: strays, measure: out_of_state, over: 5/s, then: drop",
    "name: syn-rate, measure: syn_rate, over: 100000/s, then: drop",
)
_STRAYS = {"RST": "R", "FIN+ACK": "FA", "ACK": "A", "no flags": "", "all flags": "FSRPAU"}
_GOALS = {"drop": (0.0, 0.0), "reset": (1.0, 1.0), "unreachable": (1.0, 2.0)}
"""Packets, and bytes, for each that a blocked source sends."""


def reflected() -> Iterator[Figure]:
    """Packets and bytes that come back, by kind of packet and by `blocking`; 1 is as many."""
    with Site() as site, site.listen("server", PORT) as listener:
        site.run("client", "iptables", "-w", "-t", "raw", "-A", "PREROUTING", *_to(), "-j", "DROP")
        chain = ("mangle", "-I", "POSTROUTING", "-o", "out", *_to())
        site.run("gateway", "iptables", "-w", "-t", *chain)
        guard = site.guard(_policy("drop"))
        for kind, flags in _STRAYS.items():
            packets, size = _drawn(site, _forged(flags))
            note = "the server's own answers to what passes are among them"
            yield seen(f"reflected: {kind} of no connection, packets", [packets], "", note)
            yield seen(f"reflected: {kind} of no connection, bytes", [size], "", note)
        guard.ask("ban-add", source=_VICTIM, seconds=600)
        for blocking, (most, most_bytes) in _GOALS.items():
            guard.ask("policy-apply", name="mirror.yaml", text=_policy(blocking))
            packets, size = _drawn(site, _forged("S"))
            name = f"reflected: SYN of a banned source, blocking: {blocking}"
            yield at_most(most, f"{name}, packets", [packets], "")
            yield at_most(most_bytes, f"{name}, bytes", [size], "")
        yield from _held(site, guard, listener)
        guard.stop()


def _policy(blocking: str) -> str:
    more = f"\nblocking: {blocking}\nforged_resets: hold\nrules:"
    return policy_of(*_RULES).replace("\nrules:", more)


def _to(address: str = _VICTIM) -> tuple[str, str]:
    return "-d", address


def _forged(flags: str) -> list[bytes]:
    from scapy.layers.inet import IP, TCP

    ip: Any = IP(src=_VICTIM, dst=SERVER)
    ports = range(20_000, 20_000 + _COUNT)
    return [bytes(ip / TCP(sport=one, dport=PORT, flags=flags, seq=7, ack=9)) for one in ports]


def _drawn(site: Site, packets: list[bytes], quiet: float = _QUIET_SECONDS) -> tuple[float, float]:
    """Send packets, and return what came back for each packet and for each byte."""
    before = _counted(site)
    send_into(site, "client", *packets)
    time.sleep(quiet)
    now = _counted(site)
    came, size = now[0] - before[0], now[1] - before[1]
    return came / len(packets), size / sum(map(len, packets))


def _counted(site: Site) -> tuple[int, int]:
    listed = site.run("gateway", "iptables", "-w", "-t", "mangle", "-vxnL", "POSTROUTING")
    found = re.search(rf"^\s*(\d+)\s+(\d+)\s+.*\b{re.escape(_VICTIM)}\b", listed, re.MULTILINE)
    if found is None:
        raise RuntimeError("the rule that counts is gone")
    return int(found[1]), int(found[2])


def _held(site: Site, guard: GuardProcess, listener: Any) -> Iterator[Figure]:
    """One RST that is asked for draws questions to both ends; here none of them answers."""
    guard.ask("ban-remove", source=_VICTIM)
    site.run("client", "iptables", "-w", "-t", "raw", "-F", "PREROUTING")
    client = site.client_socket(_VICTIM)
    client.connect((SERVER, PORT))
    server = listener.accept()[0]
    link = Link(client, server)
    link.talk()
    reset = segment_of(link, RST)
    site.run("client", "iptables", "-w", "-t", "raw", "-A", "PREROUTING", *_to(), "-j", "DROP")
    packets, size = _drawn(site, [reset], _LOOKED_AFTER_SECONDS)
    note = "three questions of 41 bytes; in Ethernet frames, of 60 bytes at least, 3 times as many"
    name = "reflected: a RST that is held, its sender silent"
    yield at_most(3, f"{name}, packets", [packets], "", note)
    yield at_most(3.1, f"{name}, bytes", [size], "", note)
    client.close()
    server.close()
