"""The real daemon in the gateway's namespace: started, asked, stopped, and checked afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rstguard.lab import LabError
from rstguard.lab.report import Guard
from rstguard.lab.topology import Lab, stop

READY_SECONDS = 30.0
"""How long the guard may take until it filters."""

_LOG = "guard.log"


class GuardProcess:
    """A running ``rstguard run``.

    Raises:
        LabError: it ended or did not filter within `READY_SECONDS`.
    """

    def __init__(self, lab: Lab, policy: str) -> None:
        self._lab = lab
        self._runtime = lab.directory / "runtime"
        self._runtime.mkdir(mode=0o700)
        file = lab.directory / "policy.yaml"
        file.write_text(policy, encoding="utf-8")
        state = ("--state-dir", str(lab.directory / "state"))
        words = self._command("run", "--policy", str(file), *state)
        self._process = lab.start("gateway", words, log=_LOG)
        self._await_filtering()
        self._cpu_before = self.cpu_seconds()
        self._since = time.monotonic()

    def mark_attack_begin(self) -> None:
        """Count processor time from now on."""
        self._cpu_before = self.cpu_seconds()
        self._since = time.monotonic()

    def cpu_percent(self) -> float:
        """Return the processor time used since the attack began, in percent of one core."""
        used = self.cpu_seconds() - self._cpu_before
        return round(100 * used / max(time.monotonic() - self._since, 0.001), 1)

    def finish(self, cpu_percent: float) -> Guard:
        """Ask what it did, stop it, and look for what it left in the kernel.

        Raises:
            LabError: it no longer runs, or does not answer.
        """
        if self._process.poll() is not None:
            raise LabError(f"The guard ended during the attack: {self._lab.log_tail(_LOG)}")
        counts = json.loads(self._ask("status")).get("counts", {})
        bans = json.loads(self._ask("ban", "list"))
        stop(self._process)
        return Guard(cpu_percent, counts, bans, self._leftovers())

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "rstguard", *words, "--runtime-dir", str(self._runtime)]

    def _await_filtering(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while self._status().returncode != 0:
            if self._process.poll() is not None:
                raise LabError(f"The guard did not start: {self._lab.log_tail(_LOG)}")
            if time.monotonic() > end:
                raise LabError(
                    f"The guard does not filter after {READY_SECONDS:g} s: "
                    f"{self._lab.log_tail(_LOG)}"
                )

    def _status(self) -> subprocess.CompletedProcess[str]:
        # The control socket is a file: asking needs no namespace.
        return subprocess.run(
            self._command("status"), capture_output=True, text=True, check=False, timeout=30
        )

    def _ask(self, *words: str) -> str:
        return self._lab.run("gateway", self._command(*words, "--json"))

    def _leftovers(self) -> list[str]:
        saved = [
            line
            for command in ("iptables-save", "ip6tables-save")
            for line in self._lab.run("gateway", [command]).splitlines()
            if "rstguard" in line.lower() or "NFQUEUE" in line
        ]
        sets = self._lab.run("gateway", ["ipset", "list", "-n"]).split()
        return saved + [f"set {name}" for name in sets if name.startswith("rstguard")]

    def stop(self) -> None:
        """End it without asking for anything."""
        stop(self._process)

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes so far."""
        return cpu_seconds(self._process.pid)


def cpu_seconds(root: int) -> float:
    """Return the processor time of a process and all those below it."""
    ticks = 0
    parents, used = _processes()
    for pid in used:
        above: int | None = pid
        while above is not None and above != root:
            above = parents.get(above)
        if above is not None:
            ticks += used[pid]
    return ticks / os.sysconf("SC_CLK_TCK")


def _processes() -> tuple[dict[int, int], dict[int, int]]:
    """Return parent and processor ticks of every process (proc(5), /proc/pid/stat)."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # It ended while we looked.
        pid = int(text.split(maxsplit=1)[0])
        # The name in parentheses may hold anything: fields are counted from the last one on.
        fields = text.rpartition(")")[2].split()
        parents[pid] = int(fields[1])
        used[pid] = int(fields[11]) + int(fields[12])
    return parents, used
