"""`rstguard install` and `uninstall` below a directory, and the unit as systemd reads it."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rstguard.cli import app, install, new
from rstguard.kernel import linux, sizing
from rstguard.kernel.links import Link
from rstguard.kernel.place import Place
from rstguard.policy.load import load
from tests.support.fake_kernel import FakeKernel

ROOT = Path(__file__).parent.parent.parent
UNIT = ROOT / "systemd" / "rstguard.service"


def invoke(root: Path, *words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--root", str(root)])
    assert done.exit_code == 0, done.output
    return done.stdout


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_is_put_in_place_is_taken_away(tmp_path: Path) -> None:
    said = invoke(tmp_path, "install", "--interface", "wan0")
    assert "connection table: not sized, as this is not its machine" in said
    assert tree(tmp_path) == {
        "etc/systemd/system/rstguard.service",
        "etc/sysusers.d/rstguard.conf",
        "etc/tmpfiles.d/rstguard.conf",
        "etc/modules-load.d/rstguard.conf",
        "etc/rstguard/policy.yaml",
    }
    assert "policy.yaml: written" in said
    policy = load(tmp_path / "etc/rstguard/policy.yaml").policy
    assert policy.mode == "observe"
    assert policy.protect.interfaces == ("wan0",)
    assert "--purge" in invoke(tmp_path, "uninstall")
    assert tree(tmp_path) == {"etc/rstguard/policy.yaml"}
    invoke(tmp_path, "uninstall", "--purge")
    assert tree(tmp_path) == set()


def test_the_first_policy_is_written_from_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a directory nothing is looked at: it may become another machine's."""
    monkeypatch.setattr(new, "look", lambda: Place((Link("wan7", True),), defaults=("wan7",)))
    first = install.first_policy
    assert "interfaces: [wan7]" in first(Path("/"), (), install.Changes(tmp_path, True))
    assert first(tmp_path, (), changes := install.Changes(tmp_path, True)) == ""
    assert "`rstguard policy new --out /etc/rstguard/policy.yaml`" in changes.told[0]
    assert "interfaces: [wan0, wan1]" in first(tmp_path, ("wan0", "wan1"), changes)
    assert "not written" in invoke(tmp_path, "install")
    assert not (tmp_path / "etc/rstguard/policy.yaml").exists()


