"""`rstguard top` in a real terminal of 80 x 24, and the manual page."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rstguard.cli import app
from rstguard.cli.top import frame
from tests.guard import Guard
from tests.netns import Lab

POLICY = "version: 1\nname: watched\nprotect: {interfaces: [out]}\nrules: []\n"


def status(**more: Any) -> dict[str, Any]:
    event = {
        "time": 1_800_000_000.0, "kind": "ban", "subject": "198.51.100.7", "rule": "syn-rate",
        "why": "the source sent SYNs faster than the rule allows", "detail": "", "enforced": True,
    }  # fmt: skip
    worker = {
        "pid": 1, "packets": 5, "waiting": 0, "overrun": 0, "restarts": 0, "overload": 0,
        "left_undone": "",
    }  # fmt: skip
    return {
        "filtering": True, "panic": False, "uptime_s": 5.0, "productive": 1,
        "policy": {"name": "p", "mode": "enforce"}, "blocked": {"ban": 1, "shun": 0},
        "counts": {"packets": 5, "ban": {"syn-rate": 1}}, "workers": [worker] * 16,
        "syn_budget": None, "recent": [event] * 50,
    } | more  # fmt: skip


def test_a_picture_fits_and_tells_rates() -> None:
    later = status(counts={"packets": 2005, "ban": {"syn-rate": 1, "x": 4}, "reset": {"y": 2}})
    lines = frame(later, status(), 2.0, 80, 24)
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert "packets 1,000/s   dropped 0/s   resets 1/s   bans 2/s" in lines[3]
    assert any("crossed rules lately: 198.51.100.7 (50)" in line for line in lines)
    assert len(frame(later, later, 1.0, 20, 5)) == 5


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with Lab("rgo") as lab, Guard(lab, POLICY, tmp_path_factory.mktemp("g"), workers=1) as guard:
        yield guard


def command(guard: Guard, *words: str) -> list[str]:
    at = ["--runtime-dir", str(guard.runtime)]
    return [sys.executable, "-m", "rstguard", "top", *words, *at]


def read_until(terminal: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        assert select.select([terminal], [], [], 20)[0], seen
        seen += os.read(terminal, 65536)
    return seen


@pytest.mark.netns
def test_in_a_terminal_it_lives_and_q_leaves(guard: Guard) -> None:
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    modes = termios.tcgetattr(end)
    with subprocess.Popen(command(guard, "--interval", "0.2"), stdin=end, stdout=end) as process:
        seen = read_until(terminal, b"policy watched (enforce)")
        guard.cli("ban", "add", "198.51.100.7")
        seen += read_until(terminal, b"ban 198.51.100.7 by rule manual")
        os.write(terminal, b"q")
        seen += read_until(terminal, b"\x1b[?1049l")
        assert process.wait(10) == 0
    assert termios.tcgetattr(end) == modes
    for picture in seen.split(b"\x1b[H")[1:]:
        lines = picture.replace(b"\x1b[K", b"").replace(b"\x1b[J", b"").split(b"\r\n")
        assert len(lines) <= 24
        assert max(len(line.split(b"\x1b")[0].decode()) for line in lines) <= 80
    os.close(terminal)
    os.close(end)


@pytest.mark.netns
def test_in_a_pipe_there_is_one_picture(guard: Guard) -> None:
    done = subprocess.run(command(guard), capture_output=True, text=True, check=True)
    assert "policy watched (enforce)" in done.stdout
    assert "\x1b" not in done.stdout


def manual() -> str:
    done = CliRunner().invoke(app, ["man"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_manual_has_every_command() -> None:
    page = manual()
    for words in ("rstguard policy apply", "rstguard ban import", "rstguard lab run"):
        assert f'.SS "{words}' in page
    assert r"\-\-confirm" in page
    assert "EXIT STATUS" in page


@pytest.mark.skipif(shutil.which("man") is None, reason="there is no man here")
def test_the_manual_is_read_without_warnings(tmp_path: Path) -> None:
    path = tmp_path / "rstguard.1"
    path.write_text(manual())
    done = subprocess.run(
        ["man", "--warnings", "-l", str(path)],
        capture_output=True, text=True, check=False, env={**os.environ, "MANWIDTH": "80"},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_completion_knows_the_commands() -> None:
    environment = {
        **os.environ, "_RSTGUARD_COMPLETE": "complete_bash", "COMP_WORDS": "rstguard po",
        "COMP_CWORD": "1",
    }  # fmt: skip
    program = Path(sys.executable).with_name("rstguard")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["policy"]
