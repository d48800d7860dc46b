"""The control socket and the page among hostile clients: whoever asks in earnest is answered.

The listeners run with answers that cost nothing; all sockets are real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import resource
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rstguard.control import web
from rstguard.control.protocol import LARGEST, MOST_ANSWERED, MOST_CONNECTED, ask, listens, serve
from rstguard.ipc.requests import ControlError, Request
from rstguard.lab.waiting import wait_until

SOON = 0.1
ANSWER = {
    "state": "filtering", "filtering": True, "version": "1", "workers": [],
    "policy": {"name": "p", "mode": "enforce"}, "counts": {}, "resets": [],
    "sweeper": {"restarts": 0}, "asker": None, "blocked": {"ban": 0, "shun": 0},
    "shun": {"answer": "drop", "services": [], "why_not": "", "why_no_dnat": "", "cookies": {}},
    "sysctls": {}, "untracked": {"low_ttl": 0, "spoofed": 0, "spoofed_passed": 0},
    "foreign_marks": {"problems": [], "cleared": 0, "spared": 0}, "syn_budget": None,
    "pressure": [], "large_sources": [],
    "forgotten": {"adopted": 0, "dropped": 0},
    "limited": {"out_of_state": 0, "bad_flags": 0, "reset_rate": 0},
    "productive": 0, "uptime_s": 1.0, "recent": [], "panic": False, "capped": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Both ends of some thousand connections are of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Heard:
    """Answers requests, and keeps the last of them."""

    def __init__(self) -> None:
        self.last: Request = {}
        self.count = 0
        self.passes = 0
        """Of the loop, while `counting` runs."""
        self.held = threading.Event()
        """While it is set, a request to wait is not answered."""

    async def counting(self) -> None:
        while True:
            self.passes += 1
            await asyncio.sleep(0)

    async def answer(self, request: Request) -> object:
        self.last = request
        self.count += 1
        if request["command"] == "count":
            self.task = asyncio.create_task(self.counting())
        if request["command"] == "fail":
            raise ControlError(f"no: {request['why']}")
        if request["command"] == "wait":
            while self.held.is_set():
                await asyncio.sleep(0.01)
        return [] if request["command"] == "nearest" else ANSWER


@contextlib.contextmanager
def running(begin: Callable[[], Awaitable[Any]]) -> Iterator[None]:
    """Run a server in a loop of its own thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    task = asyncio.run_coroutine_threadsafe(_kept(begin), loop)
    ended = threading.Event()
    task.add_done_callback(lambda _: ended.set())
    try:
        yield
    finally:
        loop.call_soon_threadsafe(lambda: [one.cancel() for one in asyncio.all_tasks(loop)])
        ended.wait(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _kept(begin: Callable[[], Awaitable[Any]]) -> None:
    server = await begin()
    try:
        await asyncio.Event().wait()
    finally:
        if server is not None:
            server.close()


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def place(tmp_path: Path, heard: Heard) -> Iterator[Path]:
    """A directory with a control socket."""
    with running(lambda: serve(tmp_path, heard.answer)):
        wait_until(lambda: listens(tmp_path))
        yield tmp_path


@pytest.fixture
def crowd() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def client(crowd: contextlib.ExitStack, place: Path) -> socket.socket:
    one = crowd.enter_context(socket.socket(socket.AF_UNIX))
    one.settimeout(10)

    def connected() -> bool:
        with contextlib.suppress(BlockingIOError):  # as many wait already as may
            one.connect(str(place / "control.sock"))
            return True
        return False

    wait_until(connected)
    return one


def pushed(one: socket.socket, data: bytes) -> int:
    """Send as much as is taken at once, or until the other end has gone; return how much it was."""
    one.setblocking(False)
    sent = 0
    with contextlib.suppress(OSError):
        while sent < len(data):
            sent += one.send(data[sent : sent + (1 << 16)])
    return sent


def open_ones(crowd: list[socket.socket]) -> int:
    """Return how many have not been closed by the other end."""
    count = 0
    for one in crowd:
        one.setblocking(False)
        try:
            while data := one.recv(1 << 16):
                pass
            count += bool(data)
        except BlockingIOError:
            count += 1
        except ConnectionError:
            pass
    return count


def slowest(place: Path, times: int = 20) -> float:
    """Return the longest that an answer to `status` took, in seconds.

    Every tenth is left out: a test runs on machines that have other things to do as well.
    """
    took = []
    for _ in range(times):
        began = time.monotonic()
        assert ask(place, {"command": "status"}, 10)["filtering"]
        took.append(time.monotonic() - began)
    return sorted(took)[times - times // 10 - 1]


def test_those_who_never_send(place: Path, crowd: contextlib.ExitStack) -> None:
    silent = [client(crowd, place) for _ in range(200)]
    assert slowest(place) < SOON
    assert open_ones(silent) <= MOST_CONNECTED
    assert open_ones(silent[:100]) == 0  # the longest silent went first


def test_those_who_never_read(place: Path, heard: Heard, crowd: contextlib.ExitStack) -> None:
    deaf = [client(crowd, place) for _ in range(200)]
    for one in deaf:
        pushed(one, b'{"command": "status"}\n' * 10_000)
    assert slowest(place) < SOON
    wait_until(lambda: len(deaf) - gone(deaf) <= MOST_CONNECTED)
    assert heard.count < 200 * 10_000 / 2


def gone(crowd: list[socket.socket]) -> int:
    """Return how many can be written to no more."""
    count = 0
    for one in crowd:
        try:
            one.send(b" ")
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


def test_a_byte_a_second(place: Path, crowd: contextlib.ExitStack) -> None:
    slow = [client(crowd, place) for _ in range(MOST_CONNECTED)]
    for byte in b'{"comm':
        for one in slow:
            with contextlib.suppress(OSError):
                one.send(bytes([byte]))
        assert slowest(place, 3) < SOON
    assert 0 < open_ones(slow) < MOST_CONNECTED


def test_one_who_asks_10_000_times(place: Path, heard: Heard, crowd: contextlib.ExitStack) -> None:
    """It reads, too, so that the loop always has something to do for it."""
    eager = client(crowd, place)
    eager.sendall(b'{"command": "count"}\n')
    questions = b'{"command": "status"}\n' * 10_000
    read = bytearray()

    def reader() -> None:
        with contextlib.suppress(OSError):
            while data := eager.recv(1 << 16):
                read.extend(data)

    asking = threading.Thread(target=lambda: eager.sendall(questions))
    reading = threading.Thread(target=reader)
    reading.start()
    asking.start()
    assert slowest(place, 10) < SOON
    asking.join()
    wait_until(lambda: read.count(b"\n") == 10_001, 60)
    assert heard.passes > 10_000  # never two of its questions in one pass of the loop
    eager.shutdown(socket.SHUT_RDWR)
    reading.join()


def test_requests_of_many_megabytes(place: Path, crowd: contextlib.ExitStack) -> None:
    huge = [client(crowd, place) for _ in range(100)]
    sent = [pushed(one, b" " * (8 << 20)) for one in huge]
    assert slowest(place) < SOON
    for _ in range(20):
        sent = [have + pushed(one, b" " * (1 << 20)) for have, one in zip(sent, huge, strict=True)]
    assert slowest(place) < SOON
    assert max(sent) < 2 * LARGEST + (1 << 20)
    one = client(crowd, place)
    with contextlib.suppress(OSError):
        one.sendall(b" " * (LARGEST + (1 << 17)))
    assert b"too long (over 2 MiB)" in one.recv(1 << 16)


def test_the_largest_import_fits(place: Path, heard: Heard) -> None:
    bans = [["2001:db8:1234:5678:9abc:def0:1234:5678/128", 2_147_483]] * 25_000
    assert ask(place, {"command": "ban-import", "bans": bans})
    assert heard.last["bans"] == bans


def test_many_long_requests_at_once_are_bounded_and_an_import_gets_through(
    place: Path, crowd: contextlib.ExitStack
) -> None:
    sent = {client(crowd, place): 0 for _ in range(60)}
    size = LARGEST * 3 // 4

    def all_sent() -> bool:
        for one, have in sent.items():
            sent[one] = have + pushed(one, b" " * min(1 << 16, size - have))
        return all(have == size or gone([one]) for one, have in sent.items())

    wait_until(all_sent, 30)
    wait_until(lambda: 1 <= len(sent) - gone(list(sent)) <= 16)  # of a MiB at least, in 16 MiB
    bans = [["198.51.100.7", 60]] * 25_000
    assert ask(place, {"command": "ban-import", "bans": bans})


def answers(place: Path) -> bool:
    with contextlib.suppress(ControlError):
        return bool(ask(place, {"command": "status"})["filtering"])
    return False


def test_too_many_that_are_being_answered_are_told_so(
    place: Path, heard: Heard, crowd: contextlib.ExitStack
) -> None:
    heard.held.set()
    for _ in range(MOST_ANSWERED):
        client(crowd, place).sendall(b'{"command": "wait"}\n')
    wait_until(lambda: heard.count == MOST_ANSWERED)
    with pytest.raises(ControlError, match="too many others"):
        ask(place, {"command": "status"})
    heard.held.clear()
    wait_until(lambda: answers(place))


EVIL = "a\x1b]52;c;ZXZpbA==\x07b\r\nc\x07d\x9b31me\u202ef\x00g\x85h\x1b[31m[red]"


def test_strangers_text_is_made_plain_but_a_policy_is_not(place: Path, heard: Heard) -> None:
    request = {"command": "x", "who": EVIL, "text": EVIL, "list": [[EVIL]], EVIL: {EVIL: 1}}
    ask(place, request)
    assert heard.last["text"] == EVIL
    assert heard.last["account"] == pwd.getpwuid(os.geteuid()).pw_name
    others = [heard.last["who"], *heard.last["list"][0], *heard.last, *heard.last[plain_key(heard)]]
    assert all(one.isprintable() for one in others)
    assert heard.last["who"].replace("\N{REPLACEMENT CHARACTER}", "?") == "ab  c?de?f?g h[red]"
    ask(place, {"command": "x", "who": "n" * 10_000})
    assert len(heard.last["who"]) == 500
    with pytest.raises(ControlError) as caught:
        ask(place, {"command": "fail", "why": EVIL})
    assert str(caught.value).isprintable()


def plain_key(heard: Heard) -> str:
    return next(key for key in heard.last if key.startswith("ab"))


@pytest.mark.parametrize(
    ("request_line", "said"),
    [
        (b'{"command": "x", "a": ' + b"[" * 100 + b"]" * 100 + b"}\n", "too deeply"),
        (b'{"command": "x", "a": ' + b"[" * 900 + b"]" * 900 + b"}\n", "too deeply"),
        (b"[" * 100_000 + b"\n", "no JSON"),
        (b'{"command": "x", "who": "\\ud800"}\n', ""),
    ],
)
def test_odd_requests(
    place: Path, crowd: contextlib.ExitStack, request_line: bytes, said: str
) -> None:
    one = client(crowd, place)
    one.sendall(request_line)
    with one.makefile("rb") as stream:
        answer = json.loads(stream.readline())
    assert said in answer.get("error", "")
    assert bool(said) != answer["ok"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"hello\n", "it is no JSON"),
        (b"[" * 100_000 + b"\n", "it is no JSON"),
        (b"[]\n", "no JSON object"),
        (b"{}\n", "lacks 'ok'"),
        (b'{"ok": true}\n', "lacks 'data'"),
        (b'{"ok": false}\n', "lacks 'error'"),
        (b'{"ok": false, "error": "a\\u001b[31mb"}\n', "ab"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, line: bytes, said: str) -> None:
    with answering(tmp_path, line), pytest.raises(ControlError, match=said):
        ask(tmp_path, {"command": "status"})


@contextlib.contextmanager
def answering(directory: Path, line: bytes) -> Iterator[None]:
    """Answer every request at the control socket of a directory with one line."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(line)
        writer.close()

    with running(lambda: asyncio.start_unix_server(talk, directory / "control.sock")):
        wait_until((directory / "control.sock").is_socket)
        yield


@pytest.fixture
def port(heard: Heard) -> Iterator[int]:
    """The port of a web page on loopback."""
    listener = web.listen("127.0.0.1:0")
    with running(lambda: web.run(listener, heard.answer)):
        yield listener.getsockname()[1]


def scrape(port: int) -> float:
    """Ask for the metrics as Prometheus does; return how long the whole answer took."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 5) as one:
        one.sendall(f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        with one.makefile("rb") as stream:
            answer = stream.read()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"rstguard_filtering 1.0" in answer
    return time.monotonic() - began


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /metrics HTTP/1.1\r\nHost: 127",
        b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",  # asks, and does not read
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100,
    ],
    ids=["nothing", "half", "metrics", "many pages"],
)
def test_500_that_are_half_open_do_not_keep_prometheus_out(
    port: int, crowd: contextlib.ExitStack, sent: bytes
) -> None:
    half_open = []
    for number in range(500):
        one = crowd.enter_context(socket.create_connection(("127.0.0.1", port), 5))
        with contextlib.suppress(OSError):
            one.sendall(sent)
        half_open.append(one)
        if number % 25 == 24:
            assert scrape(port) < 1
    assert max(scrape(port) for _ in range(20)) < 1
    assert open_ones(half_open) <= web.MOST_CONNECTIONS


def test_a_storm_of_newcomers_does_not_keep_prometheus_out(port: int) -> None:
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            with contextlib.ExitStack() as some, contextlib.suppress(OSError):
                for _ in range(250):
                    some.enter_context(socket.create_connection(("127.0.0.1", port), 5))

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert max(scrape(port) for _ in range(30)) < 1
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_one_address_s_crowd_goes_first(port: int, crowd: contextlib.ExitStack) -> None:
    patient = crowd.enter_context(socket.create_connection(("127.0.0.1", port), 5))
    local = ("127.0.0.2", 0)
    others = [
        crowd.enter_context(socket.create_connection(("127.0.0.1", port), 5, source_address=local))
        for _ in range(web.MOST_CONNECTIONS + 50)
    ]
    wait_until(lambda: open_ones(others) < web.MOST_CONNECTIONS)
    patient.sendall(f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    assert patient.recv(12) == b"HTTP/1.1 200"
