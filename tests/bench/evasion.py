"""What a hoard of connections gains by each trick that has the gateway forget them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

from rstguard.engine.wire import ACK, FIN, RST, SYN
from rstguard.lab.forging import segment
from tests.bench.figures import Figure, at_most
from tests.bench.gateway import PORT, SERVER, Site, policy_of
from tests.support.forged import MD5, closing_blindly, wire_of
from tests.support.traffic import Link

HOARD, LIMIT = 600, 100
_LATER = 10.0
"""Seconds after the last trick at which the server's sockets are counted."""
_FORGET = 4
"""Seconds after which the tracker forgets a half-closed connection here: a turn lasts longer."""
_PATIENCE = 1.0
_HEAD = "\ndrop_spoofed_after: 0s\nleast_ttl: {}\nsweep_every: 500ms\nrules:"
_RULE = "name: hoarder, measure: connections, over: {}, then: {}"

Trick = Callable[[Link], list[bytes]]


def _signed(*flags: int) -> Trick:
    """Segments that the server refuses for a signature, and the tracker takes."""
    return lambda link: [
        segment(link.client, f, ahead=int(f == ACK), options=(MD5,)) for f in flags
    ]


def _short_lived(link: Link) -> list[bytes]:
    return [segment(link.client, RST, hops=1)]


def _short_lived_data(link: Link) -> list[bytes]:
    data = segment(link.client, ACK, hops=1, payload=bytes(10))
    return [data, segment(link.client, RST | ACK, ahead=10, hops=1)]


TRICKS: dict[str, Trick] = {
    "none": lambda link: [],
    "RST of TTL 1": _short_lived,
    "data of TTL 1, RST behind it": _short_lived_data,
    "RST with a signature": _signed(RST),
    "the same, SYN behind it": _signed(RST, SYN),
    "blind close": closing_blindly,
    "FIN with a signature": _signed(FIN | ACK),
    "two of them": _signed(FIN | ACK, FIN | ACK),
    "two of them, ACK, SYN": _signed(FIN | ACK, FIN | ACK, ACK, SYN),
}
_TURNS = "FIN with a signature, in two turns"


def evasion() -> Iterator[Figure]:
    """600 connections of one source: how many of its sockets the server still has 10 s later."""
    for action, most in (("reset", LIMIT), ("ban, for: 10m", 0)):
        with Site() as site:
            _forget_soon(site)
            policy = policy_of(_RULE.format(LIMIT, action))
            guard = site.guard(policy.replace("\nrules:", _HEAD.format(4)))
            for number, (name, trick) in enumerate(TRICKS.items()):
                source = f"198.51.100.{number + 10}"
                yield _figure(site, action, name, trick, source, (HOARD,), most)
            turns = (LIMIT - 10, HOARD - LIMIT + 10)
            trick = TRICKS["FIN with a signature"]
            yield _figure(site, action, _TURNS, trick, "198.51.100.9", turns, most)
            guard.stop()


def _forget_soon(site: Site) -> None:
    for state in ("fin_wait", "close_wait", "last_ack"):
        site.set("gateway", {f"net/netfilter/nf_conntrack_tcp_timeout_{state}": str(_FORGET)})


def _figure(
    site: Site, action: str, name: str, trick: Trick, source: str, turns: tuple[int, ...], most: int
) -> Figure:
    links: list[Link] = []
    with ExitStack() as stack:
        listener = stack.enter_context(site.listen("server", PORT))
        wire, mac = wire_of(site, "client", stack)
        for turn, count in enumerate(turns):
            if turn:
                time.sleep(2 * _FORGET)
            for _ in range(count):
                client = stack.enter_context(site.client_socket(source))
                client.settimeout(_PATIENCE)
                try:
                    client.connect((SERVER, PORT))
                    link = Link(client, stack.enter_context(listener.accept()[0]))
                    link.talk()
                except (OSError, AssertionError):
                    break  # he is blocked, or this one was beyond the limit
                links.append(link)
                for packet in trick(link):
                    wire.send(mac + bytes(6) + b"\x08\x00" + packet)
                with suppress(OSError):
                    client.sendall(b"x")  # so half-closed connections go on
        time.sleep(_LATER)
        left = len(site.run("server", "ss", "-tnH", "dst", source).splitlines())
    note = f"{LIMIT} are allowed; counted {_LATER:g} s after the last trick"
    verb = action.partition(",")[0]
    figure = f"evasion, then: {verb}: {name}: sockets left of {len(links)}"
    return at_most(most, figure, [float(left)], "", note)
