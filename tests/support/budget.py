"""A flood that takes a service over its SYN budget, and what the guard says of the service."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from types import TracebackType

from rstguard.engine.address import parse_address
from rstguard.engine.segment import emit
from rstguard.engine.wire import SYN, Packet
from rstguard.kernel.inject import Injector
from rstguard.kernel.marks import Marks
from rstguard.lab.waiting import wait_until
from tests.support.guard import Guard
from tests.support.network import ThreeHosts
from tests.support.traffic import Service


class Flood:
    """Forged SYNs of ever new sources, some thousands a second, while the context lasts."""

    def __init__(self, lab: ThreeHosts, target: str, port: int) -> None:
        self._frames = [_forged(target, port, number) for number in range(20_000)]
        with lab.inside("client"):
            self._injector = Injector(Marks())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        self._injector.close()

    @property
    def sent(self) -> int:
        return self._injector.sent

    def _run(self) -> None:
        for start in itertools.count(0, 50):
            if self._over.wait(0.01):
                return
            at = start % len(self._frames)
            self._injector.send(self._frames[at : at + 50])


def _forged(target: str, port: int, number: int) -> bytes:
    forged = f"2001:db8:{number:x}::1" if ":" in target else f"198.18.{number >> 8}.{number & 255}"
    fields = (parse_address(forged), parse_address(target), 1024 + number, port)
    return emit(Packet(*fields, random.getrandbits(32), 0, SYN, 1000, 0))


def state_of(guard: Guard, service: Service) -> dict[str, object] | None:
    name = f"[{service.address}]" if service.v6 else service.address
    rows = guard.status()["syn_budget"]["services"]
    return next((row for row in rows if row["service"] == f"{name}:{service.port}"), None)


def engaged(guard: Guard, service: Service) -> bool:
    state = state_of(guard, service)
    return state is not None and state["engaged_s"] is not None


@contextlib.contextmanager
def over_budget(lab: ThreeHosts, guard: Guard, service: Service) -> Iterator[Flood]:
    with Flood(lab, service.address, service.port) as flood:
        wait_until(lambda: engaged(guard, service))
        yield flood
