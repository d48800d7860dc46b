"""Sysctls are set, recorded and given back, whatever happens in between."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rstguard.kernel import KernelError, sysctl
from rstguard.kernel.linux import Linux
from rstguard.kernel.sysctl import Outcome

LINUX = Linux()
ACCT = "net.netfilter.nf_conntrack_acct"
LOOSE = "net.netfilter.nf_conntrack_tcp_loose"
LIBERAL = "net.netfilter.nf_conntrack_tcp_be_liberal"
STAMP = "net.netfilter.nf_conntrack_timestamp"
RETRANSMISSIONS = "net.netfilter.nf_conntrack_tcp_max_retrans"
"""Takes more values than the two that the guard's own do."""

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("own_namespace")]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysctl, "CHANGED", sysctl.CHANGED | {RETRANSMISSIONS})
    return tmp_path / "sysctl.json"


def put(name: str, value: str) -> None:
    Path("/proc/sys", *name.split(".")).write_text(value)


def outcomes(changes: list[sysctl.Change]) -> dict[str, Outcome]:
    return {change.name: change.outcome for change in changes}


def test_values_are_set_and_given_back(record: Path) -> None:
    put(ACCT, "0")
    put(STAMP, "1")
    changes = sysctl.apply(LINUX, {ACCT: "1", STAMP: "1"}, record)
    assert outcomes(changes) == {ACCT: Outcome.SET, STAMP: Outcome.UNCHANGED}
    assert [LINUX.read_sysctl(name) for name in (ACCT, STAMP)] == ["1", "1"]
    assert outcomes(sysctl.restore(LINUX, record)) == {ACCT: Outcome.RESTORED}
    assert [LINUX.read_sysctl(name) for name in (ACCT, STAMP)] == ["0", "1"]
    assert not record.exists()
    assert sysctl.restore(LINUX, record) == []


def former(record: Path) -> None:
    """What an earlier version has left that was killed."""
    put(LOOSE, "0")
    put(LIBERAL, "0")
    put(ACCT, "1")
    found = {LOOSE: ("1", "0"), LIBERAL: ("1", "0"), ACCT: ("0", "1")}
    entries = {name: {"before": b, "ours": ours} for name, (b, ours) in found.items()}
    record.write_text(json.dumps({"version": 1, "sysctls": entries}))


@pytest.mark.parametrize("starts", [False, True])
def test_what_an_earlier_version_changed_is_given_back(record: Path, starts: bool) -> None:
    former(record)
    if starts:
        sysctl.apply(LINUX, sysctl.TRACKING, record)
        assert json.loads(record.read_text())["sysctls"].keys() == {ACCT, STAMP}
        assert LINUX.read_sysctl(ACCT) == "1"
    else:
        sysctl.restore(LINUX, record)
        assert LINUX.read_sysctl(ACCT) == "0"
    assert (LINUX.read_sysctl(LOOSE), LINUX.read_sysctl(LIBERAL)) == ("1", "1")


def test_what_somebody_else_has_changed_since_an_earlier_version_stays(record: Path) -> None:
    former(record)
    put(LOOSE, "1")
    changes = {change.name: change.outcome for change in sysctl.restore(LINUX, record)}
    assert changes[LOOSE] is Outcome.UNCHANGED
    assert (LINUX.read_sysctl(LOOSE), LINUX.read_sysctl(LIBERAL)) == ("1", "1")


def test_what_the_guard_needs_exists_in_every_namespace(record: Path) -> None:
    sysctl.apply(LINUX, sysctl.TRACKING, record)
    for name, value in sysctl.TRACKING.items():
        assert LINUX.read_sysctl(name) == value


def test_a_second_start_after_a_crash_remembers_the_first_values(record: Path) -> None:
    put(ACCT, "0")
    sysctl.apply(LINUX, {ACCT: "1"}, record)
    changes = sysctl.apply(LINUX, {ACCT: "1"}, record)
    assert outcomes(changes) == {ACCT: Outcome.UNCHANGED}
    sysctl.restore(LINUX, record)
    assert LINUX.read_sysctl(ACCT) == "0"


def test_a_crash_between_record_and_change_does_no_harm(record: Path) -> None:
    put(ACCT, "0")
    sysctl.apply(LINUX, {ACCT: "1"}, record)
    put(ACCT, "0")
    assert outcomes(sysctl.restore(LINUX, record)) == {ACCT: Outcome.UNCHANGED}
    assert LINUX.read_sysctl(ACCT) == "0"


def test_a_value_that_somebody_changed_meanwhile_is_left(record: Path) -> None:
    put(STAMP, "0")
    put(ACCT, "0")
    name = RETRANSMISSIONS
    put(name, "3")
    sysctl.apply(LINUX, {ACCT: "1", name: "5"}, record)
    put(name, "7")
    changes = sysctl.restore(LINUX, record)
    assert outcomes(changes) == {ACCT: Outcome.RESTORED, name: Outcome.LEFT}
    assert LINUX.read_sysctl(name) == "7"
    assert "somebody else changed it" in str(changes[1])


