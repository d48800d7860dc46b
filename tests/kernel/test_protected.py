"""Who is logged in by SSH, and what else a gateway cannot do without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rstguard.kernel.protected import find, is_address, ssh_clients, ssh_connection
from rstguard.lab.waiting import wait_until
from tests.support.network import ThreeHosts


def session(directory: Path, name: str, **fields: str) -> None:
    directory.mkdir(exist_ok=True)
    text = "".join(f"{key}={value}\n" for key, value in fields.items())
    (directory / name).write_text(text)


def test_sessions_of_logind_tell_who_is_logged_in(tmp_path: Path) -> None:
    here = tmp_path / "sessions"
    session(here, "1", SERVICE="sshd", REMOTE_HOST="192.0.2.1", STATE="active")
    session(here, "2", SERVICE="sshd", REMOTE_HOST="192.0.2.2", STATE="closing")
    session(here, "3", SERVICE="login", REMOTE_HOST="192.0.2.3", STATE="active")
    session(here, "4", SERVICE="sshd", STATE="active")
    (here / "5").write_bytes(os.urandom(500))
    assert ssh_clients(here, tmp_path / "no-processes") == {"192.0.2.1"}


@pytest.mark.netns
def test_an_environment_counts_only_beside_a_connection_that_exists(tmp_path: Path) -> None:
    """Anybody may write SSH_CONNECTION into his environment."""
    import socket

    (tmp_path / "77").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0]:
            ends = (*client.getsockname(), *server.getsockname())
            text = "HOME=/\0SSH_CONNECTION={} {} {} {}\0".format(*ends)
            (tmp_path / "77" / "environ").write_text(text)
            assert ssh_clients(tmp_path / "none", tmp_path) == {"127.0.0.1"}
        text = text.replace(f" {ends[1]} ", " 1 ")
        (tmp_path / "77" / "environ").write_text(text)
        assert ssh_clients(tmp_path / "none", tmp_path) == set()


def link_local(lab: ThreeHosts, place: str, device: str) -> str:
    """Return a device's own address, which it has a moment after it is up."""
    words = ("-br", "-6", "address", "show", device, "scope", "link", "-tentative")
    found: list[str] = []

    def there() -> bool:
        found[:] = lab.run(place, "ip", *words).split()[2:3]
        return bool(found)

    wait_until(there)
    return found[0].partition("/")[0]


@pytest.mark.netns
def test_who_is_logged_in_from_a_link_local_address(tmp_path: Path) -> None:
    """SSH_CONNECTION names the zone, and `ss` in a way of its own."""
    import socket

    (tmp_path / "77").mkdir()
    with ThreeHosts("rgl") as lab:
        here, there = (link_local(lab, *of) for of in (("client", "eth0"), ("gateway", "out")))
        with lab.inside("gateway"):
            place = (there, 0, 0, socket.if_nametoindex("out"))
            server = socket.create_server(place, family=socket.AF_INET6)
        port = server.getsockname()[1]
        with lab.inside("client"):
            client = socket.socket(socket.AF_INET6)
            client.settimeout(10)
            client.connect((there, port, 0, socket.if_nametoindex("eth0")))
        with server, client, server.accept()[0]:
            text = f"SSH_CONNECTION={here}%out {client.getsockname()[1]} {there}%out {port}\0"
            (tmp_path / "77" / "environ").write_text(text)
            with lab.inside("gateway"):
                assert ssh_clients(tmp_path / "none", tmp_path) == {here}
        said = ssh_connection(tmp_path / "77" / "environ")
        assert said is not None
        assert is_address(said[0])


def test_administrators_and_own_addresses_are_protected() -> None:
    found = {str(line.address): line.what for line in find(["198.51.100.7", "nonsense"])}
    assert found["198.51.100.7"] == "whoever changed the policy"
    assert found["127.0.0.1"] == "this host"
    assert "nonsense" not in found


@pytest.mark.parametrize("text", ["192.0.2.1", "2001:db8::1"])
def test_addresses(text: str) -> None:
    assert is_address(text)
    assert not is_address(text + "x")
    assert not is_address("192.0.2.0/24")
    assert not is_address("\0")
