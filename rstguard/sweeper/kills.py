"""What an administrator wants ended: which connections are whose, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rstguard.engine.flow import Flow, Tuple
from rstguard.ipc.messages import Kill, Killed, Unconfirmed
from rstguard.sweeper.condemner import Result

MOST_TOLD: Final = 50
"""Unconfirmed kills that are named one by one in a report."""

_Name = tuple[Tuple, int, int]
"""What makes a connection one of its kind: two zones may hold the same addresses and ports, and a
newer connection may follow an older one."""


class Kills:
    """The requests that are not answered yet."""

    def __init__(self) -> None:
        self._open: dict[int, Killed] = {}
        self._left: dict[int, int] = {}
        """How many connections of each request have not met their end."""
        self._asked: dict[_Name, set[int]] = {}

    def ask(self, kill: Kill, flows: Iterable[Flow]) -> list[Killed]:
        """Take a request for connections; return its answer if there are none."""
        names = {_name(flow) for flow in flows}
        self._open[kill.number] = Killed(kill.number, len(names), 0)
        self._left[kill.number] = len(names)
        for name in names:
            self._asked.setdefault(name, set()).add(kill.number)
        return self._answers({kill.number})

    def note(self, results: Iterable[Result]) -> tuple[list[Killed], list[Unconfirmed]]:
        """Take the ends of connections.

        Returns:
            the requests that are answered by them, and what stayed of connections that were in no
            request.
        """
        touched: set[int] = set()
        others = []
        for result in results:
            numbers = self._asked.pop(_name(result.target.flow), set())
            for number in numbers:
                self._open[number] = _with(self._open[number], result)
                self._left[number] -= 1
            touched |= numbers
            if not numbers and not result.confirmed:
                others.append(_unconfirmed(result))
        return self._answers(touched), others

    def _answers(self, numbers: set[int]) -> list[Killed]:
        answered = [number for number in sorted(numbers) if not self._left[number]]
        for number in answered:
            del self._left[number]
        return [self._open.pop(number) for number in answered]


def _name(flow: Flow) -> _Name:
    return flow.original, flow.zone, flow.ident


def _unconfirmed(result: Result) -> Unconfirmed:
    return Unconfirmed(result.target.flow.original, result.text)


def _with(killed: Killed, result: Result) -> Killed:
    number, matched, confirmed, unconfirmed = (
        killed.number,
        killed.matched,
        killed.confirmed,
        killed.unconfirmed,
    )
    if result.confirmed:
        return Killed(number, matched, confirmed + 1, unconfirmed)
    if len(unconfirmed) < MOST_TOLD:
        unconfirmed = (*unconfirmed, _unconfirmed(result))
    return Killed(number, matched, confirmed, unconfirmed)
