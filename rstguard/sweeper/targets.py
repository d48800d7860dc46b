"""Which connections end with a block of their source, or with a worker's verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rstguard.engine.flow import Flow, TcpState, Tuple
from rstguard.engine.ruleset import Scope
from rstguard.engine.verdict import Ends, Reason
from rstguard.ipc.messages import Reset
from rstguard.kernel.elements import Element
from rstguard.kernel.marks import Marks
from rstguard.kernel.seam import Connections
from rstguard.sweeper.cases import Target


class Block(NamedTuple):
    """A source that is banned or shunned, and why."""

    element: Element
    reason: Reason


def of_banned(
    table: Connections, elements: Iterable[Element], scope: Scope, marks: Marks
) -> list[Target]:
    """Return the connections of banned sources; those of bans that keep them are left out.

    Raises:
        KernelError: the connection table cannot be read.
    """
    banned = [Block(e, Reason.BANNED) for e in elements if e.kind == "ban" and not e.keep_existing]
    if not banned:
        return []
    # What never was established holds no socket, and a forged flood leaves a table full of it.
    flows = table.dump(*marks.uncondemned, assured=True)
    return list(_of_sources(flows, banned, Ends.BOTH, scope))


def half_open(
    table: Connections, blocks: Iterable[Block], scope: Scope, marks: Marks
) -> list[Target]:
    """Return the handshakes that blocked sources can no longer finish, to free the server of them.

    Raises:
        KernelError: the connection table cannot be read.
    """
    flows = table.dump(*marks.half_open)
    waiting = (flow for flow in flows if flow.state == TcpState.SYN_RECV)
    return list(_of_sources(waiting, blocks, Ends.DESTINATION, scope))


def of_verdicts(table: Connections, resets: Sequence[Reset]) -> list[Target]:
    """Return the connections that workers condemned: the other end is to hear of it too.

    Raises:
        KernelError: the connection table cannot be read.
    """
    flows = table.read([named(reset.flow) for reset in resets]) if resets else []
    return [
        Target(flow, reset.ends, reset.rule, reset.reason)
        for flow, reset in zip(flows, resets, strict=True)
        if flow is not None
    ]


def _of_sources(
    flows: Iterable[Flow], blocks: Iterable[Block], ends: Ends, scope: Scope
) -> Iterator[Target]:
    by_key: dict[tuple[int, int], Block] = {}
    for block in blocks:
        source = block.element.source
        by_key[source.shift, source.network >> source.shift] = block
    shifts = sorted({shift for shift, _ in by_key})
    for flow in flows:
        address = flow.original.source
        for shift in shifts:
            found = by_key.get((shift, address >> shift))
            if found is not None:
                if not scope.exempts(address):
                    yield Target(flow, ends, found.element.rule, found.reason)
                break


def named(original: Tuple) -> Flow:
    """Return a flow that bears nothing but its name, to ask the table for the rest."""
    return Flow(0, original, original, 0, 0, False, 0, 0, 0, 0, -1, 0, 0)
