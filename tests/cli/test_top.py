"""`rstguard top` in a real terminal of 80 x 24, and the manual page."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rstguard.cli import app
from rstguard.cli.picture import Style, frame
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts

POLICY = "version: 1\nname: watched\nprotect: {interfaces: [out]}\nrules: []\n"


def status(**more: Any) -> dict[str, Any]:
    event = {
        "time": 1_800_000_000.0, "kind": "ban", "subject": "198.51.100.7", "rule": "syn-rate",
        "why": "the source sent SYNs faster than the rule allows", "detail": "", "enforced": True,
    }  # fmt: skip
    return {
        "state": "filtering", "filtering": True, "panic": False, "uptime_s": 93785.0,
        "productive": 1, "problems": [], "nearest": [near("198.51.100.7", 100.0)],
        "policy": {"name": "p", "mode": "enforce", "confirm_s": None},
        "blocked": {"ban": 1, "shun": 0}, "counts": {"packets": 5, "ban": {"syn-rate": 1}},
        "workers": [worker(number) for number in range(16)], "syn_budget": None,
        "pressure": [], "large_sources": [], "recent": [event] * 50,
    } | more  # fmt: skip


def worker(queue: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": 100 + queue, "queue": queue, "packets": 5, "waiting": 0, "overrun": 0, "restarts": 0,
        "overload": 0, "shed": "", "ready": True,
    } | more  # fmt: skip


def near(source: str, percent: float, rule: str = "syn-rate") -> dict[str, Any]:
    return {"source": source, "rule": rule, "used_percent": percent}


def budget(sent: int, accepted: int, *engaged: float | None) -> dict[str, Any]:
    return {
        "limit": "20000/s, 128 half-open",
        "half_open": 128,
        "cookies": {"sent": sent, "accepted": accepted},
        "services": [
            {"service": f"203.0.113.10:{port}", "engaged_s": seconds, "half_open": None}
            for port, seconds in enumerate(engaged, 80)
        ],
    }


def shown(
    now: dict[str, Any], before: dict[str, Any] | None = None, size: tuple[int, int] = (80, 24)
) -> list[str]:
    """Return the lines of a picture, two seconds after `before`; those that stand out with a !."""
    lines = frame(now, before, 2.0, size)
    assert len(lines) <= size[1]
    assert all(len(line.text) <= size[0] for line in lines)
    return ["!" * (line.style is Style.BAD) + line.text for line in lines]


def test_a_picture_fits_and_tells_rates() -> None:
    later = status(counts={"packets": 2005, "ban": {"syn-rate": 1, "x": 4}, "reset": {"y": 2}})
    lines = shown(later, status())
    assert len(lines) == 24
    assert lines[0] == "rstguard: filtering, policy p (enforce), up 1 d 2 h"
    assert "packets 1,000/s   dropped 0/s   resets 1/s   bans 2/s" in lines[3]
    assert "packets -   dropped -" in shown(later)[3]
    assert "packets 0/s" in shown(status(), later)[3]  # the guard was started anew


@pytest.mark.parametrize("size", [(20, 5), (40, 10), (1, 1), (200, 60), (80, 0)])
def test_any_size_is_filled_and_not_exceeded(size: tuple[int, int]) -> None:
    wide = [near("2001:db8:1:2::/64", 90.0 - number, "r" * 48) for number in range(40)]
    lines = shown(status(nearest=wide, syn_budget=budget(5, 3, None, 2.0, 3.0, 4.0)), size=size)
    assert len(lines) == min(size[1], 60)


def test_the_nearest_have_room_beside_what_happened() -> None:
    rows = [near("2001:db8:1:2::/64", 100.0), near("198.51.100.7", 45.4, "r" * 48)]
    lines = shown(status(nearest=rows))
    assert "! 100%  2001:db8:1:2::/64  syn-rate" in lines
    assert f"  45%  198.51.100.7       {'r' * 48}" in lines
    assert sum("ban 198.51.100.7 by rule" in line for line in lines) >= 3
    lines = shown(status(nearest=[near(f"198.51.100.{number}", 50.0) for number in range(99)]))
    assert sum("50%" in line for line in lines) >= 3
    assert sum("ban 198.51.100.7 by rule" in line for line in lines) >= 3
    assert "   nobody has used any of them now" in shown(status(nearest=[]))
    assert "   nothing has happened yet" in shown(status(recent=[]))


def test_workers_that_are_hard_pressed_come_first() -> None:
    workers = [worker(number) for number in range(12)]
    workers[7] = worker(7, waiting=900, overload=1, shed="newcomers wait", packets=205)
    workers[9] = worker(9, waiting=None, overrun=None, ready=False)
    lines = shown(status(workers=workers), status())
    first = lines.index(
        "!worker 107: 100/s, 900 waiting, 0 lost, 0 restarts, OVERLOAD: newcomers wait"
    )
    assert lines[first + 3] == "and 9 workers that are less pressed"
    few = [worker(0), worker(1, waiting=None, overrun=None, ready=False)]
    gone = "!worker 101: -, ? waiting, ? lost, 0 restarts, NOT READY"
    assert gone in shown(status(workers=few))


def test_the_syn_budget() -> None:
    now = status(syn_budget=budget(2005, 25, None, 65.0, 2.0, 3.0))
    lines = shown(now, status(syn_budget=budget(5, 5, None)))
    at = lines.index("SYN budget 20000/s, 128 half-open a service: 1,000/s cookies, 10/s came back")
    assert lines[at + 1 : at + 4] == [
        "  203.0.113.10:81: SYN cookies for 1 min 5 s",
        "  203.0.113.10:82: SYN cookies for 2 s",
        "  and 1 more over it",
    ]
    calm = shown(status(syn_budget=budget(5, 5, None)))
    assert "  services known: 1, none over it" in calm


def test_open_handshakes() -> None:
    one = budget(5, 5, 65.0, None, None)
    for row, count in zip(one["services"], (128, 7, 9), strict=True):
        row["half_open"] = {"open": count, "beside": 0, "most": 128, "shared": False}
    over = "  203.0.113.10:80: SYN cookies for 1 min 5 s, 128 of 128 handshakes open"
    assert over in shown(status(syn_budget=one))
    del one["services"][0]
    most = "  services known: 2, none over it; 203.0.113.10:82, 9 of 128 handshakes open"
    assert most in shown(status(syn_budget=one))


def test_services_in_distress_stand_out() -> None:
    def pressed(number: int, connections: int) -> dict[str, Any]:
        service = f"203.0.113.10:{number}"
        return {"service": service, "pressed_s": 65.0, "connections": connections, "end": 1000}

    lines = shown(status(pressure=[pressed(1, 600), pressed(2, 900), pressed(3, 700)]))
    first = lines.index(
        "!PRESSED 203.0.113.10:2 for 1 min 5 s: 900 connections, no patience from 1,000 on"
    )
    assert lines[first + 1].startswith("!PRESSED 203.0.113.10:3")
    assert lines[first + 2] == "!and 1 more services that are pressed"


def test_what_is_wrong_stands_out() -> None:
    off = {"state": "not filtering", "filtering": False}
    assert shown(status(**off))[0].startswith("!rstguard: NOT FILTERING, policy p")
    lacks = shown(status(**off, problems=["a", "b", "c", "d"]))
    assert lacks[1:4] == ["!a", "!b", "!and 2 more"]
    degraded = {"state": "degraded", "filtering": False}
    panic = shown(status(**degraded, panic=True, problems=["panic: all traffic passes"]))
    assert panic[0].startswith("!rstguard: PANIC: all traffic passes")
    assert panic[1].startswith("1 banned")
    policy = {"name": "p", "mode": "enforce", "confirm_s": 9.0}
    waits = shown(status(**degraded, policy=policy, problems=["RUNAWAY: it ran"]))
    assert waits[0].startswith("!rstguard: DEGRADED, policy p")
    assert waits[1].startswith("!NOT CONFIRMED: rolls back in 9 s")
    assert waits[2] == "!RUNAWAY: it ran"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with (
        ThreeHosts("rgo") as lab,
        Guard(lab, POLICY, tmp_path_factory.mktemp("g"), workers=1) as guard,
    ):
        yield guard


def command(guard: Guard, *words: str) -> list[str]:
    at = ["--runtime-dir", str(guard.runtime)]
    return [sys.executable, "-m", "rstguard", "top", *words, *at]


class Terminal:
    """A terminal of 80 x 24 with `rstguard top` in it, and what was written to it."""

    def __init__(self, guard: Guard, interval: str = "0.2", **environment: str) -> None:
        self.master, self.end = pty.openpty()
        self.resize(80, 24)
        self.modes = termios.tcgetattr(self.end)
        self.seen = b""
        self.process = subprocess.Popen(
            command(guard, "--interval", interval),
            stdin=self.end, stdout=self.end, stderr=self.end,
            env={**os.environ, "TERM": "xterm", **environment},
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.end)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read_until(self, wanted: bytes) -> None:
        """Read on until something is written that was not yet when this was called."""
        begin, end = len(self.seen), time.monotonic() + 20
        while wanted not in self.seen[begin:]:
            left = max(0, end - time.monotonic())
            assert select.select([self.master], [], [], left)[0], self.seen
            self.seen += os.read(self.master, 65536)

    def ended(self) -> int:
        """Wait for the end, and see that the terminal was given back."""
        self.read_until(b"\x1b[?25h\x1b[?1049l")
        status = self.process.wait(10)
        assert termios.tcgetattr(self.end) == self.modes
        return status


@pytest.mark.netns
def test_in_a_terminal_it_lives_and_q_leaves(guard: Guard) -> None:
    with Terminal(guard) as terminal:
        terminal.read_until(b"policy watched (enforce)")
        guard.cli("ban", "add", "198.51.100.7")
        terminal.read_until(b"ban 198.51.100.7 by rule manual")
        os.write(terminal.master, b"q")
        assert terminal.ended() == 0
    assert b"\x1b[1;32mrstguard: filtering" in terminal.seen
    for picture in terminal.seen.split(b"\x1b[H")[1:]:
        lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", picture).decode().split("\r\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80


@pytest.mark.netns
def test_a_new_size_is_seen_at_once_and_colours_may_be_unwanted(guard: Guard) -> None:
    with Terminal(guard, interval="60", NO_COLOR="1") as terminal:
        terminal.read_until(b"\x1b[2Krstguard: filtering, policy watched (enforce), up ")
        terminal.resize(30, 5)
        terminal.process.send_signal(signal.SIGWINCH)
        terminal.read_until("\x1b[H\x1b[2Krstguard: filtering, policy w…\r\n".encode())
        os.write(terminal.master, b"q")
        assert terminal.ended() == 0
    assert re.search(rb"\x1b\[[0-9;]*m", terminal.seen) is None


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(guard: Guard, number: signal.Signals) -> None:
    with Terminal(guard) as terminal:
        terminal.read_until(b"policy watched (enforce)")
        terminal.process.send_signal(number)
        assert terminal.ended() == (0 if number == signal.SIGINT else 128 + number)


@pytest.mark.netns
def test_put_aside_it_gives_the_terminal_back_and_takes_it_again(guard: Guard) -> None:
    with Terminal(guard) as terminal:
        terminal.read_until(b"policy watched (enforce)")
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.read_until(b"\x1b[?1049l")
        stat = Path(f"/proc/{terminal.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        assert termios.tcgetattr(terminal.end) == terminal.modes
        terminal.process.send_signal(signal.SIGCONT)
        terminal.read_until(b"policy watched (enforce)")
        os.write(terminal.master, b"q")
        assert terminal.ended() == 0


@pytest.mark.netns
def test_a_guard_that_goes_is_waited_for(tmp_path: Path) -> None:
    with (
        ThreeHosts("rgo") as lab,
        Guard(lab, POLICY, tmp_path, workers=1) as guard,
        Terminal(guard) as terminal,
    ):
        terminal.read_until(b"policy watched (enforce)")
        guard.stop()
        terminal.read_until(b"\x1b[1;31mNO ANSWER for ")
        guard.start()
        terminal.read_until(b"\x1b[H\x1b[2K\x1b[1;32mrstguard: filtering")
        os.write(terminal.master, b"q")
        assert terminal.ended() == 0


@pytest.mark.netns
def test_in_a_pipe_there_is_one_picture(guard: Guard) -> None:
    done = subprocess.run(command(guard), capture_output=True, text=True, check=True)
    assert "policy watched (enforce)" in done.stdout
    assert "packets 0/s" in done.stdout
    assert "\x1b" not in done.stdout
    data = json.loads(
        subprocess.run(
            command(guard, "--once", "--json"), capture_output=True, text=True, check=True
        ).stdout
    )
    assert data["nearest"] == []
    assert data["policy"]["name"] == "watched"


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
