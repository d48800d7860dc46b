"""The real guard as a process in a network: started, asked, stopped, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rstguard.control.protocol import ask
from rstguard.ipc.requests import ControlError
from rstguard.kernel.command import own_program
from rstguard.lab import LabError
from rstguard.lab.network import Network, stop
from rstguard.lab.usage import children_of
from rstguard.lab.waiting import wait_until

READY_SECONDS = 30.0
"""How long the guard may take until it is at work."""

_STOP_SECONDS, _ORPHAN_SECONDS = 15.0, 10.0
_PLACE = "gateway"


class GuardProcess:
    """``rstguard run`` in the gateway of a network.

    Use as a context manager, or `start` it and `stop` it; the network ends it at the latest.
    Policy, log, state and control socket are files of `runtime`, which is made if it is not there;
    `options` are more words for ``rstguard run``, and `workers` says how many it has, by default
    as many as it finds right for this machine.
    """

    def __init__(
        self,
        network: Network,
        policy: str,
        runtime: Path,
        *options: str,
        workers: int | None = None,
    ) -> None:
        self.network, self.runtime = network, runtime
        runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file, self.log = runtime / "policy.yaml", runtime / "guard.log"
        self.file.write_text(policy, encoding="utf-8")
        count = () if workers is None else ("--workers", str(workers))
        self._options = (*count, *options)
        self._program: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return self._launched.pid

    @property
    def running(self) -> bool:
        """Whether the supervisor lives."""
        return self._program is not None and self._program.poll() is None

    @property
    def workers(self) -> list[int]:
        """The workers' process ids."""
        return [int(worker["pid"]) for worker in self.status()["workers"]]

    @property
    def _launched(self) -> subprocess.Popen[str]:
        assert self._program is not None, "launch it first"
        return self._program

    def start(self, *, whole: bool = False) -> None:
        """Start it and wait until it is at work, be it degraded; `whole`: until it lacks nothing.

        Raises:
            LabError: it ended, or was not at work within `READY_SECONDS`.
        """
        self.launch()
        ready = self.filtering if whole else self.at_work
        try:
            wait_until(lambda: not self.running or ready(), READY_SECONDS)
        except TimeoutError as error:
            told = self.network.log_tail(self.log)
            after = f"after {READY_SECONDS:g} s"
            raise LabError(f"The guard does not filter {after}: {told}") from error
        if not self.running:
            raise LabError(f"The guard did not start: {self.network.log_tail(self.log)}")

    def launch(self) -> None:
        """Start it and do not wait."""
        state = ("--state-dir", str(self.runtime / "state"))
        words = self.words("run", "--policy", str(self.file), *state, *self._options)
        self._program = self.network.start(_PLACE, *words, log=self.log)

    def words(self, *words: str) -> list[str]:
        """Return a command of `rstguard` for this guard; asking it needs no namespace."""
        return own_program("rstguard", *words, "--runtime-dir", str(self.runtime))

    def command(self, *words: str) -> list[str]:
        """Return what runs a command of `rstguard` for this guard inside its namespace."""
        return self.network.command(_PLACE, *self.words(*words))

    def wait(self, seconds: float = 20) -> int:
        """Wait until the supervisor has ended and return its exit status."""
        return self._launched.wait(seconds)

    def stop(self) -> int:
        """End it in order and return its exit status."""
        self._launched.terminate()
        return self.wait()

    def kill9(self) -> None:
        """Kill the supervisor; its children are to notice by themselves."""
        self._launched.kill()
        self._launched.wait()

    def end(self) -> None:
        """Leave no process behind, whatever state it is in.

        Raises:
            LabError: workers or sweeper lived on without it, and were killed.
        """
        if self._program is None:
            return
        children = self.children()
        stop(self._program, patience=_STOP_SECONDS)
        _signal(children, signal.SIGCONT)
        try:
            wait_until(lambda: not any(map(alive, children)), _ORPHAN_SECONDS)
        except TimeoutError as error:
            _signal([child for child in children if alive(child)], signal.SIGKILL)
            raise LabError(
                "Processes of the guard lived on without it, and were killed."
            ) from error

    def children(self) -> list[int]:
        """Return the process ids of workers and sweeper."""
        if not self.running:
            return []
        return children_of(self.pid)

    def ask(self, command: str, **request: Any) -> Any:
        """Send a request to the control socket and return its data.

        Raises:
            ControlError: nobody listens there, or the guard refused.
        """
        return ask(self.runtime, {"command": command, **request})

    def status(self) -> Any:
        """Return what ``rstguard status --json`` prints."""
        return self.ask("status")

    def at_work(self) -> bool:
        """Whether it filters, be it degraded."""
        try:
            return bool(self.status()["state"] != "not filtering")
        except ControlError:
            return False

    def filtering(self) -> bool:
        """Whether it filters, and lacks nothing."""
        try:
            return bool(self.status()["filtering"])
        except ControlError:
            return False


def leftovers(network: Network) -> list[str]:
    """Return what of a guard is in the gateway's kernel: rules, chains and sets."""
    saved = [
        line
        for command in ("iptables-save", "ip6tables-save")
        for line in network.run(_PLACE, command).splitlines()
        if "rstguard" in line.lower() or "NFQUEUE" in line
    ]
    sets = network.run(_PLACE, "ipset", "list", "-n").split()
    return saved + [f"set {name}" for name in sets if name.startswith("rstguard")]


def alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
