"""Who owns a network gets it gated; the guard guards on, and sessions of neighbours live on."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import termios
from pathlib import Path
from threading import Thread
from typing import Self

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.hurry import greeting, hurry
from tests.support.network import ThreeHosts
from tests.support.sources import BOTH_FAMILIES, neighbours, server_address, source
from tests.support.traffic import connect

pytestmark = pytest.mark.netns

MEMBERS = 18
POLICY = """\
version: 1
name: cap
bans_per_minute: 3
protect: {interfaces: [out]}
rules:
  - {name: fast, measure: connection_rate, over: 3/m, burst: 3, then: ban, for: 10m}
"""


class Greeter:
    """A server that greets everybody who connects."""

    def __init__(self, lab: ThreeHosts, port: int, v6: bool) -> None:
        self.lab, self.port, self.address = lab, port, server_address(v6)
        self._listener = lab.listen("server", port, v6)
        self._open: list[socket.socket] = []
        self._thread = Thread(target=self._greet)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for one in (self._listener, *self._open):
            one.close()

    def _greet(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._open.append(self._listener.accept()[0])
                self._open[-1].sendall(b"+")

    def visit(self, source: str) -> socket.socket:
        """Return a connection from a source that was greeted.

        Raises:
            OSError: it was not.
        """
        client = connect(self.lab, source, self.address, self.port, 0.4)
        self._open.append(client)
        if client.recv(1) != b"+":
            raise ConnectionError("not greeted")
        return client

    def hurry(self, source: str) -> None:
        """Connect faster than anybody may."""
        for _ in range(5):
            with contextlib.suppress(OSError):
                self.visit(source)


def acknowledged(one: socket.socket) -> bool:
    """Tell whether all that was sent has arrived."""
    return fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)) == bytes(4)


def network_around(member: str) -> str:
    """Return the /24 or /48 of an address, as the guard prints it."""
    return str(ipaddress.ip_network(f"{member}/{48 if ':' in member else 24}", strict=False))


@BOTH_FAMILIES
def test_one_wide_network_is_gated_and_turns_nothing_off(
    lab: ThreeHosts, tmp_path: Path, v6: bool
) -> None:
    neighbour, late, *members = neighbours(v6, MEMBERS + 2)
    with Greeter(lab, 8511, v6) as web, Guard(lab, POLICY, tmp_path / "guard") as guard:
        session = web.visit(neighbour)
        for member in members:
            web.hurry(member)
        wait_until(lambda: guard.status()["counts"].get("gated"))
        with pytest.raises(TimeoutError):
            web.visit(late)
        session.sendall(b"more")
        wait_until(lambda: acknowledged(session))
        (gate,) = [row for row in guard.ask("ban-list") if row["source"] == network_around(late)]
        assert (gate["kind"], gate["rule"]) == ("shun", "fast")
        # It is one network of three that the rule may ban in: it goes on elsewhere.
        assert guard.status()["capped"] == []
        web.hurry(other := source(v6))
        wait_until(lambda: (guard.block_of(other) or {}).get("kind") == "ban")
        assert guard.cli("ban", "remove", gate["source"]).returncode == 0
        web.visit(late)


@BOTH_FAMILIES
def test_a_rule_that_bans_in_many_networks_is_capped_alone_and_nothing_is_lifted(
    lab: ThreeHosts, tmp_path: Path, v6: bool
) -> None:
    """`python -m tests.bench cap` does this with 5,000 sources, and waits until it bans again."""
    port, of_other = 8513, 8514
    rules = POLICY + POLICY.splitlines()[-1].replace("fast", f"other, ports: [{of_other}]") + "\n"
    rules = rules.replace("name: fast", f"name: fast, ports: [{port}]")
    sources = [source(v6) for _ in range(8)]

    def banned() -> set[str]:
        return {row["source"] for row in guard.ask("ban-list") if row["kind"] == "ban"}

    with (
        greeting(lab, port, v6),
        greeting(lab, of_other, v6),
        Guard(lab, rules, tmp_path / "guard") as guard,
    ):
        hurry(lab, sources, port, 5)
        wait_until(lambda: guard.status()["capped"] == ["fast"])
        before = banned()
        hurry(lab, [late := source(v6)], port, 5)
        wait_until(lambda: (guard.block_of(late) or {}).get("kind") == "shun")
        hurry(lab, [offender := source(v6)], of_other, 5)
        wait_until(lambda: (guard.block_of(offender) or {}).get("kind") == "ban")
        assert before <= banned()
        assert hurry(lab, [source(v6)], port, 3) == 3
