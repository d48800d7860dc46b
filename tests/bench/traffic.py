"""What the guard costs honest traffic: against the same gateway that only tracks connections."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from rstguard.lab.waiting import wait_until
from tests.bench.figures import Figure, at_least, ratios, seen
from tests.bench.gateway import PORT, SERVER, Site, cpu_seconds, example_policy

BULK_GOAL, NEW_GOAL = 0.95, 0.75
_BULK_ROUNDS, _BULK_SECONDS = 40, 0.25
_NEW_ROUNDS, _NEW_SECONDS = 6, 2
_BULK_PORT = PORT + 1
_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  server {{ listen {port} backlog=4096; location / {{ return 200 "ok\\n"; }} }}
}}
"""
_RAISED = "example policy with the SYN limits raised out of reach"


def bulk() -> Iterator[Figure]:
    """A trusted connection's throughput, with the guard and without."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Site()) for _ in range(2))
        guard = ours.guard(example_policy())
        guarded, plain = (stack.enter_context(_Stream(site)) for site in (ours, theirs))
        for stream in (guarded, plain):
            stream.bytes_a_second(_BULK_SECONDS)
        mine, other = list[float](), list[float]()
        turns = [(guarded, mine), (plain, other)]
        for _ in range(_BULK_ROUNDS):
            for stream, rates in turns:
                rates.append(stream.bytes_a_second(_BULK_SECONDS) / 1e9)
            turns.reverse()  # whoever is first has no advantage over the whole
        seen_by_worker = guard.status()["counts"]["packets"]
        guard.stop()
    note = f"example policy; of all packets of the stream {seen_by_worker} went through the queue"
    yield at_least(BULK_GOAL, "bulk: guard / tracking only", ratios(mine, other), "", note)
    yield seen("bulk: guard", mine, "GB/s")
    yield seen("bulk: tracking only", other, "GB/s")


def connections() -> Iterator[Figure]:
    """New connections a second, one request each, flat out, with the guard and without."""
    with Site() as ours, Site() as theirs:
        guard = ours.guard(example_policy(raised=True))
        for site in (ours, theirs):
            _serve(site)
            _requests_a_second(site)
        mine, other, spent = [], [], []
        for _ in range(_NEW_ROUNDS):
            before = cpu_seconds(guard.workers[0])
            mine.append(_requests_a_second(ours))
            used = cpu_seconds(guard.workers[0]) - before
            spent.append(100 * used / _NEW_SECONDS)
            other.append(_requests_a_second(theirs))
        guard.stop()
    note = f"wrk with Connection: close against nginx; {_RAISED}; all on the same cores"
    yield at_least(
        NEW_GOAL, "new connections: guard / tracking only", ratios(mine, other), "", note
    )
    yield seen("new connections: guard", mine, "/s")
    yield seen("new connections: tracking only", other, "/s")
    yield seen("new connections: processor time of the worker", spent, "% of a core")


class _Stream:
    """A connection through a site that can carry data at full speed for a while."""

    def __init__(self, site: Site) -> None:
        self._moved = 0
        with site.listen("server", _BULK_PORT) as listener:
            self._client = site.client_socket()
            self._client.connect((SERVER, _BULK_PORT))
            self._client.settimeout(None)
            self._server, _ = listener.accept()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.shutdown(socket.SHUT_WR)
        self._reader.join()
        self._client.close()
        self._server.close()

    def _read(self) -> None:
        room = bytearray(1 << 18)
        while got := self._server.recv_into(room):
            self._moved += got

    def bytes_a_second(self, seconds: float) -> float:
        """Send for some seconds; return how many bytes a second arrived."""
        block = bytes(1 << 18)
        moved, sent, began = self._moved, 0, time.monotonic()
        while time.monotonic() - began < seconds:
            sent += self._client.send(block)
        wait_until(lambda: self._moved - moved == sent)
        return sent / (time.monotonic() - began)


def _serve(site: Site) -> None:
    file = site.directory / "nginx.conf"
    file.write_text(_NGINX.format(directory=site.directory, port=PORT))
    site.start("server", "nginx", "-c", str(file), "-e", "stderr")
    wait_until(lambda: bool(site.run("server", "ss", "-tlnH", f"sport = :{PORT}").strip()))


def _requests_a_second(site: Site) -> float:
    wrk = ["wrk", "-t1", "-c64", f"-d{_NEW_SECONDS}s", "-H", "Connection: close"]
    program = site.start("client", *wrk, f"http://{SERVER}:{PORT}/", piped=True)
    said, _ = program.communicate()
    found = re.search(r"Requests/sec: +([0-9.]+)", said)
    if program.returncode or not found or "Non-2xx" in said:
        raise RuntimeError(f"wrk did not do what it should: {said}")
    return float(found[1])
