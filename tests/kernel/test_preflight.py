"""What `doctor` finds on this machine, and on one that lacks something."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rstguard.kernel import preflight
from rstguard.kernel.check import Check, Host, Outcome
from rstguard.kernel.queues import owner
from rstguard.kernel.sets import Sets
from rstguard.kernel.trial import _Trial, feature_checks

READER = (
    "import sys, netfilterqueue\n"
    "queue = netfilterqueue.NetfilterQueue()\n"
    "queue.bind(int(sys.argv[1]), lambda packet: packet.accept())\n"
    "print('bound', flush=True)\n"
    "sys.stdin.read()\n"
)
SHOW = (
    "from rstguard.kernel.preflight import checks\n"
    "for c in checks(0): print(c.name, c.outcome.value, c.sentence, c.fix, sep='|')\n"
)


def by_name(found: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in found}


@pytest.fixture
def reader(own_namespace: None) -> Iterator[subprocess.Popen[str]]:
    """A process that reads queue 7, among other netfilter sockets of the namespace."""
    others = [Sets() for _ in range(16)]
    process = subprocess.Popen(
        [sys.executable, "-c", READER, "7"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "bound\n"
    yield process
    process.communicate()
    for other in others:
        other.close()


def without_net_admin(code: str) -> str:
    """Run Python as root without the capabilities, as a container does."""
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin,-sys_admin", "--inh-caps=-net_admin,-sys_admin"]
        + [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout


def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *tools: str) -> Host:
    """Return this machine as if only these commands were installed."""
    for tool in tools:
        path = shutil.which(tool)
        assert path is not None
        (tmp_path / tool).symlink_to(path)
    monkeypatch.setattr("rstguard.kernel.check._ADMIN_DIRECTORIES", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    return Host.here()


@pytest.mark.netns
def test_a_machine_that_runs_these_tests_lacks_nothing(own_namespace: None) -> None:
    began = time.monotonic()
    found = preflight.checks(0, 2)
    assert time.monotonic() - began < 3
    lacking = [check for check in found if check.outcome is Outcome.MISSING]
    assert not lacking
    names = by_name(found)
    assert {"privileges", "ipset", "IPv4 rules", "IPv6 rules", "queue 0", "queue 1"} <= set(names)
    assert "NFQUEUE" in names["IPv4 rules"].sentence


@pytest.mark.netns
def test_trying_leaves_nothing_in_this_namespace(own_namespace: None) -> None:
    preflight.checks(0)
    for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "list", "-name"]):
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert not [line for line in shown.splitlines() if line.startswith(("-A", "rstguard"))]


@pytest.mark.netns
def test_the_reader_of_a_queue_is_named(reader: subprocess.Popen[str]) -> None:
    holder = owner(7)
    assert holder is not None
    assert holder.pid == reader.pid
    assert owner(8) is None
    check = by_name(preflight.checks(7))["queue 7"]
    assert check.outcome is Outcome.MISSING
    assert f"process {reader.pid}" in check.sentence
    assert check.fix == f"kill {reader.pid}"


@pytest.mark.netns
def test_a_queue_is_free_again_when_its_reader_ends(reader: subprocess.Popen[str]) -> None:
    reader.communicate()
    assert owner(7) is None


@pytest.mark.netns
def test_a_container_without_rights_gets_a_clear_sentence(own_namespace: None) -> None:
    shown = dict(line.split("|", 1) for line in without_net_admin(SHOW).splitlines())
    assert shown["privileges"].startswith("missing|root here, but without CAP_NET_ADMIN")
    assert "--cap-add NET_ADMIN" in shown["privileges"]
    assert shown["kernel features"].startswith("warning|not tried")


@pytest.mark.netns
def test_sets_without_rights_say_so(own_namespace: None) -> None:
    code = (
        "from rstguard.kernel import NotPermitted\n"
        "from rstguard.kernel.elements import Element\n"
        "from rstguard.kernel.sets import Sets\n"
        "from rstguard.engine.address import parse_prefix\n"
        "for attempt in (Sets().list, lambda: Sets().add(\n"
        "    [Element(parse_prefix('192.0.2.1'), 'ban', 'x', 5)])):\n"
        "    try: attempt()\n"
        "    except NotPermitted as problem: print(problem)\n"
    )
    lines = without_net_admin(code).splitlines()
    assert len(lines) == 2
    assert all("needs root (CAP_NET_ADMIN)" in line for line in lines)


@pytest.mark.netns
def test_tools_that_are_missing_are_named_with_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_namespace: None
) -> None:
    host = bare_host(tmp_path, monkeypatch, "unshare", "nsenter", "cat")
    found = by_name(preflight.checks(0))
    assert found["ip6tables"].outcome is Outcome.MISSING
    assert found["ip6tables"].fix == host.install("iptables")
    assert found["ipset"].fix == "apt-get install -y ipset"
    assert found["kernel sets"].outcome is Outcome.WARNING
    assert found["IPv4 rules"].sentence == "not tried: iptables-restore is not installed"


@pytest.mark.netns
def test_a_rule_that_the_kernel_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_namespace: None
) -> None:
    """An iptables-restore that refuses one target stands for a kernel without it."""
    real = shutil.which("iptables-restore")
    host = bare_host(
        tmp_path, monkeypatch, "unshare", "nsenter", "cat", "ipset", "ip6tables-restore", "sh"
    )
    script = tmp_path / "iptables-restore"
    script.write_text(
        f"#!{tmp_path}/sh\n"
        'input=$(/bin/cat); case $input in *NFQUEUE*) echo "no target" >&2; exit 1;; esac\n'
        f'printf "%s\\n" "$input" | {real} "$@"\n'
    )
    script.chmod(0o755)
    found = by_name(feature_checks(host, time.monotonic() + 5))
    assert found["IPv4 rules"].outcome is Outcome.MISSING
    assert "NFQUEUE target (module xt_NFQUEUE)" in found["IPv4 rules"].sentence
    assert "xt_NFQUEUE" in found["IPv4 rules"].fix
    assert found["IPv6 rules"].outcome is Outcome.OK


@pytest.mark.netns
def test_no_time_left_is_a_warning_and_not_a_lack(own_namespace: None) -> None:
    host, late = Host.here(), time.monotonic() - 1
    assert {check.outcome for check in feature_checks(host, late)} == {Outcome.WARNING}
    trial = _Trial(host, ("nsenter", "--net=/proc/self/ns/net"), late)
    found = [trial.sets(), trial.rules(4), trial.rules(6)]
    assert {check.outcome for check in found} == {Outcome.WARNING}


def test_without_capabilities_rules_are_not_tried() -> None:
    (check,) = feature_checks(replace(Host.here(), capabilities=0), time.monotonic() + 1)
    assert check.outcome is Outcome.WARNING


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [("ubuntu", "linux-modules-extra-"), ("debian", "linux-image-")],
)
def test_a_module_that_is_not_installed(
    distribution: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bare_host(tmp_path, monkeypatch)
    host = replace(here, distribution=distribution, modules=tmp_path)
    assert expected in host.load_module("no_such_module")
    upgraded = replace(host, modules=tmp_path / "gone")
    assert "reboot first" in upgraded.load_module("no_such_module")


def test_the_packet_reader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for choice in ("", "netfilterqueue", "fast"):
        monkeypatch.setenv("RSTGUARD_READER", choice)
        check = by_name(preflight.checks(0))["packet reader"]
        said[choice] = (check.outcome, check.sentence)
    assert said[""] == (Outcome.OK, "packets are read by rstguard's own extension")
    assert said["netfilterqueue"][0] is Outcome.OK
    assert said["fast"][0] is Outcome.MISSING
    monkeypatch.delenv("RSTGUARD_READER")
    monkeypatch.setitem(sys.modules, "rstguard.kernel._queue", None)  # as if it was not built
    check = by_name(preflight.checks(0))["packet reader"]
    assert check.outcome is Outcome.WARNING
    assert "was not built" in check.sentence
    assert "install rstguard again" in check.fix


def test_every_lack_has_a_mend() -> None:
    found = preflight.checks(0)
    assert all(check.fix for check in found if check.outcome is Outcome.MISSING)


def test_without_numpy_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = by_name(preflight.checks(0))["sweeps"]
    assert check.outcome is Outcome.WARNING
    assert "rstguard[fast]" in check.fix
