"""A flood that takes a service over its SYN budget, and what the guard says of the service."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from types import TracebackType

from rstguard.engine.address import parse_address
from rstguard.engine.segment import emit
from rstguard.engine.wire import SYN, Packet
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.lab.waiting import wait_until
from tests.support.beside import beside
from tests.support.guard import Guard
from tests.support.network import OUTSIDE4, OUTSIDE6, ThreeHosts
from tests.support.sources import source
from tests.support.traffic import Service


class Flood:
    """Forged SYNs of ever new sources, some thousands a second, while the context lasts.

    `each` are sent `every` so many seconds.  From nowhere nothing comes back; with `lit` they are
    sent in the names of the client's own host, which refuses what it has not asked for.
    """

    def __init__(
        self,
        lab: ThreeHosts,
        target: str,
        port: int,
        each: int = 50,
        every: float = 0.01,
        lit: bool = False,
    ) -> None:
        self._frames = itertools.cycle([_forged(target, port, n, lit) for n in range(20_000)])
        with lab.inside("client"):
            self._injector = Injector(Marks())
        self._each = each
        self._going = beside(self._send, every)

    def __enter__(self) -> Flood:
        self._going.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._going.__exit__(kind, error, trace)
        self._injector.close()

    @property
    def sent(self) -> int:
        return self._injector.sent

    def _send(self) -> None:
        self._injector.send(list(itertools.islice(self._frames, self._each)))


def _forged(target: str, port: int, number: int, lit: bool) -> bytes:
    if ":" in target:
        forged = f"fd73:0:{number | 0x8000:x}::1" if lit else f"2001:db8:{number:x}::1"
    else:
        forged = f"{'10.254' if lit else '198.18'}.{number >> 8}.{number & 255}"
    fields = (parse_address(forged), parse_address(target), 1024 + number, port)
    return emit(Packet(*fields, random.getrandbits(32), 0, SYN, 1000, 0))


def learned(guard: Guard, service: Service, place: str = "server") -> Service:
    """Wait until the guard knows what a service offers."""
    if place == "gateway":
        service.address = OUTSIDE6 if service.v6 else OUTSIDE4
    service.connect(source(service.v6)).talk()
    wait_until(lambda: name_of(service) in guard.status()["shun"]["services"])
    return service


def name_of(service: Service) -> str:
    """Return what a service is called in status."""
    address = f"[{service.address}]" if service.v6 else service.address
    return f"{address}:{service.port}"


def state_of(guard: Guard, service: Service) -> dict[str, object] | None:
    rows = guard.status()["syn_budget"]["services"]
    return next((row for row in rows if row["service"] == name_of(service)), None)


def engaged(guard: Guard, service: Service) -> bool:
    state = state_of(guard, service)
    return state is not None and state["engaged_s"] is not None


@contextlib.contextmanager
def over_budget(lab: ThreeHosts, guard: Guard, service: Service) -> Iterator[Flood]:
    with Flood(lab, service.address, service.port) as flood:
        wait_until(lambda: engaged(guard, service))
        yield flood
