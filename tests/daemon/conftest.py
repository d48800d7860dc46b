"""The network that a module's tests share, and the services they open in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.guard import Service, give_sources
from tests.netns import Lab

Open = Callable[..., Service]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Client, gateway and server; the client has as many addresses as one likes."""
    with Lab("rgf") as lab:
        give_sources(lab)
        yield lab


@pytest.fixture
def serve(lab: Lab) -> Iterator[Open]:
    """Open TCP ports, closed after the test together with all their connections."""
    opened: list[Service] = []

    def open_service(port: int, v6: bool = False, place: str = "server") -> Service:
        opened.append(Service(lab, port, place, v6))
        return opened[-1]

    yield open_service
    for service in opened:
        service.close()
