"""How soon connections are dead at both ends after an administrator said so."""

from __future__ import annotations

import errno
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median

from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_most, seen
from tests.bench.gateway import (
    CLIENT,
    PORT,
    SERVER,
    Site,
    allow_files,
    milliseconds_since,
    policy_of,
)
from tests.support.odd import odd_segments

IDLE_GOAL_MS, HOARD_GOAL_MS, BULK_GOAL_MS, LATER_GOAL_MS = 1000.0, 5000.0, 500.0, 100.0
HOARD = 2000
_IDLE_TIMES, _BULK_TIMES, _HOARD_TIMES = 9, 7, 3
_PATIENCE_MS = 15_000
_RULE = "name: idle, measure: idle, over: 15m, then: reset"

Pair = tuple[socket.socket, socket.socket]


def kills() -> Iterator[Figure]:
    """From `rstguard kill` to the death of both ends: idle, busy, and 2,000 at once."""
    allow_files(4 * HOARD + 200)
    with Site() as site, site.listen("server", PORT) as listener:
        guard = site.guard(policy_of(_RULE))
        commands, requests = [], []
        for _ in range(_IDLE_TIMES):
            commands.append(_kill_idle(site, listener, _by_command(guard)))
            requests.append(_kill_idle(site, listener, _by_request(guard)))
        hoards = [_kill_hoard(site, listener, guard, ban=False) for _ in range(_HOARD_TIMES)]
        bulk_commands, bulk_requests = [], []
        for _ in range(_BULK_TIMES):
            bulk_commands.append(_kill_bulk(site, listener, _by_command(guard)))
            bulk_requests.append(_kill_bulk(site, listener, _by_request(guard)))
        bans = [_kill_hoard(site, listener, guard, ban=True) for _ in range(_HOARD_TIMES)]
        plain, busy = [], []
        for _ in range(_IDLE_TIMES):
            plain.append(_kill_idle(site, listener, _by_request(guard)))
            busy.append(_kill_beside_odd_segments(site, listener, _by_request(guard)))
        drop = ["-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"]
        site.run("server", "iptables", "-w", *drop)
        strict = [_kill_idle(site, listener, _by_request(guard)) for _ in range(_IDLE_TIMES)]
        guard.stop()
    both = "both ends have ECONNRESET; from the start of the command, Python's own start included"
    asked = "from the request on the control socket"
    yield at_most(IDLE_GOAL_MS, "kill: idle connection, by the command", commands, "ms", both)
    yield seen("kill: idle connection, by request", requests, "ms", asked)
    all_of = f"the last of {2 * HOARD:,} sockets has ECONNRESET, and ss finds none on the server"
    yield at_most(HOARD_GOAL_MS, f"kill: {HOARD:,} idle connections", hoards, "ms", all_of)
    yield at_most(HOARD_GOAL_MS, f"ban: {HOARD:,} idle connections", bans, "ms", all_of)
    yield at_most(BULK_GOAL_MS, "kill: bulk stream, by request", bulk_requests, "ms", asked)
    yield seen("kill: bulk stream, by the command", bulk_commands, "ms", both)
    odd = "behind 500 segments a second that the server answers as often as it may, in turns"
    yield at_most(
        LATER_GOAL_MS, "kill: later beside odd segments", [_later(busy, plain)], "ms", odd
    )
    strictly = "the server drops INVALID segments; by request"
    yield at_most(IDLE_GOAL_MS, "kill: idle connection, strict server", strict, "ms", strictly)


Kill = Callable[[int], None]


def _later(these: list[float], those: list[float]) -> float:
    return max(0.0, median(these) - median(those))


def _by_command(guard: GuardProcess) -> Kill:
    def kill(port: int) -> None:
        command = guard.words("kill", "--source", CLIENT, "--source-port", str(port))
        subprocess.run(command, check=True, capture_output=True)

    return kill


def _by_request(guard: GuardProcess) -> Kill:
    def kill(port: int) -> None:
        done = guard.ask("kill", source=CLIENT, source_port=port)
        if done["confirmed"] != 1:
            raise RuntimeError(f"the kill was not confirmed: {done}")

    return kill


def _pair(site: Site, listener: socket.socket) -> Pair:
    client = site.client_socket()
    client.connect((SERVER, PORT))
    server, _ = listener.accept()
    return client, server


def _kill_idle(site: Site, listener: socket.socket, kill: Kill) -> float:
    pair = _pair(site, listener)
    return _time_of_death(pair, lambda: kill(pair[0].getsockname()[1]))


def _kill_beside_odd_segments(site: Site, listener: socket.socket, kill: Kill) -> float:
    pair = _pair(site, listener)
    pair[0].sendall(b"hello")
    assert pair[1].recv(5) == b"hello"
    port = pair[0].getsockname()[1]
    with odd_segments(site, pair[0].dup()):
        return _time_of_death(pair, lambda: kill(port))


def _kill_hoard(site: Site, listener: socket.socket, guard: GuardProcess, ban: bool) -> float:
    ends = [end for _ in range(HOARD) for end in _pair(site, listener)]
    began = time.monotonic_ns()
    if ban:
        _time_of_death(ends, lambda: guard.ask("ban-add", source=CLIENT, seconds=60))
    else:
        _time_of_death(ends, lambda: guard.ask("kill", source=CLIENT))
    wait_until(lambda: not site.run("server", "ss", "-tnH", f"sport = :{PORT}").strip())
    took = milliseconds_since(began)
    if ban:
        guard.ask("ban-remove", source=CLIENT)
    return took


def _time_of_death(ends: Iterable[socket.socket], kill: Callable[[], object]) -> float:
    """Return the time from the kill to the death of the last end; close them all."""
    alive = {end.fileno(): end for end in ends}
    poll = select.epoll()
    for descriptor in alive:
        poll.register(descriptor, 0)  # errors and hang-ups are told in any case
    murderer = threading.Thread(target=kill)
    began = time.monotonic_ns()
    murderer.start()
    while alive and milliseconds_since(began) < _PATIENCE_MS:
        for descriptor, _ in poll.poll(0.1, 1000):
            end = alive.pop(descriptor)
            error = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            poll.unregister(descriptor)
            end.close()
            if error != errno.ECONNRESET:
                raise RuntimeError(f"an end died of {errno.errorcode.get(error, error)}")
    took = milliseconds_since(began)
    murderer.join()
    poll.close()
    if alive:
        raise RuntimeError(f"{len(alive)} ends were not dead after {_PATIENCE_MS} ms")
    return took


def _kill_bulk(site: Site, listener: socket.socket, kill: Kill) -> float:
    """Time the death of a connection over which data flows as fast as it goes."""
    client, server = _pair(site, listener)
    client.settimeout(None)
    moved, deaths = [0], [0, 0]

    def send() -> None:
        block = bytes(1 << 18)
        try:
            while True:
                client.sendall(block)
        except ConnectionResetError:
            deaths[0] = time.monotonic_ns()

    def receive() -> None:
        room = bytearray(1 << 18)
        try:
            while True:
                moved[0] += server.recv_into(room)
        except ConnectionResetError:
            deaths[1] = time.monotonic_ns()

    both = [threading.Thread(target=one) for one in (send, receive)]
    for one in both:
        one.start()
    wait_until(lambda: moved[0] > 20 << 20)
    began = time.monotonic_ns()
    kill(client.getsockname()[1])
    for one in both:
        one.join(_PATIENCE_MS / 1000)
    client.close()
    server.close()
    if not all(deaths):
        raise RuntimeError("an end of the stream did not die")
    return (max(deaths) - began) / 1e6
