"""The page and the metrics of a guard, asked as a browser and Prometheus ask."""

from __future__ import annotations

import socket

from tests.support.network import ThreeHosts

PORT = 9788
HOST = f"127.0.0.1:{PORT}"
"""What a guard is given with ``--http``."""


def connected(lab: ThreeHosts) -> socket.socket:
    return lab.connect("gateway", "127.0.0.1", PORT)


def said(lab: ThreeHosts, request: bytes) -> tuple[int, bytes, bytes]:
    """Return status, head and body of the answer to one request."""
    with connected(lab) as one:
        one.sendall(request)
        with one.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def ask(
    lab: ThreeHosts, path: str, method: str = "GET", host: str = HOST
) -> tuple[int, bytes, bytes]:
    return said(lab, f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
