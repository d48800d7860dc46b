"""How soon the guard answers and recovers while something holds it up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rstguard.control.protocol import SOCKET_NAME
from rstguard.ipc.requests import ControlError
from rstguard.lab.guard import GuardProcess
from rstguard.lab.waiting import wait_until
from rstguard.supervisor.child import CALM_SECONDS
from tests.bench.figures import Figure, at_most
from tests.bench.gateway import Site, milliseconds_since, policy_of
from tests.support.beside import beside

ANSWER_MS, REPLACED_MS = 100.0, 300.0
_ASKED = 40
_KILLED = 3
"""Deaths after which the next start follows at once; then there would be pauses."""
_READERS = 200
_OTHER_RULES = 12_000
"""Of another program, of some 90 bytes each: a megabyte of text from iptables-save."""
_RULES = 500
_RULE = "name: r{n}, measure: syn_rate, ports: [{port}], over: {n}/s, then: drop"


def waits() -> Iterator[Figure]:
    """The longest that status takes under strain, and how soon a dead worker is replaced."""
    with Site() as site:
        guard = site.guard(policy_of(_RULE.format(n=1, port=80)))
        strains: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "nothing": contextlib.nullcontext,
            f"policies of {_RULES} rules applied": lambda: _applying(guard),
            "a locked state file": lambda: _locked(guard),
            f"{_READERS} clients that do not read": lambda: _readers(guard),
            "a megabyte of another program's rules": lambda: _others(site),
        }
        for name, strain in strains.items():
            with strain():
                yield at_most(ANSWER_MS, f"status: {name}", _answers(guard), "ms", "one by one")
                note = "from kill -9 until its successor serves"
                replaced = _replaced(guard)
                yield at_most(REPLACED_MS, f"dead worker: {name}", replaced, "ms", note)
        guard.stop()


def _answers(guard: GuardProcess) -> list[float]:
    times = []
    for _ in range(_ASKED):
        began = time.monotonic_ns()
        guard.status()
        times.append(milliseconds_since(began))
        time.sleep(0.02)
    return times


def _replaced(guard: GuardProcess) -> list[float]:
    time.sleep(CALM_SECONDS + 1)  # what died before is forgotten
    return [_one_replaced(guard) for _ in range(_KILLED)]


def _one_replaced(guard: GuardProcess) -> float:
    before = guard.status()["workers"][0]
    os.kill(before["pid"], signal.SIGKILL)
    began = time.monotonic_ns()

    def serves() -> bool:
        now: dict[str, Any] = guard.status()["workers"][0]
        return bool(now["restarts"] > before["restarts"] and now["state"] == "serving")

    wait_until(serves)
    return milliseconds_since(began)


@contextmanager
def _applying(guard: GuardProcess) -> Iterator[None]:
    before = guard.ask("policy-show")
    rules = (_RULE.format(n=n, port=1000 + n) for n in range(1, _RULES + 1))
    text = policy_of(*rules)

    def apply() -> None:
        with contextlib.suppress(ControlError):
            guard.ask("policy-apply", name="many.yaml", text=text)

    with beside(apply):
        yield
    guard.ask("policy-apply", name="one.yaml", text=before["text"])


@contextmanager
def _locked(guard: GuardProcess) -> Iterator[None]:
    file = guard.runtime / "state" / "state.db"
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")

        def ban() -> None:  # something to be written
            guard.ask("ban-add", source="192.0.2.1", seconds=60)
            time.sleep(0.1)

        with beside(ban):
            yield


@contextmanager
def _readers(guard: GuardProcess) -> Iterator[None]:
    with contextlib.ExitStack() as all_of_them:
        for _ in range(_READERS):
            client = all_of_them.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(1)
            with contextlib.suppress(OSError):  # too many, and it was the longest silent
                client.connect(str(guard.runtime / SOCKET_NAME))
                client.sendall(b'{"command": "status"}\n' * 10)
        yield


@contextmanager
def _others(site: Site) -> Iterator[None]:
    rules = "".join(
        f"-A others -s 10.{n >> 8}.{n & 255}.0/24 -p tcp -m tcp --dport {n} -m comment"
        f' --comment "kept by another one" -j ACCEPT\n'
        for n in range(1, _OTHER_RULES + 1)
    )
    text = f"*filter\n:others -\n{rules}COMMIT\n"
    site.run("gateway", "iptables-restore", "--noflush", stdin=text)
    try:
        yield
    finally:
        site.run("gateway", "iptables", "-w", "-F", "others")
        site.run("gateway", "iptables", "-w", "-X", "others")
