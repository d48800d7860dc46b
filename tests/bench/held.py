"""What it costs an honest RST to be held, and what a flood of forged ones does."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import quantiles

from rstguard.engine.wire import RST
from rstguard.lab.guard import GuardProcess
from tests.bench.figures import Figure, at_most, ratios, seen
from tests.bench.gateway import (
    CLIENT,
    PORT,
    SERVER,
    Site,
    allow_files,
    cpu_seconds,
    milliseconds_since,
    policy_of,
)
from tests.support.forged import segment_of, send_into
from tests.support.network import CLIENT4
from tests.support.traffic import Link, is_dead

GOAL_MS, GOAL_RATIO = 1.0, 1.2
_RULE = "name: resets, measure: reset_rate, over: 100000/s, then: drop"
_ROUNDS = 5
_RESETS = 200
_CONNECTIONS = 40
_FLOOD_SECONDS = 10.0
_FLOODS = 3
_A_SECOND = 100_000
_CROWD, _ATTACKERS, _VICTIM = 5_000, "198.51.100.0/24", CLIENT4
_ABORT = struct.pack("ii", 1, 0)


def held() -> Iterator[Figure]:
    """Honest RSTs with and without being held; forged ones by the hundred thousand a second."""
    allow_files(2 * _CROWD + 1_000)
    with Site() as site, site.listen("server", PORT) as listener:
        asked = policy_of(_RULE).replace("\nrules:", "\nforged_resets: hold\nrules:")
        guard = site.guard(policy_of(_RULE))
        without: list[float] = []
        with_it: list[float] = []
        for _ in range(_ROUNDS):
            for policy, times in ((policy_of(_RULE), without), (asked, with_it)):
                guard.ask("policy-apply", name="held.yaml", text=policy)
                times.append(_median(_honest(site, listener)))
        added = [mine - other for mine, other in zip(with_it, without, strict=True)]
        note = f"{_ROUNDS} rounds of {_RESETS} aborts each way, in turn; a worker counts them, too"
        yield at_most(GOAL_MS, "honest RST: what being held adds, p50", added, "ms", note)
        yield from _forged(site, guard, listener)
        guard.ask("policy-apply", name="held.yaml", text=asked)
        yield from _crowd(site, listener)
        guard.stop()


def _median(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


def _link(site: Site, listener: socket.socket, address: str = CLIENT) -> Link:
    client = site.client_socket(address)
    client.connect((SERVER, PORT))
    server = listener.accept()[0]
    link = Link(client, server)
    link.talk()
    return link


def _honest(site: Site, listener: socket.socket) -> list[float]:
    """Time aborted connections from the client's close to the server's error."""
    times = []
    for _ in range(_RESETS):
        link = _link(site, listener)
        link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        began = time.monotonic_ns()
        link.client.close()
        try:
            link.server.recv(1)
        except ConnectionResetError:
            times.append(milliseconds_since(began))
        link.server.close()
    if len(times) != _RESETS:
        raise RuntimeError(f"{_RESETS - len(times)} of {_RESETS} honest RSTs did not arrive")
    return times


def _forged(site: Site, guard: GuardProcess, listener: socket.socket) -> Iterator[Figure]:
    links = [_link(site, listener) for _ in range(_CONNECTIONS)]
    for link in links:
        for name in ("client", "server"):
            send_into(site, name, segment_of(link, RST, name))
            link.talk()
    killed = [float(sum(is_dead(link.server) or is_dead(link.client) for link in links))]
    yield at_most(0, f"forged RSTs: killed of {_CONNECTIONS}, each end's name", killed, "")
    floods: dict[str, list[dict[str, int]]] = {
        "exact, of one connection": [{}],
        "of any port": [{"port": port} for port in range(1024, 65024, 64)],
        "within the window": [{"ahead": ahead} for ahead in range(64, 60_000, 64)],
    }
    for name, changes in floods.items():
        p99: dict[str, list[float]] = {"off": [], "hold": []}
        used: list[float] = []
        rates: list[float] = []
        aims = []
        for _ in range(_FLOODS):
            for how, found in p99.items():
                text = policy_of(_RULE).replace("\nrules:", f"\nforged_resets: {how}\nrules:")
                guard.ask("policy-apply", name="held.yaml", text=text)
                aims.append(aim := _link(site, listener))
                exact = segment_of(aim, RST)
                before = _cpu(guard)
                with _flood(site, [_bent(exact, **change) for change in changes]) as sent:
                    found.append(quantiles(_times(links), n=100)[-1])
                if how == "hold":
                    used.append((_cpu(guard) - before) / _FLOOD_SECONDS)
                    rates.append(sent[0] / _FLOOD_SECONDS)
                elif not changes[0]:
                    aims.pop().close()  # nothing protects it
        time.sleep(3)  # what was beyond the limit is looked for once a second
        for link in (*aims, *links):
            link.talk()  # raises if one is dead
        for link in aims:
            link.close()
        note = f"{min(rates):,.0f} to {max(rates):,.0f} forged RSTs a second for {_FLOOD_SECONDS:g}"
        note += " s, in turn off and hold"
        figure = f"forged RSTs {name}: "
        times = ratios(p99["hold"], p99["off"])
        yield at_most(GOAL_RATIO, f"{figure}honest p99, hold to off", times, "times", note)
        yield seen(f"{figure}honest p99 with hold", p99["hold"], "ms", note)
        yield seen(f"{figure}processor time of the guard", used, "cores", note)
    for link in links:
        link.close()


def _crowd(site: Site, listener: socket.socket) -> Iterator[Figure]:
    """Exact RSTs on 5,000 connections of the attacker's, who keeps silent, and on others'."""
    to_attacker = ("raw", "-A", "PREROUTING", "-d", _ATTACKERS, "-j", "DROP")
    victims = [_link(site, listener, _VICTIM) for _ in range(_CONNECTIONS)]
    own = [_link(site, listener, f"198.51.100.{1 + n % 250}") for n in range(_CROWD)]
    flood = [segment_of(link, RST) for link in own]
    site.run("client", "iptables", "-w", "-t", *to_attacker)
    for first in range(0, _CROWD, _CROWD // 10):
        send_into(site, "client", *flood[first : first + _CROWD // 10])
        for name in ("client", "server"):
            send_into(site, name, *[segment_of(link, RST, name) for link in victims])
    time.sleep(3)
    dead = [float(sum(is_dead(link.server) or is_dead(link.client) for link in victims))]
    name = f"forged RSTs, and {_CROWD:,} exact ones on connections of one's own: killed elsewhere"
    yield at_most(0, name, dead, f"of {_CONNECTIONS}", "in ten parts, each followed by the others")
    if not any(dead):
        for link in victims:
            link.talk()
    for link in (*own, *victims):
        link.close()


def _bent(packet: bytes, port: int | None = None, ahead: int = 0) -> bytes:
    """Return a RST from another port, or with a higher number; the checksum is put right."""
    segment = bytearray(packet[20:])
    before = sum(struct.unpack(">4H", segment[0:8]))
    if port is not None:
        segment[0:2] = port.to_bytes(2, "big")
    number = int.from_bytes(segment[4:8], "big") + ahead
    segment[4:8] = (number & 0xFFFFFFFF).to_bytes(4, "big")
    after = sum(struct.unpack(">4H", segment[0:8]))
    # RFC 1624: HC' = ~(~HC + ~m + m'), over the words that changed.
    total = (~int.from_bytes(segment[16:18], "big") & 0xFFFF) + after - before
    segment[16:18] = (~(total % 0xFFFF) & 0xFFFF).to_bytes(2, "big")
    return packet[:20] + bytes(segment)


@contextlib.contextmanager
def _flood(site: Site, packets: list[bytes]) -> Iterator[list[int]]:
    """Send packets from the client's network, in turn, at a steady rate, by another process."""
    sent = [0]
    mac = bytes.fromhex(site.gateway_mac().replace(":", ""))
    frames = [(mac + bytes(6) + b"\x08\x00" + packet).hex() for packet in packets]
    program = subprocess.Popen(
        site.command("client", sys.executable, "-c", _SENDER, str(_A_SECOND)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("\n".join(frames) + "\n\n")
    program.stdin.flush()
    try:
        yield sent
    finally:
        sent[0] = int(program.communicate("over\n")[0])


_SENDER = """\
import select, socket, sys, time
frames = [bytes.fromhex(line) for line in iter(sys.stdin.readline, "\\n")]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("eth0", 0))
began, sent = time.monotonic(), 0
while not select.select([sys.stdin], [], [], 0.0005)[0]:
    due = int((time.monotonic() - began) * int(sys.argv[1])) - sent
    for one in range(due):
        wire.send(frames[(sent + one) % len(frames)])
    sent += due
print(sent)
"""


def _times(links: list[Link]) -> list[float]:
    """Talk on all connections in turn, and return how long each took."""
    times = []
    end = time.monotonic() + _FLOOD_SECONDS
    while time.monotonic() < end:
        for link in links:
            began = time.monotonic_ns()
            link.talk()
            times.append(milliseconds_since(began))
            time.sleep(0.002)
    return times


def _cpu(guard: GuardProcess) -> float:
    status = guard.status()
    children = [*status["workers"], status["sweeper"], *filter(None, [status["asker"]])]
    return sum(cpu_seconds(child["pid"]) for child in children)
