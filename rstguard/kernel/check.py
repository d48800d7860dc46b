"""One line of the preflight table, and what the checks ask the machine."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from rstguard.kernel.confine import capabilities

_ADMIN_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"


class Outcome(Enum):
    """How a check ended; only `MISSING` keeps the guard from running."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


class Check(NamedTuple):
    """One thing the guard needs: its state in a sentence, and the command that fixes it or ""."""

    name: str
    outcome: Outcome
    sentence: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """What is known of this machine.

    `distribution` is the ID of os-release, `kernel` the release that runs, `capabilities` are
    bits, `modules` is where this kernel's modules would be.
    """

    distribution: str
    kernel: str
    capabilities: int
    modules: Path

    @classmethod
    def here(cls) -> Host:
        """Return this machine, as this process sees it."""
        kernel = os.uname().release
        return cls(_distribution(), kernel, capabilities(), Path("/lib/modules") / kernel)

    @property
    def mount_tracefs(self) -> str:
        """The command that makes the kernel's trace points readable."""
        return "mount -t tracefs tracefs /sys/kernel/tracing"

    def capable(self, capability: int) -> bool:
        """Tell whether this process holds a capability (linux/capability.h)."""
        return bool(self.capabilities >> capability & 1)

    def install(self, *packages: str) -> str:
        """Return the command that installs packages."""
        return f"apt-get install -y {' '.join(packages)}"

    def load_module(self, module: str) -> str:
        """Return the command that makes a kernel module available and loads it."""
        if not self.modules.is_dir():
            return (
                f"modprobe {module} (in a container: on the host; after an upgrade: reboot first)"
            )
        if self.has_module(module):
            return f"modprobe {module}"
        if self.distribution == "ubuntu":
            # Ubuntu's cloud kernels leave much of netfilter to this package.
            return f"{self.install(f'linux-modules-extra-{self.kernel}')} && modprobe {module}"
        kernel = self.install("linux-image-$(dpkg --print-architecture)")
        return f"{kernel} && reboot (the running kernel has no {module})"

    def has_module(self, module: str) -> bool:
        """Tell whether a module is loaded, built in, or there to be loaded."""
        if (Path("/sys/module") / module).exists():
            return True
        return self.find("modprobe") is not None and self.succeeds(
            ["modprobe", "--dry-run", "--quiet", module], 1.0
        )

    def find(self, tool: str) -> str | None:
        """Return the path of a command, or None; an unprivileged PATH often lacks /usr/sbin."""
        path = f"{os.environ.get('PATH', os.defpath)}:{_ADMIN_DIRECTORIES}"
        return shutil.which(tool, path=path)

    def ask(self, arguments: Sequence[str], seconds: float, text: str = "") -> str:
        """Run a command and return all it says; "" if it is missing or takes too long."""
        done = self._run(arguments, seconds, text)
        return done.stdout + done.stderr if done else ""

    def succeeds(self, arguments: Sequence[str], seconds: float, text: str = "") -> bool:
        """Run a command and tell whether it succeeded in time."""
        done = self._run(arguments, seconds, text)
        return done is not None and done.returncode == 0

    def number(self, path: Path) -> int | None:
        """Return the number that a file holds, or None."""
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            return None

    def _run(
        self, arguments: Sequence[str], seconds: float, text: str
    ) -> subprocess.CompletedProcess[str] | None:
        path = self.find(arguments[0])
        if path is None or seconds <= 0:
            return None
        try:
            return subprocess.run(
                [path, *arguments[1:]],
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except (subprocess.TimeoutExpired, OSError):
            return None


def _distribution() -> str:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return ""
    fields = dict(line.split("=", 1) for line in lines if "=" in line)
    return "".join(shlex.split(fields.get("ID", "")))
