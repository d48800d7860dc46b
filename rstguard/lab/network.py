"""Networks of namespaces: hosts joined by veth links, and the programs that run in them.

All that needs a network is built on this: the lab, the tests, the benchmarks.  Each says which
hosts and links it has; making, entering and removing them is here.  Interfaces are made inside the
namespaces, so nothing of this machine's own network is touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from rstguard.lab import LabError
from rstguard.lab.namespace import NAMED, inside

_TIED = ("setpriv", "--pdeathsig", "TERM")
_STOP_SECONDS = 10.0
_RUN_SECONDS = 60.0

End = tuple[str, str]
"""One end of a link: a host and the name of its device there."""


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace: what its devices are called is told by the links that it has.

    `addresses` are those of each device, with their prefix lengths; `routers` are the next hops
    of its default routes; `settings` are sysctls, as paths below ``/proc/sys``.  The devices of a
    host with `bridge` are the ports of one bridge.
    """

    addresses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    bridge: bool = False


class Network:
    """The namespaces, a temporary directory, and every program started in them.

    Use as a context manager: leaving it ends the programs (each by its id) and removes all,
    whatever happened meanwhile.  The namespaces are called `stem`-host.

    Raises:
        LabError: the kernel or ``ip`` refused something.
    """

    def __init__(
        self, stem: str, hosts: Mapping[str, Host], links: Iterable[tuple[End, End]] = ()
    ) -> None:
        self.names = {place: f"{stem}-{place}" for place in hosts}
        """The full name of each host's namespace."""
        self._stem, self._hosts, self._links = stem, hosts, tuple(links)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            self.build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def directory(self) -> Path:
        """A directory for the programs' files, removed with the network; it is for root only."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(
                prefix=f"{self._stem}-", ignore_cleanup_errors=True
            )
        return Path(self._scratch.name)

    def build(self) -> None:
        """Make all there is; a network that has more than hosts and links adds to it here."""
        for place, name in self.names.items():
            _run(["ip", "netns", "add", name])
            # Nobody else can have these addresses: looking for duplicates only takes seconds.
            self.set(place, {f"net/ipv6/conf/{w}/accept_dad": "0" for w in ("default", "all")})
        for one, other in self._links:
            self.join(one, other)
        for place, host in self._hosts.items():
            self.ip(place, *self._lines(place, host))
            self.set(place, host.settings)

    def join(self, one: End, other: End) -> None:
        """Make a link between two hosts; its ends are down and have no addresses yet."""
        (place, device), (far, far_device) = one, other
        peer = f"peer name {far_device} netns {self.names[far]}"
        self.ip(place, f"link add {device} type veth {peer}")

    def ip(self, place: str, *lines: str) -> None:
        """Do some commands of ``ip`` in a host, as ``ip -batch`` reads them.

        Raises:
            LabError: one failed, and those after it were not done.
        """
        _run(["ip", "-n", self.names[place], "-batch", "-"], stdin="".join(f"{x}\n" for x in lines))

    def set(self, place: str, settings: Mapping[str, str]) -> None:
        """Write sysctls of a host.

        Raises:
            OSError: there is no such sysctl, or it does not take that value.
        """
        with self.inside(place):
            for name, value in settings.items():
                Path("/proc/sys", name).write_text(value)

    def inside(self, place: str) -> AbstractContextManager[None]:
        """Move the calling thread into a host for a while (`rstguard.lab.namespace.inside`)."""
        return inside(self.names[place])

    def command(self, place: str, *words: str) -> list[str]:
        """Return what runs a command in a host."""
        return ["ip", "netns", "exec", self.names[place], *words]

    def run(self, place: str, *command: str, stdin: str = "", seconds: float = _RUN_SECONDS) -> str:
        """Run a command to its end in a host and return its standard output.

        Raises:
            LabError: the command failed, or did not end in time.
        """
        return _run(self.command(place, *command), stdin=stdin, seconds=seconds)

    def start(
        self, place: str, *command: str, piped: bool = False, log: str | Path = ""
    ) -> subprocess.Popen[str]:
        """Start a program in a host; it is ended with the network at the latest.

        Its standard error, and its output too unless input and output are `piped`, are added to
        the file `log`, of the network's directory if the path is relative; without one its
        complaints are this process's own.  The program gets SIGTERM from the kernel if the thread
        that started it is killed, and is in a session of its own, so that Ctrl-C reaches only this
        process, which then ends things in order.
        """
        errors = (self.directory / log).open("a", encoding="utf-8") if log else None
        try:
            program = subprocess.Popen(
                [*_TIED, *self.command(place, *command)],
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else errors or subprocess.DEVNULL,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        finally:
            if errors:
                errors.close()
        self._started.append(program)
        return program

    def log_tail(self, log: str | Path, *, lines: int = 3) -> str:
        """Return the last lines that a program wrote to its log, on one line."""
        text = (self.directory / log).read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(said[-lines:])

    def remove(self) -> None:
        """End what was started, and remove all; what is not there is no error."""
        for program in reversed(self._started):
            stop(program)
        for name in self.names.values():
            remove_namespace(name)
        if self._scratch:
            self._scratch.cleanup()

    def _lines(self, place: str, host: Host) -> list[str]:
        devices = [device for link in self._links for where, device in link if where == place]
        lines = ["link set lo up"]
        if host.bridge:
            lines += ["link add br0 type bridge", "link set br0 up"]
            lines += [f"link set {device} master br0" for device in devices]
        for device, addresses in host.addresses.items():
            for address in addresses:
                nodad = " nodad" if ":" in address else ""
                lines.append(f"address add {address} dev {device}{nodad}")
        lines += [f"link set {device} up" for device in devices]
        return lines + [f"route add default via {router}" for router in host.routers]


def remove_namespace(name: str) -> None:
    """Remove a namespace, if it is there, and kill what still runs in it."""
    if not (NAMED / name).exists():
        return
    left = subprocess.run(
        ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
    )
    for pid in {int(word) for word in left.stdout.split()} - {os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def stop(program: subprocess.Popen[str], *, patience: float = _STOP_SECONDS) -> None:
    """End a program with SIGTERM, after `patience` seconds with SIGKILL, and collect it."""
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(patience)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
    for pipe in (program.stdin, program.stdout):
        _close(pipe)


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with suppress(BrokenPipeError):
            pipe.close()


def _run(command: list[str], *, stdin: str = "", seconds: float = _RUN_SECONDS) -> str:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, timeout=seconds
        )
    except FileNotFoundError as error:
        raise LabError(f"{command[0]} is missing: apt-get install iproute2.") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"'{' '.join(command)}' did not end within {seconds:g} s.") from error
    if done.returncode != 0:
        raise LabError(f"'{' '.join(command)}' failed: {done.stderr.strip() or 'no reason given'}")
    return done.stdout
