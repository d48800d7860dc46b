"""Commands that are answered by something else than they expect, or with text of strangers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from rstguard.cli import app

EVIL = "a\x1b]52;c;ZXZpbA==\x07b\r\nc\x07d\x9b31me\u202ef\x00g\x85h\x1b[31m[red]i[/red]"
PLAIN = "ab  c?de?f?g h[red]i[/red]".replace("?", "\N{REPLACEMENT CHARACTER}")
POLICY = "version: 1\nname: p\nprotect: {interfaces: [eth0]}\nrules: []\n"
COMMANDS = [
    ["status"],
    ["status", "--json"],
    ["top", "--once", "--interval", "0.2"],
    ["events"],
    ["kill", "--port", "80"],
    ["ban", "list"],
    ["ban", "add", "198.51.100.7"],
    ["ban", "remove", "198.51.100.7"],
    ["ban", "import", "LIST"],
    ["policy", "apply", "POLICY"],
    ["policy", "confirm"],
    ["policy", "rollback"],
    ["policy", "history"],
    ["policy", "history", "7"],
    ["policy", "show"],
    ["policy", "show", "--compiled"],
    ["policy", "diff", "POLICY"],
    ["policy", "explain", "198.51.100.7"],
    ["policy", "learn", "--live", "--start", "--for", "1h"],
    ["policy", "learn", "--live", "--stop"],
    ["policy", "learn", "--live", "--out", "OUT"],
]


@contextlib.contextmanager
def guard_that_says(directory: Path, answer: Callable[[dict[str, Any]], bytes]) -> Iterator[None]:
    """Answer all requests at the control socket of a directory."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "control.sock"))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    talking, _ = listener.accept()
                    with talking, talking.makefile("rb") as stream:
                        talking.sendall(answer(json.loads(stream.readline())))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def words_of(words: list[str], directory: Path) -> list[str]:
    (directory / "policy.yaml").write_text(POLICY)
    (directory / "list").write_text("198.51.100.7\n")
    places = {"POLICY": "policy.yaml", "LIST": "list", "OUT": "out.yaml"}
    real = [str(directory / places[word]) if word in places else word for word in words]
    return [*real, "--runtime-dir", str(directory)]


def asked(words: list[str], directory: Path, data: Any) -> Result:
    line = json.dumps({"ok": True, "data": data}).encode() + b"\n"
    with guard_that_says(directory, lambda _: line):
        return CliRunner().invoke(app, words_of(words, directory))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "data",
    [None, 5, "x", [], [5], [{}], {}, {"policy": 5}, {"filtering": True}, [[]]],
    ids=json.dumps,
)
def test_answers_of_odd_shape(tmp_path: Path, words: list[str], data: Any) -> None:
    done = asked(words, tmp_path, data)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    if done.exit_code:
        assert done.exit_code == 1
        assert len(done.stderr.splitlines()) <= 3


def test_what_is_lacking_is_named(tmp_path: Path) -> None:
    done = asked(["status"], tmp_path, {"policy": {}})
    assert done.exit_code == 1
    assert done.stderr.startswith("rstguard: the guard's answer cannot be understood: it lacks '")
    assert done.stderr.count("\n") == 1


