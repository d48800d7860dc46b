"""Whatever is sent to the control socket, the guard answers in one line and goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rstguard.control.protocol import ask
from rstguard.ipc.requests import ControlError
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts

pytestmark = pytest.mark.netns

POLICY = """
version: 1
protect: {interfaces: [out]}
rules:
  - {name: drop, measure: syn_rate, over: 1000/s, then: drop}
"""


@pytest.fixture(scope="module")
def guard(lab: ThreeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Guard(lab, POLICY, tmp_path_factory.mktemp("control")) as guard:
        yield guard


@pytest.fixture
def line(guard: Guard) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(10)
        one.connect(str(guard.runtime / "control.sock"))
        yield one


def said(line: socket.socket) -> Any:
    with line.makefile("rb") as stream:
        return json.loads(stream.readline())


def test_it_is_for_root_alone(guard: Guard) -> None:
    mode = (guard.runtime / "control.sock").stat()
    assert stat.S_IMODE(mode.st_mode) == 0o600
    assert mode.st_uid == 0


JUNK = [
    (b"hello\n", "no JSON"),
    (b"\n", "no JSON"),
    (b"\xff\xfe\0\n", "no JSON"),
    (b"[" * 100_000 + b"\n", "no JSON"),
    (b"[1, 2]\n", 'with a "command"'),
    (b'"status"\n', 'with a "command"'),
    (b'{"command": 7}\n', 'with a "command"'),
    (b'{"command": "reboot"}\n', "unknown command 'reboot'"),
    (b'{"command": "ban-add"}\n', "lacks 'source'"),
    (b'{"command": "ban-add", "source": 7}\n', "lacks 'source'"),
    (b'{"command": "ban-add", "source": "1.2.3.4"}\n', "1 to"),
    (b'{"command": "ban-add", "source": "1.2.3.4", "seconds": 1e9}\n', "1 to"),
    (b'{"command": "ban-add", "source": "1.2.3.4", "seconds": true}\n', "1 to"),
    (b'{"command": "ban-add", "source": "::/0", "seconds": 9}\n', "everybody"),
    (b'{"command": "ban-remove", "source": "%s"}\n' % (b"9" * 5000), "no address"),
    (b'{"command": "kill", "port": "80"}\n', "a port is a number"),
    (b'{"command": "kill", "port": true}\n', "a port is a number"),
    (b'{"command": "kill", "source": {"a": 1}}\n', "lacks 'source'"),
    (b'{"command": "policy-apply", "name": "x"}\n', "lacks 'text'"),
    (b'{"command": "policy-apply", "name": "x", "text": "\\u0000"}\n', "x:"),
    (b'{"command": "policy-apply", "name": "x", "text": "[[[[[[[[[[[["}\n', "x:"),
]


@pytest.mark.parametrize(("sent", "answer"), JUNK, ids=[repr(sent[:50]) for sent, _ in JUNK])
def test_junk(guard: Guard, line: socket.socket, sent: bytes, answer: str) -> None:
    line.sendall(sent)
    reply = said(line)
    assert reply["ok"] is False
    assert answer in reply["error"]
    line.sendall(b'{"command": "ban-list"}\n')
    assert said(line) == {"ok": True, "data": []}
    assert guard.filtering()  # a mistake of an administrator is no ban that could not be placed


def test_a_huge_line(guard: Guard, line: socket.socket) -> None:
    try:
        for _ in range(20):
            line.sendall(b"x" * (1 << 20))
    except OSError:
        pass  # it has heard enough
    else:
        assert "too long" in said(line)["error"]
    assert guard.filtering()


def test_half_a_line(guard: Guard, line: socket.socket) -> None:
    line.sendall(b'{"command": "sta')
    assert guard.filtering()
    line.sendall(b'tus"}\n')
    assert said(line)["data"]["filtering"]


def test_half_a_line_and_away(guard: Guard, line: socket.socket) -> None:
    line.sendall(b'{"command": "ban-add", "source": "203.0.113.5", "seconds": 60}')
    line.close()
    assert guard.filtering()


def test_a_question_and_away(guard: Guard) -> None:
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(guard.runtime / "control.sock"))
            one.sendall(b'{"command": "status"}\n' * 3)
    assert guard.filtering()
    assert "Traceback" not in guard.log.read_text()


def test_many_that_say_nothing(guard: Guard) -> None:
    crowd = [socket.socket(socket.AF_UNIX) for _ in range(200)]
    try:
        for one in crowd:
            one.connect(str(guard.runtime / "control.sock"))
        assert guard.filtering()
    finally:
        for one in crowd:
            one.close()


def memory(guard: Guard) -> int:
    """Return how many MiB the supervisor holds."""
    status = Path(f"/proc/{guard.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) >> 10


def test_many_that_begin_a_long_request(guard: Guard) -> None:
    """Whoever has been silent longest has to go, and what it sent with it."""
    path = str(guard.runtime / "control.sock")
    before = memory(guard)
    with contextlib.ExitStack() as crowd:
        for _ in range(300):
            one = crowd.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(5)
            one.connect(path)
            with contextlib.suppress(OSError):
                one.sendall(b"x" * (4 << 20))
        assert guard.filtering()
        open_now = len(list(Path(f"/proc/{guard.pid}/fd").iterdir()))
    assert open_now < 150
    assert memory(guard) - before < 64 * 4 * 2
    assert guard.filtering()


def test_more_than_can_wait_are_told_so(guard: Guard) -> None:
    path = str(guard.runtime / "control.sock")
    os.kill(guard.pid, signal.SIGSTOP)
    try:
        with contextlib.ExitStack() as crowd:
            with contextlib.suppress(BlockingIOError):
                while True:
                    one = crowd.enter_context(socket.socket(socket.AF_UNIX))
                    one.setblocking(False)
                    one.connect(path)
            with pytest.raises(ControlError, match="too many wait for the guard"):
                ask(guard.runtime, {"command": "status"}, 0.5)
    finally:
        os.kill(guard.pid, signal.SIGCONT)
    wait_until(guard.filtering)


def test_questions_of_many_at_once(guard: Guard, line: socket.socket) -> None:
    line.sendall(b'{"command": "policy-show"}\n' * 50)
    with line.makefile("rb") as stream:
        answers = [json.loads(stream.readline()) for _ in range(50)]
    assert all(answer["ok"] for answer in answers)


commands = st.sampled_from(
    ["status", "policy-apply", "policy-show", "policy-confirm", "policy-history", "ban-list",
     "ban-add", "ban-remove", "ban-import", "kill", "events", "explain", "nothing"]
)  # fmt: skip
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.sampled_from(["192.0.2.1", "::1", "version: 1", "1.2.3.4/33", "10.0.0.0/8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
keys = st.sampled_from(
    ["source", "seconds", "name", "text", "bans", "after", "most", "port", "destination", "who",
     "confirm_s", "ssh", "keep_existing", "account", "source_port"]
)  # fmt: skip


def asked_and_answered(guard: Guard, command: str, fields: dict[str, Any]) -> None:
    # What is asked here is to be odd, not to end the connections of the test's own machine.
    if command == "kill" and set(fields) & {"source", "destination", "port", "source_port"}:
        fields = fields | {"source": "192.0.2.77"}
    with contextlib.suppress(ControlError):
        guard.ask(command, **fields)
    assert guard.filtering()


@given(commands, st.dictionaries(keys, values, max_size=6))
@settings(max_examples=120)
def test_requests_of_odd_fields(guard: Guard, command: str, fields: dict[str, Any]) -> None:
    asked_and_answered(guard, command, fields)


@pytest.mark.fuzz_long
@given(commands, st.dictionaries(keys, values, max_size=6))
@settings(max_examples=5000)
def test_many_requests_of_odd_fields(guard: Guard, command: str, fields: dict[str, Any]) -> None:
    asked_and_answered(guard, command, fields)


def test_nothing_of_it_was_an_error_of_ours(guard: Guard) -> None:
    """The guard answers what it cannot meet with a sentence; a trace would be in its log."""
    assert "Traceback" not in guard.log.read_text()