def test_a_value_changed_between_two_starts_counts_as_old(record: Path) -> None:
    name = RETRANSMISSIONS
    put(name, "3")
    sysctl.apply(LINUX, {name: "5"}, record)
    put(name, "7")
    sysctl.apply(LINUX, {name: "5"}, record)
    sysctl.restore(LINUX, record)
    assert LINUX.read_sysctl(name) == "7"


def test_another_wish_keeps_the_first_value(record: Path) -> None:
    name = RETRANSMISSIONS
    put(name, "3")
    put(ACCT, "0")
    sysctl.apply(LINUX, {name: "5", ACCT: "1"}, record)
    sysctl.apply(LINUX, {name: "6"}, record)
    assert LINUX.read_sysctl(name) == "6"
    sysctl.restore(LINUX, record)
    assert (LINUX.read_sysctl(name), LINUX.read_sysctl(ACCT)) == ("3", "0")


def test_the_record_is_whole_json_before_anything_changes(record: Path) -> None:
    put(ACCT, "0")
    with pytest.raises(KernelError, match=r"no sysctl .*nonsense"):
        sysctl.apply(LINUX, {ACCT: "1", "net.netfilter.nf_conntrack_nonsense": "1"}, record)
    assert LINUX.read_sysctl(ACCT) == "0"
    assert not record.exists()
    sysctl.apply(LINUX, {ACCT: "1"}, record)
    assert json.loads(record.read_text())["sysctls"] == {ACCT: {"before": "0", "ours": "1"}}
    assert list(record.parent.iterdir()) == [record]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sysctls": {"a": 1}}', '{"sysctls": 3}'])
def test_a_damaged_record_is_named_and_stops_the_change(record: Path, text: str) -> None:
    record.write_text(text)
    put(ACCT, "0")
    with pytest.raises(KernelError, match=r"sysctl\.json is damaged"):
        sysctl.apply(LINUX, {ACCT: "1"}, record)
    with pytest.raises(KernelError, match=r"sysctl\.json is damaged"):
        sysctl.restore(LINUX, record)
    assert LINUX.read_sysctl(ACCT) == "0"


def test_no_change_without_a_record(tmp_path: Path) -> None:
    put(ACCT, "0")
    with pytest.raises(KernelError, match="choose another --runtime-dir"):
        sysctl.apply(LINUX, {ACCT: "1"}, tmp_path / "missing" / "sysctl.json")
    assert LINUX.read_sysctl(ACCT) == "0"


ATTEMPTS: tuple[Callable[[Path], object], ...] = (
    lambda file: sysctl.restore(LINUX, file),
    lambda file: sysctl.apply(LINUX, {ACCT: "1"}, file),
)


def forge(record: Path, name: str, before: str, ours: str = "1") -> None:
    entry = {"before": before, "ours": ours}
    record.write_text(json.dumps({"version": 1, "sysctls": {name: entry}}))


def test_what_the_guard_never_changes_is_not_restored(record: Path) -> None:
    forge(record, "net.ipv4.ip_forward", "1", "0")
    for attempt in ATTEMPTS:
        with pytest.raises(KernelError, match=r"names 'net\.ipv4\.ip_forward', which"):
            attempt(record)
    assert LINUX.read_sysctl("net.ipv4.ip_forward") == "0"
    for name in ("kernel.core_pattern", "net.netfilter/../../kernel.core_pattern", "", "a" * 999):
        forge(record, name, "1")
        with pytest.raises(KernelError, match="which rstguard does not change: look at it"):
            sysctl.restore(LINUX, record)


@pytest.mark.parametrize(
    "value", ["", "-1", "256", "1000", "1 1", "1\n", "0x1", "|/bin/true", "\u0661"]
)
def test_values_that_are_no_bytes_are_not_restored(record: Path, value: str) -> None:
    put(ACCT, "1")
    for before, ours in ((value, "1"), ("0", value)):
        forge(record, ACCT, before, ours)
        with pytest.raises(KernelError, match="no number from 0 to 255"):
            sysctl.restore(LINUX, record)
    assert LINUX.read_sysctl(ACCT) == "1"


def test_a_record_that_others_may_write_is_not_believed(record: Path) -> None:
    put(ACCT, "1")
    directory = record.parent
    forge(record, ACCT, "0")

    def refused(because: str) -> None:
        for attempt in ATTEMPTS:
            with pytest.raises(KernelError, match=because):
                attempt(record)
        assert LINUX.read_sysctl(ACCT) == "1"

    for mode in (0o666, 0o620):
        record.chmod(mode)
        refused("not a file that only root may write")
    record.chmod(0o600)
    os.chown(record, 1000, 0)
    refused("not a file that only root may write")
    os.chown(record, 0, 0)
    for mode in (0o777, 0o1777, 0o770):
        directory.chmod(mode)
        refused("others than root may write to the directory")
    directory.chmod(0o755)
    os.chown(directory, 1000, 0)
    refused("others than root may write to the directory")
    os.chown(directory, 0, 0)
    elsewhere = record.rename(record.with_name("elsewhere"))
    record.symlink_to(elsewhere)
    refused("not a file that only root may write")
    record.unlink()
    os.mkfifo(record)
    refused("not a file that only root may write")
    record.unlink()
    elsewhere.rename(record)
    assert outcomes(sysctl.restore(LINUX, record)) == {ACCT: Outcome.RESTORED}
