"""The service under a real systemd, in a container of its own (a minute; `make systemd` alone)."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from rstguard.lab.usage import children_of

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,iptables,ipset,iproute2,libnetfilter-queue1,"
    "libnfnetlink0,kmod,procps,conntrack"
)
UNIT = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=R=PROGRAM
ExecStart=/trial.sh
"""
BOOT_SECONDS = 240


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small Debian that runs the trial at every boot."""
    if os.geteuid() != 0:
        pytest.skip("a container needs root")
    for tool in ("debootstrap", "systemd-nspawn"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}: apt-get install debootstrap systemd-container")
    here = Path("/etc/os-release").read_text()
    (suite,) = re.findall("^VERSION_CODENAME=(.*)$", here, re.MULTILINE)
    root = tmp_path / "root"
    made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root)]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(Path(__file__).with_name("systemd_trial.sh"), root / "trial.sh")
    (root / "trial.sh").chmod(0o755)
    program = str(Path(sys.executable).with_name("rstguard"))
    units = root / "etc/systemd/system"
    (units / "trial.service").write_text(UNIT.replace("PROGRAM", program))
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/trial.service").symlink_to("../trial.service")
    return root


def boot(root: Path) -> None:
    """Let the container run until it powers itself off; one that does not is ended."""
    command = ["systemd-nspawn", "-q", "-D", str(root), "--private-network", "--register=no"]
    command += ["--keep-unit", f"--bind-ro={ROOT}", f"--bind-ro={Path(sys.prefix).resolve()}", "-b"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as container:
        try:
            container.wait(BOOT_SECONDS)
        finally:
            # Its first process outlives systemd-nspawn; with it, all others of the container end.
            for first in children_of(container.pid):
                with suppress(ProcessLookupError):
                    os.kill(first, signal.SIGKILL)


def test_from_the_first_start_to_the_end(root: Path) -> None:
    boot(root)
    if not (root / "result").exists():
        pytest.skip("no container can be booted here")
    boot(root)
    text = (root / "result").read_text()
    print(text)
    said = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    for line in (
        "started: active",
        "status: filtering; policy first (observe: nothing is blocked), 2 workers",
        "supervisor-user: root",
        "user: rstguard-worker",
        "filtered: 1",
        "reloaded: 0",
        "status: filtering; policy second",
        "bad-reload: 1",
        "crashed: active",
        "killed: active",
        "hung-worker: active",
        "stopped: success",
        "rules: 0",
        "journal: ban 198.51.100.7 by rule manual",
        "uninstalled: 0 files left",
    ):
        assert line in text, text
    assert "user: root" not in text.splitlines(), text
    assert "filtered: 0" not in text, text
    assert not [name for name, value in said.items() if value == "never"], text
    assert 3000 < int(said["left-after-kills"]) < 3600
    assert int(said["left-after-reboot"]) < int(said["left-after-kills"])
    (exposure,) = re.findall(r"rstguard.service: ([0-9.]+)", said["exposure"])
    assert float(exposure) <= 2.5
    assert said["supervisor-nice"] == "-5"
    if said["may-raise"] == "1":  # a container may be kept from it, whatever the unit says
        assert said["worker-nice"] == "-10"
