"""Lists of bans: every form is read, whatever is wrong in it, and 100,000 are banned in seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rstguard.cli import app, common
from rstguard.cli.banlist import Ban, Wrong, read
from rstguard.control.ban_import import MOST_AT_ONCE
from rstguard.ipc.requests import ControlError
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import ROUTER4, give_sources

POLICY = """\
version: 1
name: lists
protect: {interfaces: [out]}
trusted: [192.0.2.0/24]
rules: []
"""


def bans(text: str) -> list[tuple[str, int]]:
    return [(str(one.source), one.seconds) for one in read(text) if isinstance(one, Ban)]


def wrong(text: str) -> list[int]:
    return [one.line for one in read(text) if isinstance(one, Wrong)]


def test_plain_text() -> None:
    text = "# bad ones\n198.51.100.7\n\n2001:db8::/48  ; a network\n198.51.100.0/24 # more\nx\n"
    assert bans(text) == [("198.51.100.7", 0), ("2001:db8::/48", 0), ("198.51.100.0/24", 0)]
    assert wrong(text) == [6]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("198.51.100.7,spam\n198.51.100.8,spam\n", [("198.51.100.7", 0), ("198.51.100.8", 0)]),
        ("id,ip,duration\n1,198.51.100.7,60\n", [("198.51.100.7", 60)]),
        ('reason,value,duration\n"a, b",198.51.100.7,3h59m51s\n', [("198.51.100.7", 14391)]),
        ("ip,duration\n198.51.100.7,\n", [("198.51.100.7", 0)]),
        ("\ufeffip,duration\r\n198.51.100.7,1m30s\r\n", [("198.51.100.7", 90)]),
    ],
)
def test_csv(text: str, found: list[tuple[str, int]]) -> None:
    assert bans(text) == found
    assert wrong(text) == []


def test_what_is_wrong_in_csv() -> None:
    assert wrong("ip,duration\nx,1\n198.51.100.7,soon\n198.51.100.7,0\n0.0.0.0/0,5\n") == [
        2,
        3,
        4,
        5,
    ]


DECISION = {"value": "198.51.100.7", "scope": "Ip", "duration": "3h59m51.93s", "type": "ban"}


@pytest.mark.parametrize(
    "data",
    [
        [DECISION],
        {"new": [DECISION], "deleted": []},
        [{"id": 3, "decisions": [DECISION], "scenario": "x"}],
        {"decisions": [DECISION]},
    ],
)
def test_crowdsec(data: object) -> None:
    assert bans(json.dumps(data)) == [("198.51.100.7", 14391)]


def test_decisions_that_are_no_bans() -> None:
    others = [DECISION | {"type": "captcha"}, DECISION | {"scope": "country", "value": "XX"}, 5]
    others.append(DECISION | {"simulated": True})
    assert wrong(json.dumps(others)) == [1, 2, 3, 4]
    assert len(bans(json.dumps([DECISION | {"simulated": False}]))) == 1
    assert wrong("[1, 2") == [1]
    assert list(read("null")) == []


def test_times_are_written_as_the_options_want_them() -> None:
    text = "ip,duration\n198.51.100.7,7d\n198.51.100.8,1d2h\n198.51.100.9,10m\n"
    assert [seconds for _, seconds in bans(text)] == [604_800, 93_600, 600]


@given(
    st.text()
    | st.lists(st.sampled_from(["ip,", "198.51.100.7", "\n", '"', "[", "{", "x"])).map("".join)
)
def test_any_text_is_read_to_its_end(text: str) -> None:
    for entry in read(text):
        assert isinstance(entry, Ban | Wrong)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    with ThreeHosts("rgi") as lab:
        give_sources(lab)
        with Guard(lab, POLICY, tmp_path_factory.mktemp("guard"), workers=1) as guard:
            yield guard


@pytest.mark.netns
def test_trusted_and_protected_addresses_are_left_out(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text(f"198.51.100.7\n192.0.2.5\n{ROUTER4}\nnonsense\n")
    done = guard.cli("ban", "import", str(path), "--for", "1h")
    assert done.stdout == "3 read, 1 banned, 2 refused, 1 wrong\n"
    assert "list:4: 'nonsense' is no address" in done.stderr
    assert "192.0.2.5 is not banned: it meets the trusted network" in done.stderr
    assert done.returncode == 0
    assert guard.cli("ban", "import", str(path), "--strict").returncode == 1
    assert guard.json("ban", "remove", "198.51.100.7")["removed"]
    assert guard.cli("ban", "import", str(path), "--dry-run").stdout.startswith("3 read, 0 banned")
    assert guard.ask("ban-list") == []


def test_a_list_that_fails_half_way_says_how_much_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list"
    path.write_text("".join(f"204.0.{n >> 8}.{n & 255}\n" for n in range(MOST_AT_ONCE + 1)))

    def full(_where: Path, request: dict[str, list[object]], _patience: float) -> object:
        if len(request["bans"]) == 1:
            raise ControlError("the set is full")
        return {"banned": MOST_AT_ONCE, "refused": []}

    monkeypatch.setattr(common, "ask", full)
    done = CliRunner().invoke(app, ["ban", "import", str(path)])
    assert done.exit_code == 1
    said = f"{MOST_AT_ONCE} of {MOST_AT_ONCE + 1} were banned before this"
    assert f"the set is full; {said}" in done.output


@pytest.mark.netns
def test_a_hundred_thousand(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("".join(f"203.{n >> 16}.{n >> 8 & 255}.{n & 255}\n" for n in range(100_000)))
    began = time.monotonic()
    done = guard.cli("ban", "import", str(path))
    seconds = time.monotonic() - began
    print(f"100,000 entries in {seconds:.2f} s")
    assert done.stdout == "100000 read, 100000 banned, 0 refused, 0 wrong\n", done.stderr
    assert guard.status()["blocked"]["ban"] == 100_000
    # Some times what it takes to list them: no share of it grows faster than the list.
    began = time.monotonic()
    guard.ask("ban-list")
    assert seconds < 20 * (time.monotonic() - began)


@pytest.mark.netns
@pytest.mark.parametrize(
    "request_",
    [{}, {"bans": []}, {"bans": [["198.51.100.7", 0]]}, {"bans": [["::/0", 5]]}, {"bans": ["x"]}],
)
def test_odd_requests_are_refused(guard: Guard, request_: dict[str, object]) -> None:
    with pytest.raises(ControlError):
        guard.ask("ban-import", **request_)
    assert guard.filtering()