def test_an_answer_that_is_no_json(tmp_path: Path) -> None:
    with guard_that_says(tmp_path, lambda _: b"\xff\n"):
        done = CliRunner().invoke(app, ["status", "--runtime-dir", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "it is no JSON" in done.stderr


EVENT = {
    "number": 1, "time": 1_800_000_000.0, "kind": "policy", "subject": EVIL, "rule": EVIL,
    "reason": None, "why": EVIL, "detail": EVIL, "enforced": True,
}  # fmt: skip
STATUS = {
    "state": "filtering", "filtering": True, "panic": False, "uptime_s": 1.0, "productive": 0,
    "problems": [EVIL], "nearest": [], "learning": None,
    "policy": {"name": EVIL, "mode": "enforce", "confirm_s": None}, "workers": [],
    "sweeper": {"pid": 1, "restarts": 0}, "asker": {"pid": 2, "restarts": 0},
    "blocked": {"ban": 0, "shun": 0}, "counts": {},
    "shun": {"answer": "drop", "services": [], "why_not": EVIL, "why_no_dnat": EVIL, "cookies": {}},
    "untracked": {"low_ttl": 0, "spoofed": 0, "spoofed_passed": 0},
    "foreign_marks": {"problems": [], "cleared": 0, "spared": 0}, "syn_budget": None,
    "pressure": [],
    "large_sources": [
        {"source": "203.0.113.9", "percent": 61, "connections": 1234, "bore": 1000,
         "may_hold": 2000, "since_s": 1500, "quiet_s": 5},
        {"source": "203.0.113.8", "percent": 26, "connections": 500, "bore": 0,
         "may_hold": 0, "since_s": 700, "quiet_s": 3700},
    ],
    "forgotten": {"adopted": 0, "dropped": 0},
    "limited": {"out_of_state": 0, "bad_flags": 0, "reset_rate": 0},
    "recent": [EVENT],
}  # fmt: skip
ENTRY = {
    "number": 7, "time": 1.0, "who": EVIL, "action": "apply", "name": EVIL, "file": EVIL,
    "text": EVIL, "state": "kept", "in_force": True,
}  # fmt: skip
BANNED = {"source": EVIL, "kind": "ban", "answer": "drop", "rule": EVIL, "remaining_s": 5}
STANDS = {
    "source": EVIL, "state": EVIL, "connections": 0, "productive_percent": None,
    "rules": [{"name": EVIL, "used_percent": 1.0, "says": EVIL}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["status"], STATUS),
        (["events"], [EVENT]),
        (["ban", "list"], [BANNED]),
        (["ban", "remove", "198.51.100.7"], {"removed": True, "source": EVIL}),
        (["ban", "remove", "198.51.100.7"], {"removed": False, "source": EVIL}),
        (["policy", "history"], [ENTRY]),
        (["policy", "explain", "198.51.100.7"], STANDS),
        (
            ["kill", "--port", "80"],
            {"killed": 1, "confirmed": 1, "unconfirmed": [{"why": EVIL}]},
        ),
    ],
)
def test_text_of_strangers(tmp_path: Path, words: list[str], data: Any) -> None:
    done = asked(words, tmp_path, data)
    assert PLAIN in done.output
    assert all(line.isprintable() for line in done.output.split("\n"))
    (tmp_path / "control.sock").unlink()
    as_json = asked([*words, "--json"], tmp_path, data)
    assert all(line.isprintable() for line in as_json.output.split("\n"))


@pytest.mark.parametrize("data", [STATUS | {"nearest": [BANNED | {"used_percent": 1.0}]}])
def test_top_shows_strangers_text_as_text(tmp_path: Path, data: dict[str, Any]) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        told = data if request["command"] == "status" else data["nearest"]
        return json.dumps({"ok": True, "data": told}).encode() + b"\n"

    with guard_that_says(tmp_path, answer):
        words = ["top", "--once", "--interval", "0.2", "--runtime-dir", str(tmp_path)]
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert PLAIN in done.output
    assert all(line.isprintable() for line in done.output.split("\n"))


def test_a_policy_s_text_is_kept_to_the_letter_but_not_shown_so(tmp_path: Path) -> None:
    text = f"# {EVIL}\r\nversion: 1\n"
    line = json.dumps({"ok": True, "data": {"text": text, "file": "p", "iptables": None}})
    command = [sys.executable, "-m", "rstguard", "policy", "show", "--runtime-dir", str(tmp_path)]
    with guard_that_says(tmp_path, lambda _: line.encode() + b"\n"):
        piped = subprocess.run(command, capture_output=True, check=True)
        ours, theirs = pty.openpty()
        shown = b""
        with subprocess.Popen(command, stdout=theirs) as showing:
            os.close(theirs)
            with contextlib.suppress(OSError):  # how a terminal says that its user has gone
                while data := os.read(ours, 4096):
                    shown += data
            showing.wait(10)
        os.close(ours)
    assert piped.stdout == text.encode()
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    assert lines[0] == f"# {PLAIN[:3]}"
    assert all(one.isprintable() for one in lines)
