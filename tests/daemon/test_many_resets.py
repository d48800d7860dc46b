"""A client that ends very many connections at once, more than RSTs are held of one network."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.sources import server_address
from tests.support.traffic import is_dead

pytestmark = pytest.mark.netns

MANY, PORT = 1_000, 8590
POLICY = """\
version: 1
forged_resets: hold
protect: {interfaces: [out]}
rules:
  - {name: shared, measure: syn_rate, per: service, over: 100000/s, then: observe}
"""


def test_the_server_hears_of_each(lab: ThreeHosts, tmp_path: Path) -> None:
    with (
        Guard(lab, POLICY, tmp_path) as guard,
        lab.listen("server", PORT) as listener,
        contextlib.ExitStack() as ends,
    ):
        wait_until(guard.filtering)
        pairs = []
        with lab.inside("client"):
            for _ in range(MANY):
                client = socket.create_connection((server_address(False), PORT), timeout=5)
                pairs.append((client, ends.enter_context(listener.accept()[0])))
        for client, server in pairs:
            server.sendall(b"unread")
            wait_until(lambda client=client: bool(client.recv(1, socket.MSG_PEEK)))  # type: ignore[misc]
        for client, _ in pairs:
            client.close()  # with data unread: a RST (RFC 2525, 2.17)
        wait_until(lambda: all(is_dead(server) for _, server in pairs), 30)
        assert guard.status()["counts"]["lost_resets"] > 0
