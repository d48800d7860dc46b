"""A terminal that is taken over for a while, and given back as it was, whatever happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from rstguard.cli.picture import Line, Style

_TAKE, _GIVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _LINE, _TO_THE_END = "\x1b[H", "\x1b[2K", "\x1b[J"
_STYLES = {Style.TITLE: "\x1b[1m", Style.GOOD: "\x1b[1;32m", Style.BAD: "\x1b[1;31m"}
_PLAIN = "\x1b[0m"
_QUIT = (b"q", b"Q", b"\x03", b"\x04", b"")


def is_terminal() -> bool:
    """Tell whether somebody sits at both ends: a picture can be shown, and a key be read."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Screen:
    """The whole of a terminal; made by `taken`."""

    def __init__(self, bell: socket.socket) -> None:
        self._bell = bell
        """Becomes readable with each signal: a new size, or back from the background."""
        # https://no-color.org; a terminal that says it is dumb has none either.
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        self._styles = {} if plain else _STYLES

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        columns, lines = os.get_terminal_size(sys.stdout.fileno())
        return columns or 80, lines or 24

    def show(self, lines: Iterable[Line]) -> None:
        """Draw a picture of lines that fit."""
        drawn = [self._drawn(one) for one in lines]
        rest = f"\n{_TO_THE_END}" if len(drawn) < self.size[1] else ""
        sys.stdout.write(_HOME + "\n".join(drawn) + rest)
        sys.stdout.flush()

    def _drawn(self, line: Line) -> str:
        # Cleared before it is written: after the last column that would take the last letter.
        style = self._styles.get(line.style)
        return f"{_LINE}{style}{line.text}{_PLAIN}" if style else _LINE + line.text

    def wait(self, seconds: float, resized: Callable[[], None]) -> bool:
        """Wait; call `resized` whenever the size is new; True if the user wants to leave."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([sys.stdin, self._bell], [], [], left)
            if self._bell in ready:
                self._bell.recv(4096)
                resized()
            if sys.stdin in ready and os.read(sys.stdin.fileno(), 1) in _QUIT:
                return True
        return False


@contextmanager
def taken() -> Iterator[Screen]:
    """Take the terminal over; signals that end or stop the program give it back first."""
    modes = termios.tcgetattr(sys.stdin)

    def take() -> None:
        tty.setcbreak(sys.stdin)
        sys.stdout.write(_TAKE)
        sys.stdout.flush()

    def give() -> None:
        with contextlib.suppress(OSError):  # it may be the terminal that has gone
            sys.stdout.write(_GIVE)
            sys.stdout.flush()
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def stop(number: int, _frame: FrameType | None) -> None:
        give()
        os.kill(os.getpid(), signal.SIGSTOP)  # here the shell has the terminal
        take()

    bell, rung = socket.socketpair()
    handling = {
        signal.SIGTERM: leave, signal.SIGHUP: leave, signal.SIGTSTP: stop,
        signal.SIGWINCH: lambda *_: None,
    }  # fmt: skip
    before = {number: signal.signal(number, what) for number, what in handling.items()}
    rung.setblocking(False)
    signal.set_wakeup_fd(rung.fileno(), warn_on_full_buffer=False)
    try:
        take()
        yield Screen(bell)
    except KeyboardInterrupt:
        pass
    finally:
        signal.set_wakeup_fd(-1)
        for number, what in before.items():
            signal.signal(number, what)
        give()
        bell.close()
        rung.close()
