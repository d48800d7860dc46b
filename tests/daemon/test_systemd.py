"""The service under a real systemd, in a container of its own (`make systemd`, some minutes)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.systemd_long, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
PACKAGES = (
    "systemd,systemd-sysv,dbus,python3,iptables,ipset,iproute2,libnetfilter-queue1,"
    "libnfnetlink0,kmod,procps,conntrack"
)
TRIAL = """\
#!/bin/bash
exec > /result 2>&1
say() { echo "$1: $2"; }
$R install --interface eth0 > /dev/null
systemctl start rstguard; say started "$(systemctl is-active rstguard)"
say status "$(systemctl show rstguard -p StatusText --value)"
$R ban add 198.51.100.7 --for 1h
sed -i 's/name: first/name: second/' /etc/rstguard/policy.yaml
systemctl reload rstguard; say reloaded $?
for i in $(seq 25); do
  systemctl show rstguard -p StatusText --value | grep -q second && break
  sleep 0.2
done
say status "$(systemctl show rstguard -p StatusText --value)"
cp /etc/rstguard/policy.yaml /good; echo 'rules: [' >> /etc/rstguard/policy.yaml
systemctl reload rstguard 2> /dev/null; say bad-reload $?
cp /good /etc/rstguard/policy.yaml
kill -9 $(systemctl show rstguard -p MainPID --value)
for i in $(seq 50); do $R status > /dev/null 2>&1 && break; sleep 0.2; done
say crashed "$(systemctl is-active rstguard), $(systemctl show rstguard -p NRestarts --value)"
say bans "$($R ban list --json | grep -c 198.51.100.7)"
systemctl stop rstguard; say stopped "$(systemctl show rstguard -p Result --value)"
say rules "$(iptables-save | grep -c rstguard)"
say journal "$(journalctl -u rstguard RSTGUARD_KIND=ban --no-pager -o cat | tail -1)"
$R uninstall --purge > /dev/null
left=$(ls /etc/rstguard /var/lib/rstguard /etc/systemd/system/rstguard.service 2> /dev/null)
say left "$(echo -n "$left" | wc -l)"
systemctl poweroff
"""
UNIT = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=R=PROGRAM
ExecStart=/trial.sh
"""


def test_started_reloaded_crashed_stopped_and_uninstalled(tmp_path: Path) -> None:
    for tool in ("debootstrap", "systemd-nspawn"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}: apt-get install debootstrap systemd-container")
    here = Path("/etc/os-release").read_text()
    (suite,) = re.findall("^VERSION_CODENAME=(.*)$", here, re.MULTILINE)
    root = tmp_path / "root"
    made = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(root)]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
    (root / "trial.sh").write_text(TRIAL)
    (root / "trial.sh").chmod(0o755)
    program = str(Path(sys.executable).with_name("rstguard"))
    units = root / "etc/systemd/system"
    (units / "trial.service").write_text(UNIT.replace("PROGRAM", program))
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/trial.service").symlink_to("../trial.service")
    boot = ["systemd-nspawn", "-q", "-D", str(root), "--private-network", "--register=no"]
    boot += ["--keep-unit", f"--bind-ro={ROOT}", f"--bind-ro={Path(sys.prefix).resolve()}", "-b"]
    subprocess.run(
        boot, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=180, check=False
    )
    said = (root / "result").read_text()
    for line in (
        "started: active",
        "status: filtering by policy first (observe: nothing is blocked)",
        "reloaded: 0",
        "status: filtering by policy second",
        "bad-reload: 1",
        "crashed: active, 1",
        "bans: 1",
        "stopped: success",
        "rules: 0",
        "journal: ban 198.51.100.7 by rule manual",
        "left: 0",
    ):
        assert line in said
