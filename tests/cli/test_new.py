"""The first policy of a machine: from what is found there to the text, and what is in the way.

For each place, the policy stands in new/*.yaml.  After a change that is meant, write them anew with

    GOLDEN=write pytest tests/cli/test_new.py

and read the difference before it is committed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rstguard.cli import app, new
from rstguard.cli.files import replace
from rstguard.cli.fresh import Wanted, policy_text
from rstguard.engine.address import parse_address, parse_prefix
from rstguard.engine.verdict import Action
from rstguard.kernel.holders import Holder
from rstguard.kernel.links import Link
from rstguard.kernel.place import Address, Listener, Network, Place
from rstguard.kernel.standing import amiss
from rstguard.kernel.translations import Translation
from rstguard.policy.compile import compile_policy
from rstguard.policy.load import parse

GOLDEN = Path(__file__).parent / "new"


def address(interface: str, text: str, length: int, changes: bool = False) -> Address:
    return Address(interface, parse_address(text), length, changes)


def dnat(
    destination: str | None, port: int, to: str, to_port: int | None, interface: str = ""
) -> Translation:
    where = parse_prefix(destination) if destination else None
    return Translation(interface, where, (port, port), parse_address(to), to_port)


def listens(*ports: tuple[int, str]) -> tuple[Listener, ...]:
    return tuple(Listener(None, port, program) for port, program in ports)


HOST = Place(
    (Link("lo", True), Link("eth0", True)),
    (address("eth0", "203.0.113.10", 24), address("eth0", "2001:db8::10", 64, changes=True)),
    defaults=("eth0",),
    listeners=(
        *listens((22, "sshd"), (80, "nginx"), (443, "nginx")),
        Listener(parse_address("127.0.0.1"), 5432, "postgres"),
        Listener(parse_address("203.0.113.10"), 2222, "sshd"),
    ),
)
ROUTER = Place(
    (Link("lo", True), Link("wan0", True), Link("lan", True)),
    (
        address("wan0", "203.0.113.2", 30),
        address("wan0", "2001:db8:1::2", 64),
        address("lan", "10.0.0.1", 24),
    ),
    (
        dnat("203.0.113.2", 443, "10.0.0.5", 8443),
        dnat("198.51.100.7", 25, "10.0.0.6", None, "wan0"),
        dnat(None, 9999, "10.0.0.7", 22, "lan"),
    ),
    defaults=("wan0",),
    networks=(
        Network("wan0", parse_prefix("203.0.113.0/30")),
        Network("lan", parse_prefix("10.0.0.0/24")),
        Network("lan", parse_prefix("2001:db8:1:5::/64")),
        Network("lan", parse_prefix("fe80::/64")),
    ),
    listeners=listens((22, "sshd")),
    forwards=frozenset({4, 6}),
)
BEHIND_NAT = Place(
    (Link("lo", True), Link("br0", True), Link("eth0", True, "br0", "bridge")),
    (address("br0", "192.168.1.20", 24, changes=True),),
    defaults=("br0",),
    listeners=listens((25, "master"), (993, "dovecot"), (443, "")),
)
DOCKER = Place(
    (Link("lo", True), Link("ens3", True), Link("docker0", True)),
    (address("ens3", "203.0.113.77", 32), address("docker0", "172.17.0.1", 16)),
    (dnat(None, 8080, "172.17.0.2", 80), dnat("10.96.0.10", 53, "10.244.0.3", 53)),
    defaults=("ens3",),
    networks=(Network("docker0", parse_prefix("172.17.0.0/16")),),
    listeners=listens((22, "sshd"), (8080, "docker-proxy")),
    forwards=frozenset({4}),
)
UPLINKS = Place(
    (Link("ppp0", True), Link("eth1", True), Link("lan", True)),
    (address("ppp0", "100.64.3.4", 32), address("eth1", "198.51.100.2", 24)),
    defaults=("ppp0", "eth1"),
    listeners=listens((2222, "dropbear")),
    forwards=frozenset({4}),
)

PLACES = {
    "host": (HOST, Wanted()),
    "host-for-ssh": (HOST, Wanted(purposes=("ssh",))),
    "host-for-mail": (HOST, Wanted(purposes=("mail", "web"), file="FILE")),
    "router": (ROUTER, Wanted()),
    "router-for-web": (ROUTER, Wanted(purposes=("web",))),
    "behind-nat": (BEHIND_NAT, Wanted()),
    "docker": (DOCKER, Wanted()),
    "uplinks": (UPLINKS, Wanted()),
    "not-root": (ROUTER._replace(unknown=("what is translated (needs root)",)), Wanted()),
    "proxied": (
        HOST._replace(
            holders=(
                Holder(parse_prefix("2001:db8:7::/64"), 61, 1234),
                Holder(parse_prefix("198.51.100.9"), 40, 400, "eth0"),
                Holder(parse_prefix("2001:db8:7::/64"), 30, 300, "eth0"),
                Holder(parse_prefix("10.0.0.9"), 99, 99, "lan"),
            )
        ),
        Wanted(),
    ),
    "named": (Place(), Wanted(interfaces=("wan0", "wan1"))),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_policy_of_a_place(name: str) -> None:
    place, wanted = PLACES[name]
    text = policy_text(place, wanted)
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()
    loaded = parse(text, file.name)
    assert loaded.warnings == ()
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", [name for name in PLACES if name != "named"])
def test_what_it_protects_is_there(name: str) -> None:
    place, wanted = PLACES[name]
    ruleset = compile_policy(parse(policy_text(place, wanted), name).policy)
    own = {one.address for one in place.addresses}
    behind = {network.prefix for network in place.networks}
    there = place._replace(
        reached=frozenset(
            one for one in ruleset.scope.destinations if one in behind or one.network in own
        )
    )
    assert amiss(ruleset.scope, there) == []
    assert not ruleset.enforce
    assert {rule.action for rule in ruleset.rules} <= {Action.BAN, Action.RESET, Action.DROP}


def test_there_is_no_golden_file_without_its_place() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(PLACES)


def invoke(monkeypatch: pytest.MonkeyPatch, place: Place, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(new, "look", lambda: place)
    done = CliRunner().invoke(app, ["policy", "new", *words])
    return done.exit_code, done.stdout, done.stderr


def test_no_file_is_overwritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "policy.yaml"
    out.write_text("mine")
    status, said, complaint = invoke(monkeypatch, HOST, "--out", str(out))
    assert (status, said, out.read_text()) == (1, "", "mine")
    assert "--force" in complaint
    assert complaint.count("\n") == 1
    assert invoke(monkeypatch, HOST, "--out", str(out), "--force")[0] == 0
    assert "interfaces: [eth0]" in out.read_text()
    assert f"apply {out} --confirm" in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]


def test_without_a_default_route_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = HOST._replace(defaults=())
    status, said, complaint = invoke(monkeypatch, nowhere)
    assert (status, said) == (1, "")
    assert "--interface NAME (there are: eth0)" in complaint
    assert complaint.count("\n") == 1
    assert "[eth0]" in invoke(monkeypatch, nowhere, "--interface", "eth0")[1]


def test_json_and_what_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unsure = HOST._replace(unknown=("what is translated (needs root)",))
    status, said, complaint = invoke(monkeypatch, unsure, "--json")
    data = json.loads(said)
    assert status == 0
    assert data["file"] is None
    assert data["unknown"] == ["what is translated (needs root)"]
    assert "not known: what is translated" in complaint
    parse(data["policy"], "p")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--interface", "a b"), "no policy can be written for what is here"),
        (("--out", "/nowhere/at/all.yaml"), "/nowhere/at/all.yaml cannot be written"),
    ],
)
def test_errors_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sentence: str
) -> None:
    status, said, complaint = invoke(monkeypatch, HOST, *words)
    assert (status, said) == (1, "")
    assert sentence in complaint
    assert complaint.count("\n") == 1


def test_a_file_is_replaced_whole_and_what_was_there_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    replace(file, "one", backup=True)
    file.chmod(0o640)
    replace(file, "two", backup=True)
    assert (file.read_text(), (tmp_path / "policy.yaml.bak").read_text()) == ("two", "one")
    assert file.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.yaml"
    link.symlink_to("policy.yaml")
    replace(link, "three")
    assert link.is_symlink()
    assert file.read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.yaml", "policy.yaml", "policy.yaml.bak",
    ]  # fmt: skip


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace(pipe, "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