def test_a_policy_is_never_overwritten_and_twice_is_once(tmp_path: Path) -> None:
    invoke(tmp_path, "install", "--interface", "wan0")
    policy = tmp_path / "etc/rstguard/policy.yaml"
    policy.write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert "replaced" not in invoke(tmp_path, "install")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def sized(tmp_path: Path, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> install.Changes:
    """Size the table of a pretended kernel, as on the machine itself."""
    monkeypatch.setattr(linux, "Linux", lambda: kernel)
    monkeypatch.setattr(sizing, "memory", lambda: 16 << 30)
    monkeypatch.setattr(install, "STATE", tmp_path / "state")
    return install.Changes(tmp_path, dry_run=False)


def test_the_connection_table_is_sized_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    kernel.sysctls[sizing.BUCKETS] = "65536"
    changes = sized(tmp_path, kernel, monkeypatch)
    install.size_tracker(changes, Path("/"), False)
    assert changes.told[-1] == "connection table: 1048576 entries (was 262144)"
    assert kernel.sysctls[sizing.BUCKETS] == "1048576"
    lines = (tmp_path / "etc/sysctl.d/60-rstguard.conf").read_text().splitlines()
    assert lines[1:] == [f"{sizing.MOST} = 1048576", f"{sizing.BUCKETS} = 1048576"]
    install.size_tracker(changes, Path("/"), False)
    assert changes.told[-1] == "connection table: 1048576 entries are enough, nothing changed"
    install.unsize_tracker(changes, Path("/"), False)
    assert (kernel.sysctls[sizing.MOST], kernel.sysctls[sizing.BUCKETS]) == ("262144", "65536")


def test_why_the_connection_table_is_not_sized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    changes = sized(tmp_path, kernel, monkeypatch)
    install.size_tracker(changes, Path("/"), False)
    assert changes.told[-1].startswith("connection table: not sized: there is no sysctl net.netf")
    kernel.sysctls[sizing.BUCKETS] = "65536"
    install.size_tracker(changes, Path("/"), True)
    assert kernel.sysctls[sizing.BUCKETS] == "65536"


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    assert "rstguard.service: written" in invoke(tmp_path, "install", "--dry-run")
    assert tree(tmp_path) == set()


def test_the_service_calls_the_program_that_installed_it(tmp_path: Path) -> None:
    invoke(tmp_path, "install")
    unit = (tmp_path / "etc/systemd/system/rstguard.service").read_text()
    program = str(Path(sys.executable).with_name("rstguard"))
    assert f"ExecStart={program} run --policy /etc/rstguard/policy.yaml" in unit
    assert f"ExecStopPost={program} cleanup" in unit


def test_fail2ban(tmp_path: Path) -> None:
    assert "fail2ban is not installed" in invoke(tmp_path, "install", "--fail2ban")
    (tmp_path / "etc/fail2ban/action.d").mkdir(parents=True)
    invoke(tmp_path, "install", "--fail2ban")
    action = configparser.ConfigParser(interpolation=None)
    action.read(tmp_path / "etc/fail2ban/action.d/rstguard.conf")
    assert action["Definition"]["actionban"].endswith('ban add <ip> --for "$t"s')


def test_wrong_words(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["install", "--interface", "a b", "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert tree(tmp_path) == set()
    (tmp_path / "etc").write_text("a file")
    done = CliRunner().invoke(app, ["install", "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1


def analyze(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    return subprocess.run(
        ["systemd-analyze", *words], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_unit_is_right(tmp_path: Path) -> None:
    copy = tmp_path / "rstguard.service"
    copy.write_text(UNIT.read_text().replace("/usr/bin/rstguard", "/bin/true"))
    done = analyze("verify", "--man=no", str(copy))
    said = [line for line in done.stderr.splitlines() if "rstguard" in line]
    assert (done.returncode, said) == (0, [])


def test_the_unit_exposes_little() -> None:
    done = analyze("security", "--offline=true", str(UNIT))
    match = re.search(r"Overall exposure level.*?: ([0-9.]+)", done.stdout)
    if match is None:
        pytest.skip("this systemd-analyze cannot read a unit that is not loaded")
    assert float(match[1]) <= 2.5


@pytest.mark.parametrize(
    ("bantime", "seconds"),
    [("600", 600), ("-1", 2_147_483), ("3000000", 2_147_483), ("0", 2_147_483)],
)
def test_fail2ban_s_times_are_those_that_the_kernel_takes(
    tmp_path: Path, bantime: str, seconds: int
) -> None:
    """For fail2ban -1 is for ever, and repeated offenders may get months."""
    action = configparser.ConfigParser(interpolation=None)
    action.read_string((ROOT / "rstguard" / "fail2ban" / "rstguard.conf").read_text())
    command = action["Definition"]["actionban"].replace("<ip>", "198.51.100.7")
    command = command.replace("<bantime>", bantime).replace("/usr/bin/rstguard", "echo")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == f"ban add 198.51.100.7 --for {seconds}s\n"


@pytest.mark.skipif(shutil.which("fail2ban-client") is None, reason="there is no fail2ban here")
def test_fail2ban_reads_the_action(tmp_path: Path) -> None:
    home = tmp_path / "etc" / "fail2ban"
    (home / "action.d").mkdir(parents=True)
    for path in Path("/etc/fail2ban").iterdir():
        if path.name != "action.d" and not path.name.endswith(".local"):
            (home / path.name).symlink_to(path)
    invoke(tmp_path, "install", "--fail2ban")
    (home / "jail.local").write_text(
        "[INCLUDES]\n[DEFAULT]\nbanaction = rstguard\n[sshd]\nenabled = true\nbackend = polling\n"
        f"logpath = {tmp_path / 'log'}\n"
    )
    (tmp_path / "log").touch()
    done = subprocess.run(
        ["fail2ban-client", "-c", str(home), "-d"], capture_output=True, text=True, check=False
    )
    assert "'actionban', '" in done.stdout, done.stderr
    assert "t=<bantime>; " in done.stdout
