"""Honest RSTs of every kind: how many are delivered, and how much later if they are held.

A thousand of each kind, with `forged_resets: off` and `hold` in turn.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from statistics import median

from tests.bench.figures import Figure, at_least, seen
from tests.bench.gateway import CLIENT, PORT, SERVER, Site, milliseconds_since, policy_of

_COUNT = 1_000
_ROUNDS = 5
_TOGETHER = 50
_CLOSED = PORT + 1
_RULE = "name: resets, measure: reset_rate, over: 100000/s, then: drop"
_ABORT = struct.pack("ii", 1, 0)
_KILLED = """\
import socket, sys
held = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(int(sys.argv[3]))]
for one in held:
    one.recv(1)
print("read", flush=True)
sys.stdin.read()
"""

Try = Callable[[Site, socket.socket, int], list[float]]
"""Have so many RSTs sent, and return how many milliseconds each took that arrived."""


def honest() -> Iterator[Figure]:
    """A thousand honest RSTs of each kind: delivered, and the delay that being held adds."""
    with Site() as site, site.listen("server", PORT) as listener:
        guard = site.guard(policy_of(_RULE))
        for name, attempt in _KINDS.items():
            times: dict[str, list[float]] = {"off": [], "hold": []}
            for _ in range(_ROUNDS):
                for how, found in times.items():
                    text = policy_of(_RULE).replace("\nrules:", f"\nforged_resets: {how}\nrules:")
                    guard.ask("policy-apply", name="honest.yaml", text=text)
                    found.extend(attempt(site, listener, _COUNT // _ROUNDS))
            arrived = len(times["hold"])
            yield at_least(_COUNT, f"honest RSTs, {name}: delivered", [arrived], f"of {_COUNT}")
            added = median(times["hold"]) - median(times["off"])
            note = "the median with the key less that without it"
            yield seen(f"honest RSTs, {name}: what being held adds", [added], "ms", note)
        guard.stop()


def _pair(site: Site, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = site.client_socket()
    client.connect((SERVER, PORT))
    return client, _greeted(client, listener)


def _greeted(client: socket.socket, listener: socket.socket) -> socket.socket:
    """Return the server's end of a new connection over which both have spoken."""
    server = listener.accept()[0]
    server.settimeout(5)
    client.sendall(b"hello")
    server.recv(5)
    server.sendall(b"hello")
    client.recv(5)
    return server


def _until_reset(began: int, one: socket.socket) -> list[float]:
    """Wait for a connection's RST; return how long it took, or nothing if it did not come."""
    try:
        while one.recv(1 << 16):
            pass
    except ConnectionResetError:
        return [milliseconds_since(began)]
    except OSError:
        return []
    finally:
        one.close()
    return []


def _abort(one: socket.socket) -> int:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    began = time.monotonic_ns()
    one.close()
    return began


def _refused(site: Site, listener: socket.socket, count: int) -> list[float]:
    times = []
    for _ in range(count):
        with site.client_socket() as one:
            began = time.monotonic_ns()
            with suppress(ConnectionRefusedError):
                one.connect((SERVER, _CLOSED))
                continue
            times.append(milliseconds_since(began))
    return times


def _linger(site: Site, listener: socket.socket, count: int) -> list[float]:
    times = []
    for _ in range(count):
        client, server = _pair(site, listener)
        times += _until_reset(_abort(client), server)
    return times


def _unread(site: Site, listener: socket.socket, count: int) -> list[float]:
    times = []
    for _ in range(count):
        client, server = _pair(site, listener)
        server.sendall(b"nobody reads all of this")
        client.recv(1)
        began = time.monotonic_ns()
        client.close()
        times += _until_reset(began, server)
    return times


def _killed(site: Site, listener: socket.socket, count: int) -> list[float]:
    """Processes that are killed hold so many connections each, with something unread."""
    times = []
    words = (sys.executable, "-c", _KILLED, SERVER, str(PORT), str(_TOGETHER))
    for _ in range(count // _TOGETHER):
        program = subprocess.Popen(
            site.command("client", *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        servers = [listener.accept()[0] for _ in range(_TOGETHER)]
        for server in servers:
            server.settimeout(5)
            server.sendall(b"nobody reads all of this")
        assert program.stdout is not None
        program.stdout.readline()
        began = time.monotonic_ns()
        program.kill()
        for server in servers:
            times += _until_reset(began, server)
        program.communicate()
    return times


def _in_bulk(site: Site, listener: socket.socket, count: int) -> list[float]:
    """The client gives up while as much comes as its buffers take."""
    times = []
    for _ in range(count):
        client, server = _pair(site, listener)
        server.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                server.send(bytes(1 << 18))
        client.recv(1 << 16)
        server.settimeout(5)
        times += _until_reset(_abort(client), server)
    return times


def _again(site: Site, listener: socket.socket, count: int) -> list[float]:
    """The port of a connection that was aborted opens the next at once: the time of both."""
    times = []
    for _ in range(count):
        client, server = _pair(site, listener)
        port = client.getsockname()[1]
        began = _abort(client)
        with site.inside("client"):
            client = socket.socket()
        client.bind((CLIENT, port))
        client.settimeout(5)
        client.connect((SERVER, PORT))
        times += _until_reset(began, server)
        server = _greeted(client, listener)
        client.close()
        server.close()
    return times


_KINDS: dict[str, Try] = {
    "refused": _refused,
    "linger 0": _linger,
    "unread data": _unread,
    "kill -9": _killed,
    "in mid-bulk": _in_bulk,
    "port used again at once": _again,
}
