"""A worker or sweeper that goes wrong in a running guard: told why, ended, and started again."""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rstguard.ipc.messages import Start
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.packets import ruleset

pytestmark = pytest.mark.netns

POLICY = """
version: 1
name: last-words
protect: {interfaces: [out]}
rules:
  - {name: rate, measure: syn_rate, over: 10000/s, then: ban, for: 60s}
"""
PIDFD_GETFD = 438  # asm-generic/unistd.h
CHILDREN = pytest.mark.parametrize("child", ["worker", "sweeper"])


@pytest.fixture
def guard(lab: ThreeHosts, tmp_path: Path) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path / "run") as guard:
        wait_until(lambda: guard.status()["sweeper"]["ready"])
        yield guard


@contextmanager
def channels(pid: int) -> Iterator[list[socket.socket]]:
    """Take hold of the ends of channels that another process has open."""
    process = os.pidfd_open(pid)
    found, numbers = [], []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if str(entry.readlink()).startswith("socket:"):
                    numbers.append(int(entry.name))
        for number in numbers:
            copy = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, number, 0)
            if copy < 0:  # closed since it was listed
                continue
            end = socket.socket(fileno=copy)
            if end.family == socket.AF_UNIX and end.type == socket.SOCK_SEQPACKET:
                found.append(end)
            else:
                end.close()
        yield found
    finally:
        for end in found:
            end.close()
        os.close(process)


def pid_of(guard: Guard, child: str) -> int:
    status = guard.status()
    return int((status["workers"][0] if child == "worker" else status["sweeper"])["pid"])


def is_replaced(guard: Guard, child: str, pid: int) -> bool:
    status = guard.status()
    one = status["workers"][0] if child == "worker" else status["sweeper"]
    return bool(one["pid"] not in (0, pid) and one["ready"] and one["restarts"] == 1)


def told(guard: Guard) -> list[str]:
    restarts = [event for event in guard.status()["recent"] if event["kind"] == "restart"]
    return [f"{event['subject']}: {event['detail']}" for event in restarts]


@CHILDREN
def test_one_that_sends_what_is_no_message_is_replaced(guard: Guard, child: str) -> None:
    pid = pid_of(guard, child)
    with channels(pid) as ends:
        (end,) = ends
        end.send(b'["Blocked",[[1,32],"ban","rate",600,false],"nobody knows why"]')
    wait_until(lambda: is_replaced(guard, child, pid), 10)
    (detail,) = told(guard)
    assert "sent what is no message (Invalid enum value 'nobody knows why'" in detail
    wait_until(guard.filtering)
    assert guard.ask("ban-list") == []


@CHILDREN
def test_one_that_fails_on_something_unexpected_says_so(guard: Guard, child: str) -> None:
    """Here: it is told to begin a second time, by somebody with the supervisor's descriptors."""
    pid = pid_of(guard, child)
    with channels(guard.status()["supervisor"]["pid"]) as ends:
        for end in ends:
            end.send(pickle.dumps(Start(ruleset(), 1)))
    wait_until(lambda: is_replaced(guard, child, pid), 10)
    said = told(guard)
    assert any("it failed on something unexpected: ValueError(" in one for one in said), said
    wait_until(guard.filtering)
